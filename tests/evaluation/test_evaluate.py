"""k-NN, linear probe, collapse indicators and warnings; extraction; the evaluate command on a tiny run.

Covers: k-NN against a plain loop; the probe against the paper's rule written out with torch's own optimizer; bad
features, labels and classes; indicators of constant, low-rank and isotropic features; warnings loud on collapse and
silent on health; the result file's cache, which file it is, and what a line says of it; nothing random consumed.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil

import pytest
import torch

from extrema_fast.cli import main
from extrema_fast.config import DataConfig, EvalConfig, smoke, to_dict
from extrema_fast.data.sources import open_source, subset
from extrema_fast.distributed import World
from extrema_fast.errors import DataError, NonFiniteError, StorageError, UsageError
from extrema_fast.evaluation import evaluate as evals
from extrema_fast.evaluation import probes, subject
from extrema_fast.evaluation.collapse import collapse_warnings
from extrema_fast.evaluation.features import extract, overlap, raw_pixels
from extrema_fast.evaluation.online import online_eval
from extrema_fast.evaluation.probes import attention_entropy, indicators, knn, linear_probe
from extrema_fast.evaluation.result import format_table, is_result, per_class, result_id, summaries
from extrema_fast.models.extrema import ExtreMA
from extrema_fast.progress import ImageProgress
from extrema_fast.training.run import build, open_test, open_train, take_cropped_whole
from extrema_fast.weights.export import export
from extrema_fast.weights.folder import save_weights, weights_meta
from extrema_fast.weights.load import load_encoder
from tests.torchvision_operators import define_torchvision_operators


def blobs(n: int, d: int, classes: int, gap: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(7)) * gap
    y = torch.arange(n) % classes
    return centres[y] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), y


# ---- k-NN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.07)])
def test_knn_equals_a_plain_loop(k, temperature):
    x, y = blobs(120, 6, 4, 0.5, seed=1)
    q, t = blobs(60, 6, 4, 0.5, seed=2)
    right = 0
    for a, truth in zip(q, t, strict=True):
        s = torch.tensor([float(a @ b / a.norm() / b.norm()) for b in x])
        votes = [0.0] * 4
        for i in s.argsort(descending=True)[:k].tolist():
            votes[int(y[i])] += math.exp(float(s[i]) / temperature)
        right += votes.index(max(votes)) == int(truth)
    assert 0.3 < right / 60 < 0.99
    assert knn(x, y, q, t, k, temperature) == pytest.approx(right / 60)


def test_knn_at_a_temperature_that_overflows_exp_and_of_constant_features():
    x, y = blobs(300, 8, 3, 0.4, seed=1)
    q, t = blobs(100, 8, 3, 0.4, seed=2)
    nearest = knn(x, y, q, t, k=1)
    assert knn(x, y, q, t, k=7, temperature=1e-4) == pytest.approx(nearest)
    assert knn(x * 1e3, y, q * 1e-3, t, k=1) == nearest
    constant, y = torch.ones(100, 4), torch.arange(100) % 10
    assert knn(constant, y, constant, y) <= 0.1 + 1e-9


# ---- linear probe ---------------------------------------------------------------------------------


def test_probe_follows_the_papers_rule_step_by_step():
    # re-stated with torch's own optimizer and the schedule's arithmetic written out
    x, y = blobs(90, 5, 3, 0.6, seed=3)
    q, t = blobs(300, 5, 3, 0.6, seed=4)
    generator = torch.Generator().manual_seed(11)
    layer = torch.nn.Linear(5, 3).double()
    with torch.no_grad():
        layer.weight.copy_((torch.randn(5, 3, generator=generator) * 0.01).T)
        layer.bias.zero_()
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()
    batch, per_epoch, epochs = 11, 8, 90
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    for step in range(epochs * per_epoch):
        epoch = step / per_epoch
        if step % per_epoch == 0:
            order = torch.randperm(90, generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        warm = epoch / 10 if epoch < 10 else (1 + math.cos(math.pi * (epoch - 10) / 80)) / 2
        sgd.param_groups[0]["lr"] = 0.1 * batch / 256 * warm
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(layer(((x[rows] - mean) / std).double()), y[rows]).backward()
        sgd.step()
    right = (layer(((q - mean) / std).double()).argmax(1) == t).double().mean()
    assert 0.4 < right < 0.99
    assert linear_probe(x, y, q, t, seed=11) == pytest.approx(float(right), abs=0.004)


def test_probe_of_noise_and_of_scaled_shifted_and_constant_dimensions():
    x, y = blobs(200, 8, 4, 0.5, seed=1)
    q, t = blobs(100, 8, 4, 0.5, seed=2)
    plain = linear_probe(x, y, q, t)
    scale, shift = torch.logspace(-1, 2, 8), torch.arange(8.0) * 10
    moved = linear_probe(x * scale + shift, y, q * scale + shift, t)
    a, b = (torch.cat([z, torch.full((len(z), 3), 5.0)], 1) for z in (x, q))
    # other starting weights, the same classifier but for near ties
    assert moved == pytest.approx(plain, abs=0.02) == linear_probe(a, y, b, t)
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    assert linear_probe(noise, y, noise[:100].flip(0), t) < 0.45


def test_probe_with_more_dimensions_than_rows_repeats_itself():
    x, y = blobs(40, 200, 4, 0.5, seed=1)
    q, t = blobs(80, 200, 4, 0.5, seed=2)
    first = linear_probe(x, y, q, t, seed=3)
    assert first == linear_probe(x, y, q, t, seed=3) > 0.9


@pytest.mark.parametrize("measure", [knn, linear_probe])
def test_bad_features_are_named(measure):
    x, y = blobs(30, 4, 3, 1.0, seed=1)
    bad = x.clone()
    bad[2:4, 1] = float("nan")
    for args, error, words in (
        ((bad, y, x, y), NonFiniteError, "train features: 2 of 30"),
        ((x, y, bad, y), NonFiniteError, "test features: 2 of 30"),
        ((x, y[:5], x, y), UsageError, "expected 30 labels"),
        ((x, y, x[:0], y[:0]), UsageError, "n >= 1"),
    ):
        with pytest.raises(error, match=words):
            measure(*args)
    with pytest.raises(UsageError, match="one class"):
        linear_probe(x, y * 0, x, y)


def test_accuracy_of_each_class_and_confusions():
    truth = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    found = {"knn": torch.tensor([0, 1, 1, 1, 0, 3, 1, 1]), "probe": truth}
    out = per_class(found, truth, ["a", "b", "no test images", "d"])
    assert out["images"] == [3, 2, 0, 3] and out["probe"] == [1, 1, None, 1]
    assert out["knn"] == pytest.approx([1 / 3, 1 / 2, None, 1 / 3])
    # the more frequent first, then by class
    assert out["confusions"] == {"knn": [[0, 1, 2], [3, 1, 2], [1, 0, 1]], "probe": []}


# ---- collapse -------------------------------------------------------------------------------------


def features(kind: str, n: int = 300, d: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g)
    if kind == "constant":
        return torch.randn(1, d, generator=g) + 1e-4 * x
    if kind == "low rank":
        return torch.randn(n, 2, generator=g) @ torch.randn(2, d, generator=g)
    if kind == "random encoder":
        return torch.randn(1, d, generator=g) + 0.1 * x
    return x


def test_indicators_of_known_features():
    eye = indicators(torch.eye(8))
    assert (eye["rank"], eye["cosine"]) == (pytest.approx(8), pytest.approx(0, abs=1e-9))
    same = indicators(torch.ones(10, 4) * torch.arange(1, 11)[:, None])
    assert same == {"std": pytest.approx(0, abs=1e-6), "rank": pytest.approx(1), "cosine": pytest.approx(1)}
    x = features("isotropic")
    unit = x / x.norm(dim=1, keepdim=True)
    pairs, sigma = unit @ unit.T, torch.linalg.svdvals(unit)
    p = sigma / sigma.sum()
    got = indicators(x)
    assert got["cosine"] == pytest.approx(float((pairs.sum() - pairs.trace()) / (300 * 299)), abs=1e-6)
    assert got["std"] == pytest.approx(1, abs=0.02)
    assert got["rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
    assert indicators(x.T)["rank"] <= 64
    assert indicators(features("low rank"))["rank"] < 2.01
    with pytest.raises(NonFiniteError):
        indicators(torch.full((3, 2), float("nan")))
    with pytest.raises(UsageError, match="at least 2"):
        indicators(torch.ones(1, 4))
    assert attention_entropy(torch.full((2, 3, 5), 0.2)) == pytest.approx(1)
    assert attention_entropy(torch.eye(5)) == 0


def record(kind: str, step: int, **more) -> dict:
    out = {"step": step, "epoch": step, "images": 300, "dim": 64, "proj_dim": 64}
    for part in ("teacher", "teacher_proj", "student", "student_proj"):
        out |= {f"{part}_{k}": v for k, v in indicators(features(kind)).items()}
    return out | more


CONSTANT = ("contracting", "same way", "few directions", "teacher class token", "optim.base_lr")


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["random encoder", "constant"], CONSTANT),
        (["isotropic", "constant"], CONSTANT),
        # from the start
        (["constant", "constant"], ["same way"]),
        (["isotropic", "low rank"], ["few directions"]),
        (["random encoder", "isotropic", "low rank"], ["few directions"]),
        (["random encoder"], []),
        (["constant"], []),
        (["random encoder", "random encoder"], []),
        (["random encoder", "isotropic", "isotropic"], []),
        ([], []),
    ],
)
def test_loud_on_collapse_and_silent_on_health(kinds, words):
    curve = [0.25, 0.3, 0.45]
    history = [
        record(k, i, knn_cls=curve[i], knn_mean=curve[i], view_cosine=0.999, attention_entropy=0.97)
        for i, k in enumerate(kinds)
    ]
    found = collapse_warnings(history)
    text = "|".join(found)
    assert bool(found) == bool(words) and "\n" not in text and all(word in text for word in words)
    assert not (kinds and kinds[-1] == "low rank" and "same way" in text)


def test_published_collapse_is_caught_and_published_health_is_not():
    # teacher class vector: (std, rank, cosine, k-NN)
    def history(*rows):
        names = ("teacher_std", "teacher_rank", "teacher_cosine", "knn_cls")
        return [dict(zip(names, r, strict=True)) | {"dim": 128, "images": 500} for r in rows]

    collapsed = history((0.10, 3.7, 0.987, 0.78), (0.032, 1.4, 0.9995, 0.75))
    assert len(collapse_warnings(collapsed)) == 4
    # what to try is said once, and does not name what is so already
    for loss in ("byol", "infonce"):
        text = "|".join(collapse_warnings(collapsed, loss=loss))
        assert text.count("lower optim.base_lr") == 1 and ("head.loss infonce" in text) == (loss == "byol")
    healthy = history((0.10, 3.7, 0.987, 0.78), (0.56, 15, 0.6, 0.82), (0.76, 30, 0.34, 0.90))
    assert collapse_warnings(healthy) == []
    # record 2026-11-28_cpu1_cifar10_larger: the projections narrow while the features improve
    ranks = [(92.9, 33.4, 0.31), (57.3, 152.0, 0.43), (45.5, 129.1, 0.46), (41.5, 105.7, 0.51)]
    names = ("teacher_proj_rank", "teacher_rank", "knn_cls")
    narrow = [dict(zip(names, r, strict=True)) | {"dim": 256, "proj_dim": 128, "images": 2000} for r in ranks]
    assert collapse_warnings(narrow) == []
    narrow[-1]["teacher_proj_rank"] = 30.0
    assert "teacher projection 30" in " ".join(collapse_warnings(narrow))


@pytest.mark.parametrize(
    ("curve", "more", "words"),
    [
        ((0.30, 0.25), {}, "below the 30.0% it began with"),
        ((0.30, 0.295), {}, ""),
        # noise of few images
        ((0.29, 0.275), {"images": 400}, ""),
        ((0.2, 0.6, 0.55, 0.5, 0.45), {}, "three evaluations in a row"),
        ((0.2, 0.6, 0.55, 0.56, 0.45), {}, ""),
    ],
)
def test_falling_knn(curve, more, words):
    history = [{"knn_cls": v, "epoch": i} | more for i, v in enumerate(curve)]
    found = " ".join(collapse_warnings(history))
    assert bool(found) == bool(words) and words in found
    assert "below" not in " ".join(collapse_warnings(history, warmup_epochs=9))


def test_pinned_attention_and_trivial_views():
    def warn(last, **kw):
        first = {"epoch": 0, "view_cosine": 0.5, "attention_entropy": 0.97}
        return " ".join(collapse_warnings([first, {"epoch": 1} | last], **kw))

    assert "uniform" in warn({"attention_entropy": 1.0})
    assert "one token" in warn({"attention_entropy": 0.001})
    assert "trivial" in warn({"view_cosine": 0.999}, warmup_epochs=5)
    assert warn({"view_cosine": 0.999, "attention_entropy": 0.9}) == ""


# ---- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tree of three classes, told apart by brightness, in train/ and test/."""
    image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    root, g = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("test", 5)):
        for label, name in enumerate(("a", "b", "c")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                array = torch.randint(
                    80 * label, 80 * label + 80, (32, 32, 3), generator=g, dtype=torch.uint8
                )
                image.fromarray(array.numpy()).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def cfg(images):
    base = smoke()
    data = DataConfig(train=str(images / "train"), test=str(images / "test"), loader="pil")
    return dataclasses.replace(base, data=data, eval=EvalConfig(k=5, max_train=20, max_test=12, batch_size=8))


@pytest.fixture
def run(cfg, tmp_path, monkeypatch):
    # of a probe that is tested above
    monkeypatch.setattr(probes, "EPOCHS", 14)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    method = ExtreMA(cfg)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.1)
    save_weights(folder / "weights" / "step_00000007", method, weights_meta(cfg, 7))
    return folder


