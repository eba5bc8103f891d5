"""The command line: one-line errors with the nearest name, precedence, --print-config, exit codes.

Covers: unknown command, preset, option and group; wrong types and choices; checks between fields; `_` and
`-`; preset < file < flags and where each value came from; the printed configuration reloads to itself; help
of every command, at once; the exit code and last words of each kind of end.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import extrema_fast
from extrema_fast import cli, train
from extrema_fast.cli import main
from extrema_fast.config import FINETUNE_PRESETS, flatten, from_dict, preset, to_dict
from extrema_fast.errors import DataError, NonFiniteError, StorageError, UsageError
from extrema_fast.evaluation import evaluate as evals

SMALL = [
    "--data.loader",
    "pil",
    "--model.width",
    "16",
    "--model.patch_size",
    "16",
    "--mask.ratio",
    "0.5",
    "--eval.every-epochs",
    "0",
]


@pytest.fixture(autouse=True)
def plain_logger():
    yield
    logger = logging.getLogger("extrema_fast")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def fails(capsys, *args: str) -> str:
    """The one line that a wrong command prints; exit code 2."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("extrema-fast: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("pretrian", "unknown command 'pretrian'; did you mean 'pretrain'?"),
        ("--overwrite", "the command comes first"),
        ("smoke --mask.views 2", "no command; to train with it: extrema-fast pretrain smoke --mask.views 2"),
        ("/ --mask.views 2", "no command; to train with it: extrema-fast pretrain / --mask.views 2"),
        ("pretrain potos", "unknown preset 'potos'; did you mean 'photos'?"),
        ("pretrain --preset smok", "unknown preset 'smok'; did you mean 'smoke'?"),
        ("pretrain photos --preset smoke", "two presets"),
        ("pretrain --mask.ration 0.5", "unknown option --mask.ration; did you mean --mask.ratio?"),
        ("pretrain --mask.ration=0.5", "unknown option --mask.ration; did you mean --mask.ratio?"),
        ("pretrain --lr 1", "did you mean --optim.base-lr or --optim.min-lr?"),
        ("pretrain --batch-size 8", "did you mean --train.batch-size or --eval.batch-size?"),
        ("pretrain --train.lr 1", "did you mean --optim.base-lr or --optim.min-lr?"),
        ("pretrain --mask.epochs 8", "did you mean --train.epochs?"),
        ("pretrain --data.workers 8", "--data.threads is the number of decoding threads"),
        ("pretrain --output x", "--out is the run folder"),
        ("pretrain --overwrit", "did you mean --overwrite?"),
        ("pretrain --zzz", "unknown option --zzz; see extrema-fast pretrain --help"),
        # abbreviations are not options
        ("pretrain --over", "unknown option --over"),
        ("pretrain --verbos", "did you mean --verbose?"),
        ("pretrain --quiet --verbose", "--verbose: not allowed with argument --quiet"),
        ("pretrain --resume", "the same command continues the run"),
        ("pretrain --knn 5", "evaluate RUN"),
        ("pretrain --data x", "it is a group: --data.train, "),
        ("pretrain --train.batch-size many", "--train.batch-size: expected a whole number, got 'many'"),
        ("evaluate x --temperature hot", "--temperature: expected a number, got 'hot'"),
        ("pretrain --train.batch-size", "--train.batch-size: expected one argument"),
        ("pretrain --head.loss byl", "head.loss: got 'byl'; did you mean 'byol'?"),
        ("pretrain --train.compile loss", "train.compile: 'loss' is called 'step' now; use step"),
        ("pretrain --data.area 0.5", "--data.area: expected 2 arguments"),
        ("pretrain --optim.base-lr nan", "optim.base_lr: expected a finite float, got nan"),
        ("pretrain --data.exif yes", "unexpected argument 'yes'"),
        (
            "pretrain --log.report false",
            "'false': --log.report takes no value, --log.no-report turns it off;",
        ),
        (
            "pretrain --log.report=false",
            "'false': --log.report takes no value, --log.no-report turns it off;",
        ),
        ("finetune x --log.report no", "'no': --log.report takes no value, --log.no-report turns it off;"),
        ("evaluate x --force yes", "unexpected argument 'yes': --force takes no value;"),
        ("pretrain --no-log.report", "unknown option --no-log.report; did you mean --log.no-report?"),
        ("pretrain --no_report", "did you mean --log.no-report?"),
        ("pretrain --log.tensorboard", "this option was removed: use log.tracker tensorboard"),
        ("pretrain --mask.ratio 0.5 photos", "a preset comes first"),
        ("pretrain --mask.ratio 1.5", "error: mask.ratio: expected 0 <= ratio < 1, got 1.5"),
        ("pretrain --mask.ratio 0.99", "keeps 0 of 64 tokens"),
        (
            "pretrain --mask.ratio 0.8 --mask.views 9",
            "9 disjoint views of 12 tokens need 108, the image has 64",
        ),
        ("pretrain --model.img-size 30 32", "nearest: 28 or 32"),
        ("pretrain --system.device gpu", "system.device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("pretrain --config missing.toml", "--config missing.toml: cannot be read"),
        ("pretrain --config", "--config: expected one argument"),
        ("evaluate", "RUN_OR_WEIGHTS"),
        ("embed a b --weigths c", "unknown option --weigths; did you mean --weights?"),
        ("pack a b --sise 8", "did you mean --size?"),
        # a variable of the shell that is not set: neither the default nor the current folder
        ("pretrain ''", "PRESET or IMAGES: expected a name, got an empty word"),
        ("pretrain smoke --out ''", "--out: expected a name, got an empty word"),
        ("pack a ''", "OUT: expected a name, got an empty word"),
        ("compare ''", "RUN: expected a name, got an empty word"),
        ("evaluate nowhere", "nowhere: no such file or folder; expected a run folder"),
        ("evaluate x --wich student", "unknown option --wich; did you mean --which?"),
        ("evaluate x --which both", "invalid choice: 'both'"),
        ("evaluate x --data a --train b", "give one"),
        ("knn x y", "unexpected argument 'y'"),
        ("probe x --k 3", "unknown option --k"),
        ("report nowhere", "nowhere: no such run folder"),
        ("import a.pth", "required: OUT"),
        ("import a.pth b", "a.pth: no such file"),
        ("encoders *bse*", "no encoder matches '*bse*'"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *shlex.split(args))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        *("evaluate runs/photo", "knn photo", "segment photo --data x", "report runs/photo", "replay photo"),
        *("compare runs/photo x", "embed a b --weights runs/photo", "visualize photo x.jpg"),
        *("export runs/photo out --format hf", "finetune photo --data synthetic"),
    ],
)
def test_a_misspelled_run(capsys, monkeypatch, tmp_path, args):
    (tmp_path / "runs/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "photo: no such file or folder; did you mean runs/photos?" in fails(capsys, *args.split())


def test_a_bad_file_names_the_key(capsys, tmp_path):
    for name, text, words in (
        ("c.txt", "[mask]\nration = 0.5", "mask.ration; did you mean 'mask.ratio'"),
        ("c.txt", "epochs = 5", "option epochs; did you mean 'train.epochs'"),
        ("c.txt", "[optim]\nlr = 5", "optim.lr; did you mean 'optim.base_lr' or 'optim.min_lr'"),
        ("c.txt", "[zzz]\na = 5", "option zzz; known: ckpt, data,"),
        ("c.txt", "train = 5\n'train.epochs' = 5", "train: expected a table of options, got 5"),
        ("c.txt", "a = [", "c.txt: not valid TOML"),
        ("c.txt", "train:\n  epochs: 3", "not valid TOML"),
        ("c.txt", '{"train": {"epochs": 3', "not valid JSON"),
        ("c.txt", '{"a":' * 100_000, "nested too deeply"),
        ("a.json", "{,}", "a.json: not valid JSON"),
        ("a.json", "[1]", "a.json: expected a table"),
        ("a.toml", 'preset = "phots"', "'phots'; did you mean 'photos'"),
        ("a.json", '{"optim": {"base_lr": 1e999}}', "optim.base_lr: "),
        (
            "a.toml",
            "[tune]\nema = 0.9",
            "a.toml: has the settings of a fine-tuning; use extrema-fast finetune",
        ),
        ("a.toml", b"\xff\xfe\x00", "a.toml: cannot be read"),
        (".", None, "cannot be read"),
    ):
        file = tmp_path / name
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert words in fails(capsys, "pretrain", "--config", str(file))


def print_config(capsys, *args: str) -> dict:
    assert main(["pretrain", *args, "--print-config"]) == 0
    return json.loads(capsys.readouterr().out)


def test_print_config_reloads_to_itself(capsys, tmp_path):
    shown = print_config(capsys, "smoke", "--mask.views", "3", "--out", str(tmp_path / "x"))
    file = tmp_path / "resolved.json"
    assert print_config(capsys, "paper_large_90x8")["config"] == to_dict(preset("paper_large_90x8"))
    for content, names in ((shown["config"], ["smoke", "photos"]), (shown, ["smoke", "photos", None])):
        file.write_text(json.dumps(content))
        for name in names:
            again = print_config(capsys, *([name] if name else []), "--config", str(file))
            assert again["config"] == shown["config"] and again["derived"] == shown["derived"]
    assert not (tmp_path / "x").exists()


def test_of_several_processes_the_first_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for args in ("pretrain smoke", "finetune none"):
        assert main([*args.split(), "--print-config"]) == 0
    assert capsys.readouterr() == ("", "")


def test_print_config_derives_and_names_sources(capsys, tmp_path):
    file = tmp_path / "c.toml"
    # a preset named on the command line goes before the file's own
    file.write_text('preset = "cifar10"\n"mask.views" = 2\n[train]\nbatch-size = 32\nepochs = 5\n')
    assert (
        print_config(capsys, "--config", str(file))["config"]["model"] == to_dict(preset("cifar10"))["model"]
    )
    shown = print_config(
        capsys, "smoke", "--config", str(file), "--train.epochs=7", "--data.exif", "--data.limit", "64"
    )
    assert shown["config"]["train"]["batch_size"] == 32 and shown["config"]["train"]["epochs"] == 7
    assert shown["config"]["data"]["exif"] is True
    want = {"train.batch_size": "file", "train.epochs": "flag", "mask.ratio": "preset smoke"}
    want |= {"data.exif": "flag", "data.limit": "flag"}
    want |= {"mask.views": "preset smoke"}
    assert {k: shown["sources"].get(k) for k in want} == want
    assert "optim.eps" not in shown["sources"]
    derived = shown["derived"]
    assert derived["num_keep"] == 4 and derived["grid"] == [4, 4] and derived["local_batch"] == 32
    assert derived["peak_lr"] == pytest.approx(1.5e-4 * 32 / 256)


@pytest.fixture
def given(monkeypatch) -> dict:
    """What `pretrain` the function is called with."""
    seen: dict = {}

    def record(cfg, **options):
        seen.update(options, cfg=cfg)
        return Path(cfg.out)

    monkeypatch.setattr(train, "pretrain", record)
    return seen


def test_flags_reach_the_function(given):
    flags = "--train.batch_size 8 --mask.ratio=0.5 --init_from w --overwrite --allow-config-change --quiet"
    flags += " --data.area 0.5 1 --data.no-exif --system.deterministic"
    assert main(["pretrain", "smoke", *flags.split()]) == 0
    want = {"train": {"batch_size": 8}, "mask": {"ratio": 0.5}, "system": {"deterministic": True}}
    want["data"] = {"area": [0.5, 1.0]}
    assert given.pop("cfg") == from_dict(want, preset("smoke"))
    assert given.pop("preset") == ("smoke", preset("smoke"))
    assert given == {"init_from": "w", "overwrite": True, "allow_config_change": True, "progress": False}


def test_photos_is_the_default(given):
    assert main(["pretrain"]) == 0
    assert given["cfg"] == preset("photos")
    assert main(["pretrain", "--preset", "paper-base-80x5"]) == 0
    assert given["cfg"] == preset("paper_base_80x5")


def test_a_file_may_choose_the_preset(given, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"preset": "smoke", "train": {"seed": 3}}))
    assert main(["pretrain", "--config", str(file)]) == 0
    assert given["cfg"] == from_dict({"train": {"seed": 3}}, preset("smoke"))
    assert main(["pretrain", "cifar10", "--config", str(file)]) == 0
    assert given["cfg"].out == preset("cifar10").out and given["cfg"].train.seed == 3


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_has_an_example(capsys, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    if name is None:
        assert main([]) == 0
    else:
        # the one is the other
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["help", name] if name == "embed" else [name, "--help"])
    text = capsys.readouterr().out
    assert "example" in text and "extrema-fast" in text
    assert name is None or ("--quiet" in text and "--verbose" in text)
    assert max(map(len, text.splitlines())) <= 80
    if name == "pretrain":
        assert "--overwrite" in text and "--mask.ratio" in text and "paper_base_80x5" in text
    if name == "finetune":
        text = " ".join(text.split())
        assert "(now: True; --log.no-report turns it off)" in text and "mask: " not in text
        assert "--tune.mixup FLOAT Mixup alpha; 0: off." in text and "(now: that of the weights)" in text
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["finetune", "anything", "--preset", "paper", "--help"])
        paper = " ".join(capsys.readouterr().out.split())
        for values, shown in ((FINETUNE_PRESETS["small"](), text), (FINETUNE_PRESETS["paper"](), paper)):
            assert (
                f"(now: {values.optim.base_lr:.4g})" in shown
                and f"(now: {values.tune.layer_decay:.4g})" in shown
            )


