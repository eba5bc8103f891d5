"""What the tries of faults share: one of each folder and file that this project reads, and how a try is judged.

`make test` makes a few tries of each row; `make test-faults` many, with other seeds, and writes a record of them
(`--tries`, `--try-seed`, `--try-record`, of tests/conftest.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extrema_fast import train
from extrema_fast.cli import main
from extrema_fast.errors import ExtremaError
from extrema_fast.evaluation.evaluate import evaluate
from extrema_fast.signals import Stopped
from extrema_fast.tools.embed import embed
from extrema_fast.tools.index import index
from extrema_fast.tools.pack import pack
from tests.data.tars import write_tar
from tests.tools.conftest import write_images
from tests.training.conftest import tiny

__all__ = ["main"]


class Tries:
    """Counts the tries of one row of the table, and those that held.

    Attributes:
        factor: how many times as many tries as in `make test`.
        rng: draws what is random about the tries.
    """

    def __init__(self, row: str, factor: int, seed: int) -> None:
        self.row, self.factor = row, factor
        self.rng = np.random.default_rng([seed, *row.encode()])
        self.tried, self.failures = 0, []

    def judge(self, what: str, run: Callable[[], object]) -> None:
        """Calls `run`; it must end well or with an error of this project that is one line of moderate length."""
        self.tried += 1
        try:
            run()
        except ExtremaError as error:
            text = str(error)
            if not text or len(text) > 4000:
                self.failures.append(f"{what}: a message of {len(text)} characters")
        except (Exception, Stopped, SystemExit) as error:
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")

    def expect(self, what: str, held: bool, found: object = "") -> None:
        """Counts one try."""
        self.tried += 1
        if not held:
            self.failures.append(f"{what}: {found}")


_done: list[Tries] = []


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> Iterator[Tries]:
    """The tries of one test, which fails when one of them did not hold."""
    option = request.config.getoption
    row = request.node.nodeid.partition("tests/faults/")[2]
    result = Tries(row, option("--tries"), option("--try-seed"))
    yield result
    _done.append(result)
    assert result.tried, "nothing was tried"
    shown = "\n".join(result.failures[:20])
    assert not result.failures, f"{len(result.failures)} of {result.tried} tries did not hold:\n{shown}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the record that was asked for."""
    file = session.config.getoption("--try-record")
    if file and _done:
        rows = [
            {"row": t.row, "tried": t.tried, "held": t.tried - len(t.failures), "failures": t.failures}
            for t in _done
        ]
        seed, factor = session.config.getoption("--try-seed"), session.config.getoption("--tries")
        record = {"torch": torch.__version__, "seed": seed, "tries": factor, "rows": rows}
        Path(file).write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture
def full_table(request: pytest.FixtureRequest) -> None:
    """Skips what `make test` has elsewhere."""
    if request.config.getoption("--tries") == 1:
        pytest.skip("one of these is tried elsewhere in `make test`; all with --tries")


class Set:
    """One of each folder and file that this project reads, small, under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.run, self.features, self.packed = root / "run", root / "features", root / "packed"
        self.manifest, self.tar = root / "m.tsv", root / "shards" / "a.tar"
        self.weights = self.run / "weights" / "step_00000004"
        self.checkpoint = self.run / "checkpoints" / "step_00000004"
        self.released = root / "encoder.pth"

    def copy(self, root: Path) -> Set:
        """The same elsewhere; paths inside that name the images still name the old ones."""
        shutil.copytree(self.root, root, symlinks=True, dirs_exist_ok=True)
        return Set(root)

    def config(self, **change: Any) -> Any:
        """The configuration of the run."""
        images = str(self.images)
        changes: dict[str, Any] = {
            "data": {"train": images, "test": images, "limit": 0},
            "train": {"epochs": 1, "batch_size": 4},
            "ckpt": {"every_steps": 2},
            "eval": {"every_epochs": 1, "max_train": 8, "max_test": 8, "k": 3},
            "log": {"every_steps": 1},
        }
        return tiny(self.run, changes, change)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, _cache_folder: None) -> Set:
    """Made once; tests change copies of it."""
    pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    s = Set(tmp_path_factory.mktemp("originals"))
    torch.manual_seed(0)
    write_images(s.images, 18)
    train.pretrain(s.config(), progress=False)
    evaluate(s.run, device="cpu")
    quiet = {"loader": "pil", "progress": False, "device": "cpu"}
    embed(str(s.images), s.features, s.run, batch_size=3, part_images=6, **quiet)
    pack(str(s.images), s.packed, progress=False)
    index(str(s.images), s.manifest, progress=False, threads=1)
    s.tar.parent.mkdir()
    files = sorted(s.images.rglob("*.png"))
    write_tar(s.tar, [(f"{i:03d}.png", f.read_bytes()) for i, f in enumerate(files)])
    from extrema_fast.weights.load import load_encoder

    torch.save(load_encoder(s.run).state_dict(), s.released)
    return s


@pytest.fixture
def things(originals: Set, tmp_path: Path) -> Set:
    """A copy of the originals that a test may change."""
    return originals.copy(tmp_path / "things")