def test_extract_keeps_row_order_and_does_not_depend_on_the_batch(cfg):
    source = open_source(cfg.data.train)
    encoder = ExtreMA(cfg).student.train()
    one = extract(encoder, source, cfg.data, batch_size=7)
    all_ = extract(encoder, source, cfg.data, batch_size=64)
    assert one.cls.shape == one.mean.shape == (30, 64)
    torch.testing.assert_close(one.cls, all_.cls)
    torch.testing.assert_close(one.mean, all_.mean)
    assert encoder.training
    assert one.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    swapped = extract(encoder, subset(source, torch.tensor([29, 3])), cfg.data)
    torch.testing.assert_close(swapped.cls, all_.cls[[29, 3]])


def test_every_part_of_an_evaluation_shows_how_far_it_is(run, cfg, monkeypatch):
    told: dict[str, tuple[int, int]] = {}

    def reached(bar, done, note=""):
        bar.done = done
        told[bar.what] = done, bar.total

    monkeypatch.setattr(ImageProgress, "reached", reached)
    evals.evaluate(run, device="cpu")
    train, test = (open_source(s) for s in (cfg.data.train, cfg.data.test))
    names = {train.name, test.name}
    assert {f"{what} {name}" for what in ("listing", "encoding", "pixels of") for name in names} < told.keys()
    counted = {k: v for k, v in told.items() if not k.startswith("sizes")}
    assert all(done == total for done, total in counted.values())
    assert told["k-NN"][1] == len(test) and told["linear probe"] == (14, 14)


