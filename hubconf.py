"""torch.hub entries, one per encoder size:

torch.hub.load(REPOSITORY, "extrema_vit_small_patch16_224", weights="runs/mine", flavour="dino")
"""

# torch.hub lists every name here that has no underscore
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

import extrema_fast as _extrema_fast

if _find_spec("extrema_fast.kernels") is None:
    # a checkout that is not installed: kernels/ is next to the package
    _extrema_fast.__path__.append(str(_Path(__file__).resolve().parent))

dependencies = ["torch"]


def _load(name, weights=None, flavour="native", which=None, version=2, **options):
    from extrema_fast.config import MODELS, SIZES
    from extrema_fast.errors import UsageError

    if flavour not in ("native", "timm", "dino"):
        raise UsageError(f"flavour: expected 'native', 'timm' or 'dino', got {flavour!r}")
    if weights is None:
        encoder = _extrema_fast.create_encoder(name, **options).eval()
    else:
        encoder = _extrema_fast.load_encoder(weights, which, **options)
        size = MODELS[name]
        if encoder.config.shape != SIZES[size]:
            raise UsageError(
                f"{weights}: width, depth and heads are {encoder.config.shape} there, {SIZES[size]} in {name}"
            )
    return encoder.as_dino(version) if flavour == "dino" else encoder


def _entry(name):
    def entry(weights=None, flavour="native", which=None, version=2, **options):
        return _load(name, weights, flavour, which, version, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{name}, in eval mode on the CPU.

    Args:
        weights: what `extrema_fast.load_encoder` reads (run folder, weights file, released .pth); None: random.
        flavour: 'native' or 'timm' (one class has both interfaces), or 'dino'.
        which: 'teacher' or 'student', of files that hold both (default: the teacher).
        version: of DINO's interface, 1, 2 or 3.
        **options: of `extrema_fast.load_encoder`, or without weights of `extrema_fast.create_encoder`.

    Raises:
        UsageError: also for weights of another size.
    """
    return entry


extrema_vit_tiny_patch16_224 = _entry("extrema_vit_tiny_patch16_224")
extrema_vit_small_patch16_224 = _entry("extrema_vit_small_patch16_224")
extrema_vit_base_patch16_224 = _entry("extrema_vit_base_patch16_224")
extrema_vit_large_patch16_224 = _entry("extrema_vit_large_patch16_224")
extrema_vit_huge_patch14_224 = _entry("extrema_vit_huge_patch14_224")
extrema_vit_giant_patch14_224 = _entry("extrema_vit_giant_patch14_224")
