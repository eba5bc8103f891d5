"""What `finetune` says: gains seed by seed, and the architecture of the run from scratch."""

from __future__ import annotations

from benchmarks.finetune import architecture, summary
from extrema_fast.cli import _parser_of
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.weights.folder import save_weights, weights_meta
from tests.training.conftest import tiny


def test_gains_are_of_the_same_seed():
    runs = [
        {"way": way, "accuracy": accuracy, "cpu_s": 10.0}
        for way, accuracy in (
            ("pretrained", 0.5),
            ("scratch", 0.25),
            ("pretrained", 0.75),
            ("scratch", 0.625),
        )
    ]
    found = summary(runs)
    assert found["accuracy | gain over scratch"]["values"] == [0.25, 0.125]
    assert found["accuracy | pretrained"]["values"] == [0.5, 0.75]
    assert "accuracy | gain over scratch" not in summary([r for r in runs if r["way"] == "scratch"])


def test_scratch_has_the_shape_of_the_weights(tmp_path):
    cfg = tiny()
    words = architecture(str(save_weights(tmp_path / "w", ExtreMA(cfg), weights_meta(cfg, 1))))
    given = vars(_parser_of("finetune").parse_known_args(["none", *words])[0])
    assert given["model.width"] == 16 and given["model.depth"] == 2 and given["model.img_size"] == [32, 32]