def test_raw_pixels_of_gray_and_of_large_images(cfg, tmp_path):
    source = open_source(cfg.data.train)
    x = raw_pixels(source, cfg.data, (32, 32)).cls
    assert x.shape == (30, 3 * 32 * 32) and x.min() >= 0 and x.max() <= 1
    assert raw_pixels(source, cfg.data, (64, 32)).cls.shape == (30, 3 * 32 * 32)
    coarse = raw_pixels(source, cfg.data, (32, 32), side=8).cls.view(30, 3, 8, 8)
    torch.testing.assert_close(coarse[:, :, 0, 0], x.view(30, 3, 32, 32)[:, :, :4, :4].mean((2, 3)))
    image = pytest.importorskip("PIL.Image")
    image.new("L", (32, 32), 51).save(tmp_path / "gray.png")
    gray = raw_pixels(open_source(str(tmp_path)), cfg.data, (32, 32)).cls
    assert gray.shape == (1, 32 * 32)
    assert float(gray.mean()) == pytest.approx(0.2)


def test_online_eval_reports_every_field_and_draws_nothing(cfg):
    train, test = open_source(cfg.data.train), open_source(cfg.data.test, "test")
    method = ExtreMA(cfg).train()
    flags = [m.training for m in method.modules()]
    before = torch.get_rng_state()
    out, shown, bank = online_eval(method, train, test, cfg)
    assert len(shown.source) == len(shown.cls) == 12 and len(bank.source) == len(bank.cls) > 12
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in method.modules()] == flags
    parts = ("teacher", "teacher_proj", "student", "student_proj")
    rest = {"knn_cls", "knn_mean", "view_cosine", "attention_entropy", "images", "dim", "proj_dim"}
    assert set(out) == {f"{p}_{k}" for p in parts for k in ("std", "rank", "cosine")} | rest
    assert all(math.isfinite(v) for v in out.values())
    assert json.loads(json.dumps(out)) == out == online_eval(method, train, test, cfg).values
    assert (out["images"], out["dim"], out["proj_dim"]) == (12, 64, 32)
    # at step 0 the two networks are the same
    assert out["teacher_std"] == pytest.approx(out["student_std"])


