"""Protocols of the linear probe, few labels, several seeds; checked against scikit-learn where it is installed.

Covers: k-NN equal to KNeighborsClassifier; logistic regression equal to LogisticRegression; heads of several features
and rates trained together equal to each trained alone; the choice of rate, strength and feature, which sees no test
image; splits and few labels, by share and by file; the options of the command, its file and its table.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from extrema_fast.cli import main
from extrema_fast.config import DataConfig, EvalConfig, smoke, to_dict
from extrema_fast.data.sources import ImageSource
from extrema_fast.errors import UsageError
from extrema_fast.evaluation import evaluate as evals
from extrema_fast.evaluation import probes, protocols
from extrema_fast.evaluation.probes import knn, knn_predictions, linear_probe, train_heads
from extrema_fast.evaluation.protocols import few_labels, logistic, probe, split
from extrema_fast.evaluation.result import best_feature, format_table, is_result, shown, summary
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.reporting.compare import compare
from extrema_fast.reporting.report import report
from extrema_fast.weights.folder import save_weights, weights_meta


def blobs(n: int, d: int, classes: int, gap: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(7)) * gap
    y = torch.arange(n) % classes
    return centers[y] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), y


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (150, 0.5)])
def test_knn_predicts_what_scikit_learn_predicts(k, temperature):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed (extra: dev)")
    np = pytest.importorskip("numpy")
    (x, y), (q, t) = blobs(150, 9, 5, 0.4, 1), blobs(400, 9, 5, 0.4, 2)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    theirs.fit(x.double().numpy(), y.numpy())
    ours = knn_predictions(x, y, q, t, k, temperature)
    assert ours.tolist() == theirs.predict(q.double().numpy()).tolist()
    assert 0.3 < float((ours == t).float().mean()) < 0.95


def test_logistic_regression_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed (extra: dev)")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (x, y), (q, t) = blobs(300, 12, 5, 0.5, 1), blobs(500, 12, 5, 0.5, 2)
    scale, shift = torch.logspace(-2, 2, 12), torch.arange(12.0)
    x, q = x * scale + shift, q * scale + shift
    x[:, 3] = q[:, 3] = 5
    strengths = (1e-3, 0.1, 10.0)
    ours = logistic(x, y, 5, strengths)(q).softmax(2)
    scaler = preprocessing.StandardScaler().fit(x.double().numpy())
    a, b = (scaler.transform(z.double().numpy()) for z in (x, q))
    for i, c in enumerate(strengths):
        theirs = linear.LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(a, y.numpy())
        torch.testing.assert_close(ours[:, i], torch.from_numpy(theirs.predict_proba(b)), rtol=0, atol=1e-5)
        # near ties alone may differ
        right = float((ours[:, i].argmax(1) == t).float().mean())
        assert right == pytest.approx(theirs.score(b, t.numpy()), abs=0.002)
        assert 0.3 < right < 0.95


def test_heads_trained_together_are_those_trained_alone():
    (x, y), (q, t) = blobs(90, 6, 3, 0.6, 3), blobs(80, 6, 3, 0.6, 4)
    rates = (0.01, 0.1, 1.0)
    together = train_heads([x, x.flip(1)], y, 3, rates, seed=5)
    for i, rate in enumerate(rates):
        assert not torch.allclose(together[0](q)[:, i], together[0](q)[:, i - 1], atol=0.05)
        # another kind draws before the order of the images, so one that leaves the order as it is
        (paired, _) = train_heads([x, x.flip(1)], y, 3, (rate,), seed=5)
        torch.testing.assert_close(together[0](q)[:, i], paired(q)[:, 0], rtol=1e-4, atol=1e-4)
    (alone,) = train_heads([x], y, 3, seed=5)
    assert alone(q).shape == (80, 1, 3)
    right = float((alone(q)[:, 0].argmax(1) == t).float().mean())
    assert linear_probe(x, y, q, t, seed=5) == pytest.approx(right)


def test_soft_targets_are_the_mean_of_their_classes():
    x, y = blobs(64, 5, 4, 0.6, 3)
    hard = train_heads([x], y, 4, (0.1,), seed=2)[0]
    soft = train_heads([x], torch.nn.functional.one_hot(y, 4).float(), 4, (0.1,), seed=2)[0]
    torch.testing.assert_close(hard.weights, soft.weights)
    # rows without weight teach nothing
    weights = torch.nn.functional.one_hot(y, 4).float() * (y < 2)[:, None]
    assert set(train_heads([x], weights, 4, (0.1,), seed=2)[0](x)[y >= 2, 0].argmax(1).tolist()) <= {0, 1}


@pytest.mark.parametrize("protocol", ["grid", "logistic"])
def test_what_is_best_is_chosen_without_the_test_images(protocol, monkeypatch):
    (x, y), (q, t) = blobs(200, 8, 4, 0.8, 1), blobs(300, 8, 4, 0.8, 2)
    noise = torch.randn(500, 8, generator=torch.Generator().manual_seed(9))
    train, test = {"noise": noise[:200], "good": x}, {"noise": noise[200:], "good": q}
    found = probe(protocol, train, y, test, t, seed=3)
    assert found["good"].validation > 0.6 > 0.5 > found["noise"].validation
    assert float((found["good"].predicted == t).float().mean()) > 0.6
    values = protocols.RATES if protocol == "grid" else protocols.STRENGTHS
    assert found["good"].chosen in values
    # other test labels change nothing
    assert all(
        torch.equal(a.predicted, b.predicted) and a[1:] == b[1:]
        for a, b in zip(
            found.values(), probe(protocol, train, y, test, t.roll(1), seed=3).values(), strict=True
        )
    )
    # a rate or strength that cannot learn is not taken
    monkeypatch.setattr(protocols, "RATES" if protocol == "grid" else "STRENGTHS", (1e-9, 0.1))
    assert probe(protocol, train, y, test, t, seed=3)["good"].chosen == 0.1
    # one image of each class: nothing to validate on
    single = probe(protocol, {"good": x[:4]}, y[:4], {"good": q}, t)["good"]
    assert single.validation is None and float((single.predicted == t).float().mean()) > 0.3
    with pytest.raises(UsageError, match="one class"):
        probe(protocol, {"good": x}, y * 0, {"good": q}, t)


def test_features_of_another_model_are_refused():
    (x, y), (q, t) = blobs(30, 8, 3, 1.0, 1), blobs(30, 6, 3, 1.0, 2)
    for measure in (knn, linear_probe, lambda *a: probe("grid", {"": a[0]}, a[1], {"": a[2]}, a[3])):
        with pytest.raises(UsageError, match=r"test features: 6 .* 8: .*different models"):
            measure(x, y, q, t)


# ---- which images ---------------------------------------------------------------------------------


def listed(names: list[str], labels: list[int]) -> ImageSource:
    classes = [str(c) for c in range(max(labels) + 1)]
    return ImageSource("set", [f"/set/{n}" for n in names], torch.tensor(labels), classes, "f")


def test_splits_and_shares_are_of_each_class_and_keyed():
    y = torch.tensor([0] * 100 + [1] * 10 + [2])
    kept, held = split(y, seed=1)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(111))
    assert torch.bincount(y[held], minlength=3).tolist() == [20, 2, 0]
    assert not torch.equal(held, split(y, seed=2)[1]) and torch.equal(held, split(y, seed=1)[1])
    source = listed([f"{i}.jpg" for i in range(111)], y.tolist())
    one, other = few_labels(source, "0.1", (1, 2))
    assert torch.bincount(y[one], minlength=3).tolist() == [10, 1, 1] and not torch.equal(one, other)
    # the smaller share is part of the larger
    assert set(few_labels(source, "0.01", (1,))[0].tolist()) < set(one.tolist())


def test_labels_of_a_file_are_found_by_name(tmp_path):
    source = listed(["a/n1_1.png", "a/n1_2.png", "b/n2_1.png", "b/x.png", "c/x.png"], [0, 0, 1, 1, 2])
    file = tmp_path / "1percent.txt"
    for text, rows in (("n1_1.JPEG\nn2_1.JPEG\n", [0, 2]), ("c/x\n\na/n1_2.png", [1, 4])):
        file.write_text(text)
        assert [r.tolist() for r in few_labels(source, str(file), (1, 2))] == [rows, rows]
    for text, words in (
        ("n1_1.JPEG\nx.JPEG\n", "x.JPEG fits 2 images"),
        ("n1_1\nn9_1\nn9_2\n", "2 names of 3 .* first: n9_1"),
        ("n1_1\nn1_2\n", "one class"),
        ("\n", "empty"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            few_labels(source, str(file), (0,))
    for labels, words in (("2", "below 1, .* got 2"), ("0", "above 0"), ("none.txt", "neither")):
        with pytest.raises(UsageError, match=f"labels: .*{words}"):
            few_labels(source, labels, (0,))


# ---- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with images of three classes, told apart by brightness."""
    image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    root, g = tmp_path_factory.mktemp("probed"), torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(("a", "b", "c")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                low = 80 * label
                pixels = torch.randint(low, low + 80, (32, 32, 3), generator=g, dtype=torch.uint8)
                image.fromarray(pixels.numpy()).save(root / part / name / f"{i:02d}.png")
    data = DataConfig(train=str(root / "train"), test=str(root / "test"), loader="pil")
    cfg = dataclasses.replace(smoke(), data=data, eval=EvalConfig(k=5))
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(json.dumps(to_dict(cfg)))
    save_weights(root / "run" / "weights" / "step_00000003", ExtreMA(cfg), weights_meta(cfg, 3))
    return root / "run"


def test_few_labels_over_seeds_have_a_file_and_a_table(run, monkeypatch, capsys):
    # few epochs and rates tell as much of files and tables
    monkeypatch.setattr(probes, "EPOCHS", 14)
    monkeypatch.setattr(protocols, "RATES", (0.01, 0.1, 1.0))
    plain = evals.evaluate(run, device="cpu")
    result = evals.evaluate(run, labels=0.25, seeds=3, protocol="grid", device="cpu")
    files = sorted(p.name for p in (run / "reports").iterdir())
    assert files == [f"evaluation-{result['key']}.json", "evaluation.json"] and is_result(result)
    assert result["counts"]["train"] == 9 and result["labeled"]["of"] == 36
    rows = [list(map(int, r.split())) for r in result["labeled"]["rows"]]
    assert len(rows) == 3 and rows[0] != rows[1]
    assert all([sum(12 * c <= i < 12 * (c + 1) for i in r) for c in range(3)] == [3, 3, 3] for r in rows)
    assert [(r["encoder"], r["feature"]) for r in result["rows"][:3]] == [
        ("pretrained", kind) for kind in ("class token", "mean of patches", "class and mean")
    ]
    assert all(r["spread"].keys() == {"knn", "probe"} and len(r["chosen"]) == 3 for r in result["rows"])
    assert max(v for r in result["rows"] for v in r["spread"].values()) > 0
    # the mean of what each seed alone gives
    alone = [evals.evaluate(run, labels="0.25", seed=s, protocol="grid", device="cpu") for s in range(3)]
    for i, row in enumerate(result["rows"]):
        for metric in ("knn", "probe"):
            values = torch.tensor([a["rows"][i][metric] for a in alone], dtype=torch.float64)
            assert row[metric] == pytest.approx(float(values.mean()))
            assert row["spread"][metric] == pytest.approx(float(values.std()))
    table = format_table(result)
    # the seed changes nothing of k-NN on all labels
    for spread, text in (
        ({"knn": 0.0, "probe": 0.0}, "50.0 %"),
        ({"knn": 0.01, "probe": 0.0}, "50.0 ± 1.0 %"),
    ):
        assert shown({"knn": 0.5, "probe": 0.5, "spread": spread}, "knn") == text
        assert shown({"knn": 0.5, "probe": 0.5, "spread": spread}, "probe") == "50.0 ± 0.0 %"
    assert "9 training (of 36, labels 0.25) and 15 test images" in table and " ± " in table
    assert "of 3 seeds" in table and f"best feature there: {best_feature(result)}" in table
    assert len({len(line) for line in table.splitlines()[2:9]}) == 1
    # kept, and the run's own result as it was
    monkeypatch.setattr(evals, "extract", None)
    assert evals.evaluate(run, labels="0.25", seeds=3, protocol="grid", device="cpu") == result
    assert evals.evaluate(run, device="cpu") == plain and "spread" not in plain["rows"][0]
    for args, words in (
        (["--protocol", "svm"], "paper, grid, logistic, got 'svm'"),
        (["--seeds", "0"], "seeds: expected at least 1"),
        (["--labels", "0.25", "--k", "10"], "10 neighbors, but there are 9 training images"),
    ):
        assert main(["evaluate", str(run), "--device", "cpu", *args]) == 2
        assert words in capsys.readouterr().err


def test_fewer_images_than_neighbors_are_said(run):
    for labels, found in (
        (0.01, ["k-NN: 3 training images, fewer than k = 5: all of them vote"]),
        (0.25, []),
    ):
        result = evals.evaluate(run, labels=labels, metrics=("knn",), device="cpu")
        assert [w for w in result["warnings"] if w.startswith("k-NN:")] == found


def test_training_classes_that_no_test_image_has_are_named(run, tmp_path):
    for name in ("a", "c"):
        (tmp_path / name).symlink_to(run.parent / "test" / name)
    result = evals.evaluate(run, test=str(tmp_path), metrics=("knn",), device="cpu")
    assert any("1 class of 3" in w and ": b;" in w for w in result["warnings"])


def test_other_evaluations_are_in_report_and_comparison(run, monkeypatch):
    monkeypatch.setattr(protocols, "STRENGTHS", (0.01, 1.0))
    pytest.importorskip("jinja2", reason="reports need jinja2 (extra: train)")
    pytest.importorskip("matplotlib", reason="reports need matplotlib (extra: train)")
    result = evals.evaluate(run, labels="0.5", seeds=2, protocol="logistic", device="cpu")
    found = summary(result)
    assert "logistic regression, labels 0.5, k = 5, 18 training and 15 test images, 2 seeds" in found["what"]
    assert found["feature"] == best_feature(result) and "±" in found["scores"]["probe"]["text"]
    other = shutil.copytree(run, run.parent / "other")
    for file in (other / "reports").glob("evaluation-*.json"):
        file.unlink()
    # a damaged file is left out
    (other / "reports" / "evaluation-0.json").write_text(json.dumps(result | {"rows": 1}))
    page = report(run, images=0).read_text()
    text, other_text = (f"{found['what']}: logistic regression", found["scores"]["probe"]["text"])
    assert "More evaluations" in page and found["what"] in page and other_text in page
    assert "More evaluations" not in report(other, images=0).read_text()
    both = compare([run, other], run.parent / "both.html").read_text()
    assert "More evaluations" in both and text in both and other_text in both
    shutil.rmtree(other)