def test_lists_and_settings_need_no_torch():
    code = (
        "import sys; from extrema_fast.cli import main; main(['encoders']); main(['pretrain', '--print-config']);"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_every_option_needs_no_torch_and_shows_the_presets_values():
    code = (
        "import sys; from extrema_fast.cli import main; main(['pretrain', 'smoke', '--help']);"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for option in flatten(preset("smoke")):
        assert f"--{option.replace('_', '-')} " in text
    assert all(action.help for action in cli._add_dotted(cli._Parser("pretrain")).values())
    assert "(now: runs/smoke)" in text and "Fraction of the tokens" in text and "(now: 0.2 1)" in text
    assert "(now: True; --log.no-report turns it off)" in text and text.count("turns it off") == 1


def test_version():
    done = subprocess.run([sys.executable, "-m", "extrema_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"extrema-fast {extrema_fast.__version__}")


@pytest.mark.parametrize(
    ("option", "rank", "level"),
    [
        (None, "0", logging.INFO),
        ("--quiet", "0", logging.WARNING),
        ("--verbose", "0", logging.DEBUG),
        ("--verbose", "1", logging.WARNING),
    ],
)
def test_quiet_and_verbose_set_the_level_of_the_packages_logger(monkeypatch, capsys, option, rank, level):
    monkeypatch.setenv("RANK", rank)
    assert main(["encoders", *([option] if option else [])]) == 0
    assert logging.getLogger("extrema_fast").level == level and "extrema_vit_base" in capsys.readouterr().out


def test_encoders(capsys):
    assert main(["encoders", "*base*"]) == 0
    assert capsys.readouterr().out == "extrema_vit_base_patch16_224\n"


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError, 2), (NonFiniteError, 3), (DataError, 4), (StorageError, 5)]
)
def test_exit_codes(capsys, monkeypatch, error, code):
    def fail(*args, **options):
        raise error("so\nit is")

    monkeypatch.setattr(train, "pretrain", fail)
    assert main(["pretrain", "smoke"]) == code
    assert capsys.readouterr().err == "extrema-fast: error: so it is\n"


def test_a_message_of_any_length_is_shown_short_with_its_remedy(capsys, monkeypatch):
    def fail(*args, **options):
        raise UsageError(f"file: {'a' * 100_000}; use another")

    monkeypatch.setattr(train, "pretrain", fail)
    assert main(["pretrain", "smoke"]) == 2
    err = capsys.readouterr().err
    assert (
        len(err) < 4000 and err.startswith("extrema-fast: error: file: a") and err.endswith("; use another\n")
    )


def test_memory_that_nobody_expected_to_lack(capsys, monkeypatch):
    # of this size none is allocated
    monkeypatch.setattr(train, "pretrain", lambda *args, **options: torch.empty(2**60, dtype=torch.uint8))
    assert main(["pretrain", "smoke"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("extrema-fast: error: not enough memory") and err.count("\n") == 1


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(train, "pretrain", lambda *args, **options: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(["pretrain", "smoke"])


def test_stopped_continued_and_complete(capsys, monkeypatch, tmp_path):
    args = ["pretrain", "smoke", *SMALL, "--out", str(tmp_path / "my run")]
    original, at = train.train_step, {2: signal.SIGTERM, 4: signal.SIGINT}

    def stopping(run, batch):
        if run.step in at:
            os.kill(os.getpid(), at.pop(run.step))
        return original(run, batch)

    monkeypatch.setattr(train, "train_step", stopping)
    for step in (3, 5):
        assert main(args) == 75
        err = capsys.readouterr().err
        assert f"after step {step} of 8" in err and "my run'" in err
        assert "to continue: extrema-fast pretrain smoke" in err
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "continuing at step 5 of 8" in err and "step 8/8" in out and "complete" in out
    assert main(args) == 0
    assert "the run is complete" in capsys.readouterr().err
    assert "mask.ratio: 0.5 -> 0.7" in fails(capsys, *args, "--mask.ratio", "0.7")


@pytest.mark.parametrize(
    ("function", "args", "code", "shown"),
    [
        # a second one: a run saves at the first
        (
            "train.pretrain",
            "pretrain smoke",
            130,
            "interrupted; the same command continues from what it has kept",
        ),
        ("tools.index.index", "index a --out b", 75, "to continue: extrema-fast index a --out b"),
        ("tools.pack.pack", "pack a b", 75, "to continue: extrema-fast pack a b"),
        ("tools.embed.embed", "embed a b --weights c", 75, "to continue: extrema-fast embed a b --weights c"),
        ("tools.search.search", "search a b", 130, "extrema-fast: interrupted\n"),
        ("evaluation.evaluate.evaluate", "knn a", 130, "extrema-fast: interrupted\n"),
    ],
)
def test_interrupt(capsys, monkeypatch, function, args, code, shown):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"extrema_fast.{function}", interrupted)
    assert main(args.split()) == code
    err = capsys.readouterr().err
    assert shown in err and ("continue" in err) == (shown != "extrema-fast: interrupted\n")


def test_dry_run(capsys, tmp_path):
    assert main(["pretrain", "smoke", *SMALL, "--dry-run", "--quiet", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for word in ("step_ms", "tokens_per_image", "gflops_per_image", "checkpoint_mb", "memory_gb", "lr"):
        assert word in out
    assert not (tmp_path / "run").exists()
    missing = tmp_path / "no.pth"
    args = ["pretrain", "smoke", *SMALL, "--dry-run", "--quiet", "--init-from", str(missing)]
    assert str(missing) in fails(capsys, *args)


def test_evaluate_passes_options_on(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(evals, "evaluate", lambda **options: seen.update(options) or {})
    assert main(["knn", "run", "--data", "d", "--max_train", "9", "--k", "3", "--json"]) == 0
    want = {"path": "run", "train": "d", "test": None, "metrics": ("knn",), "max_train": 9, "k": 3}
    assert {k: seen[k] for k in want} == want
    assert capsys.readouterr().out == "{}\n"