def test_online_eval_without_labels_or_test_images(cfg):
    train = open_source(cfg.data.train)
    bare = dataclasses.replace(train, labels=None, classes=[])
    for sources in ((train, None), (None, bare), (bare, bare)):
        out, shown, bank = online_eval(ExtreMA(cfg), *sources, cfg)
        assert bank is shown and len(shown.source) == out["images"]
        assert "knn_cls" not in out and out["teacher_rank"] >= 1
    with pytest.raises(UsageError, match="neither"):
        online_eval(ExtreMA(cfg), None, None, cfg)
    with pytest.raises(UsageError, match=r"eval\.max_test: .* at least 2 images"):
        online_eval(ExtreMA(cfg), None, subset(train, torch.arange(1)), cfg)


def test_evaluate_writes_a_result_and_reuses_it(run, monkeypatch):
    result = evals.evaluate(run, device="cpu")
    path = run / "reports" / "evaluation.json"
    assert json.loads(path.read_text()) == result
    assert [(r["encoder"], r["feature"]) for r in result["rows"]] == [
        ("pretrained", "class token"),
        ("pretrained", "mean of patches"),
        ("random init", "class token"),
        ("random init", "mean of patches"),
        ("raw pixels", "pixels"),
    ]
    assert result["counts"] == {"train": 30, "test": 15, "classes": 3}
    assert (result["step"], result["which"], result["k"], result["temperature"]) == (7, "teacher", 5, 0.07)
    rows = result["rows"]
    assert result["gain"]["class token"]["knn"] == rows[0]["knn"] - rows[2]["knn"]
    # brightness: a probe sees it, the cosine of k-NN does not
    assert rows[4]["probe"] >= 0.8
    assert result["indicators"]["pretrained"] != result["indicators"]["random init"]
    table = format_table(result)
    assert "raw pixels" in table and "100.0 %" in table and "30 training and 15 test images" in table
    assert "teacher weights of step 7;" in table
    assert "teacher weights;" in format_table(result | {"step": None})
    assert len({len(line) for line in table.splitlines()[2:7]}) == 1

    def refuse(*_args, **_kwargs):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(evals, "extract", refuse)
        assert evals.evaluate(run, device="cpu") == result
        for change in ({"force": True}, {"k": 3}, {"which": "student"}, {"max_train": 20}):
            with pytest.raises(AssertionError, match="computed again"):
                evals.evaluate(run, device="cpu", **change)
        # of the class token, whose mean over equally many images is the row's accuracy
        of_classes = result["per_class"]
        assert of_classes["feature"] == "class token" and of_classes["images"] == [5, 5, 5]
        for metric in ("knn", "probe"):
            assert sum(of_classes[metric]) / 3 == pytest.approx(rows[0][metric])
        assert is_result(result) and is_result({k: result[k] for k in result if k != "per_class"})
        assert not is_result(result | {"per_class": of_classes | {"images": [5]}})
        assert not is_result(result | {"per_class": of_classes | {"confusions": {"knn": [[0, 3, 1]]}}})
        # a result of an older version is measured again
        path.write_text(json.dumps({k: result[k] for k in result if k != "per_class"}))
        with pytest.raises(AssertionError, match="computed again"):
            evals.evaluate(run, device="cpu")
        path.write_text(json.dumps(result))


