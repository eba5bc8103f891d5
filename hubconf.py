"""torch.hub entries, one per encoder size:

torch.hub.load(REPOSITORY, "extrema_vit_small_patch16_224", weights="runs/mine", dino=2)
"""

# torch.hub lists every callable here whose name has no underscore
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

import extrema_fast as _extrema_fast
from extrema_fast.config import MODELS as _MODELS
from extrema_fast.config import SIZES as _SIZES
from extrema_fast.errors import UsageError as _UsageError

if _find_spec("extrema_fast.kernels") is None:
    # a checkout that is not installed: kernels/ is next to the package
    _extrema_fast.__path__.append(str(_Path(__file__).resolve().parent))

dependencies = ["torch"]


def _entry(name, size):
    def entry(weights=None, which=None, dino=None, **options):
        if weights is None:
            encoder = _extrema_fast.create_encoder(name, **options).eval()
        else:
            encoder = _extrema_fast.load_encoder(weights, which, **options)
            if encoder.config.shape != _SIZES[size]:
                raise _UsageError(
                    f"{weights}: width, depth and heads are {encoder.config.shape} there, {_SIZES[size]} in {name}"
                )
        return encoder if dino is None else encoder.as_dino(dino)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{name}, in eval mode on the CPU, with the interface of timm's vision transformers.

    Args:
        weights: What `extrema_fast.load_encoder` reads (run folder, weights file, released .pth); None: random.
        which: As in `extrema_fast.load_encoder`.
        dino: 1, 2 or 3: with the interface of that version of DINO instead.
        **options: Of `extrema_fast.load_encoder`, or without weights of `extrema_fast.create_encoder`.

    Raises:
        UsageError: Also for weights of another size.
    """
    return entry


globals().update({name: _entry(name, size) for name, size in _MODELS.items()})