def test_broken_images_are_left_out_of_every_row(run, images, cfg, tmp_path):
    whole = evals.evaluate(run, device="cpu")
    copy = shutil.copytree(images, tmp_path / "images")
    for name in ("train/a/00.png", "train/c/09.png", "test/b/02.png"):
        (copy / name).write_bytes((copy / name).read_bytes()[:200])
    broken = dict(train=str(copy / "train"), test=str(copy / "test"))
    result = evals.evaluate(run, **broken, device="cpu")
    assert result["counts"] == {"train": 28, "test": 14, "classes": 3, "left_out": 3}
    assert "3 more images cannot be decoded" in format_table(result)
    # the same as without them
    for name in ("train/a/00.png", "train/c/09.png", "test/b/02.png"):
        (copy / name).unlink()
    without = evals.evaluate(run, **broken, device="cpu")
    for key in ("rows", "gain", "indicators"):
        assert result[key] == without[key]
    assert result["indicators"] != whole["indicators"]
    for file in copy.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"can be read|nor can any other"):
        evals.evaluate(run, **broken, device="cpu")


def test_a_result_that_cannot_be_kept_is_in_the_error(run, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(subject, "write_file", full)
    with pytest.raises(StorageError, match=r"evaluation\.json") as e:
        evals.evaluate(run, device="cpu")
    assert main(["evaluate", str(run), "--device", "cpu"]) == 5
    out, err = capsys.readouterr()
    assert format_table(e.value.result) in out and err.count("extrema-fast: error:") == 1


@pytest.mark.parametrize(("metric", "other"), [("knn", "linear probe"), ("probe", "k-NN")])
def test_half_commands_measure_their_half_and_write_nothing(run, metric, other):
    result = evals.evaluate(run, metrics=(metric,), device="cpu")
    assert all(row.keys() == {"encoder", "feature", metric} for row in result["rows"])
    assert other not in format_table(result)
    assert not (run / "reports").exists()


def test_what_cannot_be_evaluated_is_named(run, images, tmp_path):
    weights, train = run / "weights" / "step_00000007", str(images / "train")
    other = tmp_path / "other"
    (other / "zebra").mkdir(parents=True)
    (other / "zebra" / "0.png").write_bytes((images / "test" / "a" / "00.png").read_bytes())
    for args, options, words in (
        ((run,), {"metrics": ("fine-tune",)}, "knn, probe"),
        ((run,), {"device": "gpu"}, "device"),
        ((weights,), {}, "add --data"),
        ((weights, train), {}, "no test images"),
        ((run, f"{train}/a", str(images / "test")), {}, "images without labels"),
        ((run, train, str(other)), {}, "zebra"),
        ((run, str(other), str(other)), {}, r"one class \(zebra\)"),
        ((run,), {"k": 0}, "k: expected at least 1, got 0"),
        ((run,), {"batch_size": 0}, "batch_size: expected at least 1"),
        ((run,), {"max_test": -1}, "max_test: expected at least 0"),
        ((run,), {"temperature": 0.0}, "temperature: "),
        ((run,), {"k": 31}, "30 training images; use at most 30"),
    ):
        with pytest.raises(UsageError, match=words):
            evals.evaluate(*args, **options)
    # one folder that holds both parts is enough
    assert evals.evaluate(weights, str(images), metrics=("knn",), device="cpu")["counts"]["test"] == 15


def test_a_partial_evaluation_has_a_file_of_its_own(run):
    whole = evals.evaluate(run, device="cpu")
    part = evals.evaluate(run, device="cpu", max_test=6)
    assert part["counts"]["test"] == 6 and evals.evaluate(run, device="cpu") == whole
    files = sorted(f.name for f in (run / "reports").iterdir())
    assert files == [f"evaluation-{part['key']}.json", "evaluation.json"]
    # a limit that leaves out nothing is no limit
    evals.evaluate(run, device="cpu", max_test=100)
    assert len(list((run / "reports").iterdir())) == 2


def test_the_runs_own_values_are_its_own_when_they_are_named(run, images, monkeypatch):
    train, test = str(images / "train"), str(images / "test")
    whole = evals.evaluate(run, device="cpu")
    monkeypatch.setattr(evals, "extract", None)
    for named in (
        {"train": str(images)},
        {"train": f"{train}/", "test": test},
        {"test": os.path.relpath(test)},
        {"train": train, "test": str(images / "train" / ".." / "test")},
        {"k": 5},
        {"temperature": 0.07},
        {"crop_pct": 0.875, "train": train, "test": test, "k": 5},
    ):
        assert evals.evaluate(run, **named, device="cpu") == whole, named
    # a value that is the run's is no weaker as an option
    with pytest.raises(UsageError, match="use at most 3"):
        evals.evaluate(run, k=5, max_train=3, device="cpu")
    assert [f.name for f in (run / "reports").iterdir()] == ["evaluation.json"]
    # a result that named values alone have made is the run's, too
    monkeypatch.undo()
    (run / "reports" / "evaluation.json").unlink()
    assert evals.evaluate(run, str(images), k=5, device="cpu")["key"] == whole["key"]
    assert [f.name for f in (run / "reports").iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("change", [{"seed": 5}, {"temperature": 0.5}, {"crop_pct": 1}, {"k": 4}])
def test_another_rule_leaves_the_runs_own_result_as_it_is(run, change):
    whole = evals.evaluate(run, device="cpu")
    other = evals.evaluate(run, **change, device="cpu")
    files = sorted(f.name for f in (run / "reports").iterdir())
    assert files == [f"evaluation-{other['key']}.json", "evaluation.json"]
    assert json.loads((run / "reports" / "evaluation.json").read_text()) == whole


def test_other_images_of_equal_names_and_sizes_are_other_images(run, images, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for version, level in (("v1", 0), ("v2", 9)):
        for file in sorted(images.rglob("*.png")):
            to = tmp_path / version / "pets" / file.relative_to(images).with_suffix(".bmp")
            to.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.full((32, 32, 3), 20 * (ord(file.parent.name) - 96) + level, dtype=torch.uint8)
            image.fromarray(pixels.numpy()).save(to)
    shutil.copytree(tmp_path / "v1" / "pets", tmp_path / "moved")
    first, second, moved = (
        evals.evaluate(run, str(tmp_path / data), metrics=("knn",), device="cpu")
        for data in ("v1/pets", "v2/pets", "moved")
    )
    assert result_id(first) != result_id(second) and result_id(first) == result_id(moved)
    a, b = (s["what"] for s in summaries([first, second]))
    assert (a, b) == tuple(
        f"{v}/pets/train / {v}/pets/test, linear probe, k = 5, 30 training and 15 test images"
        for v in ("v1", "v2")
    )


def test_a_result_of_an_older_version_gets_the_hashes_of_its_images(run, monkeypatch):
    whole = evals.evaluate(run, device="cpu")
    file = run / "reports" / "evaluation.json"
    assert whole["images"]["train"] != whole["images"]["test"]
    old = {name: value for name, value in whole.items() if name != "images"}
    file.write_text(json.dumps(old))
    monkeypatch.setattr(evals, "extract", None)
    assert evals.evaluate(run, device="cpu") == whole == json.loads(file.read_text())


def test_images_overwritten_by_others_of_their_size_are_measured_again(run, images, tmp_path, caplog):
    image = pytest.importorskip("PIL.Image")
    for path in images.rglob("*.png"):
        copy = tmp_path / "set" / path.relative_to(images).with_suffix(".bmp")
        copy.parent.mkdir(parents=True, exist_ok=True)
        image.open(path).save(copy)

    def evaluated():
        caplog.clear()
        with caplog.at_level("INFO"):
            found = evals.evaluate(run, str(tmp_path / "set"), out=out, metrics=("knn",), device="cpu")
        return {k: v for k, v in found.items() if k != "seconds"}, caplog.text

    out = tmp_path / "r.json"
    first, _ = evaluated()
    again, text = evaluated()
    assert again == first and "and the bytes of at most 64 of each set; nothing to compute" in text
    a, b, c = ((tmp_path / "set/test" / name) for name in ("a", "swapped", "c"))
    a.rename(b), c.rename(a), b.rename(c)
    other, text = evaluated()
    assert other["key"] == first["key"] and other["images"]["train"] == first["images"]["train"]
    assert other["rows"] != first["rows"] and "r.json: is of other images of the same names and sizes" in text
    assert evaluated()[0] == other


RESULT = {"metrics": ["knn"], "k": 5, "which": "teacher", "step": 7, "temperature": 0.07, "seed": 0}
RESULT |= {"rows": [{"encoder": "pretrained", "feature": "class token", "knn": 0.5}], "gain": {}}
RESULT |= {"counts": {"train": 30, "test": 15, "classes": 3}, "crop_pct": 0.875, "interpolation": "bilinear"}
RESULT |= {"train": "/a/pets/train", "test": "/a/pets/test", "images": {"train": "1", "test": "2"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 1.0}, ", temperature 1.0"),
        ({"seed": 5}, ", seed 5"),
        ({"seeds": 3}, ", 3 seeds"),
        ({"seeds": 3, "seed": 5}, ", 3 seeds from 5"),
        ({"crop_pct": 1.0}, ", crop fraction 1.0"),
        ({"interpolation": "bicubic"}, ", bicubic"),
        ({"counts": {"train": 30, "test": 6, "classes": 3}}, "30 training and 6 test images"),
        ({"which": "student"}, ", student"),
        ({"images": {"train": "1", "test": "3"}}, ", images 8edc8095"),
        ({"images": None}, ", images not recorded"),
        ({"images": None, "test": "/b/pets/test"}, "/ b/pets/test, "),
        ({"images": None, "holdout": 0.2}, ", 20 % held out"),
        ({"resized": "... which are taken whole", "crop_pct": None}, "size whole"),
    ],
)
def test_results_on_other_images_or_by_other_rules_have_other_words(change, words):
    other = {name: value for name, value in (RESULT | change).items() if value is not None}
    assert result_id(other) != result_id(RESULT)
    plain, said = (s["what"] for s in summaries([RESULT, other]))
    assert plain != said and words in said and words not in plain
    # of one page's images of one name every line says which
    elsewhere = {"train": "/v2/pets/train", "test": "/v2/pets/test", "images": {"train": "3", "test": "4"}}
    lines = [s["what"] for s in summaries([RESULT, RESULT | elsewhere, RESULT | {"labels": "0.1"}])]
    assert [line.split(",")[0] for line in lines] == [
        f"{v}/pets/train / {v}/pets/test" for v in ("a", "v2", "a")
    ]
    # of other weights, and of the same images elsewhere
    moved = RESULT | {"step": 9, "path": "other", "train": "/c/train"}
    assert result_id(moved) == result_id(RESULT)
    assert [s["what"].endswith("step 9") for s in summaries([moved, RESULT], 7)] == [True, False]


def test_test_images_among_the_training_images_are_noticed(run, images, tmp_path):
    train, test = str(images / "train"), tmp_path / "test"
    assert not overlap(open_source(train), open_source(str(images / "test")))
    shutil.copytree(images / "test", test)
    shutil.copy(images / "train" / "b" / "03.png", test / "b" / "copy.png")
    assert "1 of 16 test images" in overlap(open_source(train), open_source(str(test)))[0]
    result = evals.evaluate(run, train, train, metrics=("knn",), device="cpu")
    assert "30 of 30 test images" in result["warnings"][0]
    assert "WARNING: 30 of 30" in format_table(result)


def test_an_encoder_without_class_head_is_evaluated_by_the_mean_of_its_patches(run, images, tmp_path):
    define_torchvision_operators()
    pytest.importorskip("timm", reason="timm is not installed (extra: timm)")
    export(run, tmp_path / "vit", format="vit")
    result = evals.evaluate(tmp_path / "vit", str(images), metrics=("knn",), device="cpu")
    features = [(r["encoder"], r["feature"]) for r in result["rows"]]
    assert features[:2] == [("pretrained", "mean of patches"), ("random init", "mean of patches")]
    assert result["gain"].keys() == {"mean of patches"}
    assert "class token" not in format_table(result)


def test_images_are_found_from_another_folder_and_after_moving(run, cfg, images, tmp_path, monkeypatch):
    def evaluated(folder):
        return evals.evaluate(folder, metrics=("knn",), device="cpu")["counts"]["test"]

    data = dataclasses.replace(cfg.data, train="images/train", test="images/test")
    (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(cfg, data=data))))
    (tmp_path / "there").mkdir()
    shutil.copytree(images, tmp_path / "there" / "images")
    (run / "env.json").write_text(json.dumps({"cwd": str(tmp_path / "there")}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluated(run) == 15
    # what is no file itself: a pattern, a folder in an archive
    shutil.make_archive(str(tmp_path / "there/set"), "zip", tmp_path / "there")
    for train, test, start in (
        ("set.zip/images", "s[e]t.zip", f"{tmp_path}/there/"),
        ("no.zip/x", "no*.zip", ""),
    ):
        named = dataclasses.replace(cfg.data, train=train, test=test)
        (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(cfg, data=named))))
        found = subject.run_config(run).data
        assert (found.train, found.test) == (start + train, start + test)
    (run / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(cfg, data=data))))
    # run and images moved together
    (tmp_path / "there").rename(tmp_path / "moved")
    run.rename(tmp_path / "moved" / "run")
    assert evaluated(tmp_path / "moved" / "run") == 15
    shutil.rmtree(tmp_path / "moved" / "images")
    with pytest.raises(UsageError, match=r"--data: images/train: does not exist"):
        evaluated(tmp_path / "moved" / "run")


def test_the_images_held_out_of_training_are_the_test_images(run, cfg, images, tmp_path, caplog):
    data = dataclasses.replace(cfg.data, test="", holdout=0.3)
    changed = dataclasses.replace(cfg, data=data, train=dataclasses.replace(cfg.train, batch_size=4))
    (run / "config.json").write_text(json.dumps(to_dict(changed)))
    trained_on = open_train(changed)
    held = open_test(changed, trained_on)
    assert not set(trained_on.paths) & set(held.paths) and len(trained_on) + len(held) == 30
    result = evals.evaluate(run, metrics=("knn",), device="cpu")
    assert (result["counts"]["train"], result["counts"]["test"]) == (len(trained_on), len(held))
    assert result["holdout"] == 0.3 and not result["warnings"]

    def opened(train=None, test=None):
        given = zip(subject.resolve_data(changed, train, test), ("train", "test"), strict=True)
        return [set(open_source(s, split, holdout=share).paths) for (s, share), split in given]

    assert opened() == [set(trained_on.paths), set(held.paths)]
    # other test images: the same training images; other images of both kinds: all of them
    assert [len(s) for s in opened(test=str(images / "test"))] == [len(trained_on), 15]
    assert [len(s) for s in opened(str(images / "train"), str(images / "test"))] == [30, 15]
    assert [len(s) for s in opened(str(images))] == [30, 15]
    # moved
    shutil.copytree(images / "train", tmp_path / "moved")
    assert [len(s) for s in opened(str(tmp_path / "moved"))] == [len(trained_on), len(held)]


def test_images_of_exactly_the_size(run, images, cfg):
    # of the photographs' size, as CIFAR's: resized and cropped as by `preprocess`, whole with crop_pct 1
    new, whole = (evals.evaluate(run, metrics=("knn",), crop_pct=c) for c in (None, 1.0))
    assert new["indicators"] != whole["indicators"] and "resized to 1 / 0.875" in format_table(new)
    encoder = load_encoder(run)
    source = open_source(cfg.data.test)
    features = extract(encoder, source, cfg.data).cls
    image = pytest.importorskip("PIL.Image")
    with torch.no_grad():
        wanted = torch.cat([encoder(encoder.preprocess()(image.open(p))[None]) for p in source.paths])
    # Pillow's box of the resize may round one gray level away
    torch.testing.assert_close(features, wanted, rtol=0, atol=0.02)
    with pytest.raises(UsageError, match="crop_pct"):
        evals.evaluate(run, crop_pct=1.5)
    # weights of an older version, which took them whole: their table stays as it is
    file = run / "weights" / "step_00000007" / "config.json"
    meta = json.loads(file.read_text())
    del meta["input"]["crop_mode"]
    file.write_text(json.dumps(meta))
    old = evals.evaluate(run, metrics=("knn",))
    assert old["rows"] == whole["rows"] and old["indicators"] == whole["indicators"]
    assert "crop_pct" not in old and "taken whole" in format_table(old)
    assert evals.evaluate(run, metrics=("knn",), crop_pct=0.875)["indicators"] == new["indicators"]


@pytest.mark.parametrize(("side", "crop_pct"), [(32, 1.0), (24, 0.875)])
def test_a_run_on_images_of_its_size_takes_them_whole(cfg, side, crop_pct):
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, img_size=(side, side)))
    run = build(cfg, World(torch.device("cpu")), open_source(cfg.data.train))
    take_cropped_whole(run)
    assert run.method.teacher.crop_pct == run.method.student.crop_pct == crop_pct
