"""The command line: parses, calls one Python function, prints its result.

    pretrain -> train.pretrain    evaluate, knn, probe -> evals    report -> report.report
    import -> convert.import_released    export -> export.export    encoders -> encoder.list_models
    index -> index.index    pack -> pack.pack    embed -> embed.embed    search -> search.search
    kernels -> ops.choices, kernels.listing    tune -> kernels.tune    profile -> profile.profile

Errors a user can act on are one line on standard error; the exit code is the error's own.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from . import __version__
from .config import PRESETS, Config, did_you_mean, flatten, load_config, preset, to_dict
from .errors import ExtremaError, Preempted, UsageError
from .training.memory import ask_for_huge_pages

log = logging.getLogger(__name__)

PROG = "extrema-fast"
INSTALL = 'pip install "extrema-fast[train]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0, or an ExtremaError's; 130 after a second Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    ask_for_huge_pages()
    try:
        return _dispatch(args)
    except Preempted as error:
        _say(f"{PROG}: {error}\nto continue: {PROG} {shlex.join(args)}")
        return error.exit_code
    except ExtremaError as error:
        _say(f"{PROG}: error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        _say(f"\n{PROG}: interrupted; the same command continues from what it has kept")
        return 130
    except BrokenPipeError:
        # the reader (head, less) has left; what Python still holds goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _dispatch(args: list[str]) -> int:
    if args and args[0] in ("--version", "-V"):
        print(f"{PROG} {__version__}")
        return 0
    if not args or args[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        if name.startswith("-"):
            raise UsageError(f"unknown option {name}; the command comes first, see {PROG} --help")
        raise UsageError(f"unknown command {name!r}{did_you_mean(name, list(COMMANDS))}")
    COMMANDS[name][0](rest)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {text}" for name, (_, text, _) in COMMANDS.items()]
    lines += ["", "examples:"] + [f"  {PROG} {example}" for _, _, example in COMMANDS.values()]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help shows the options of one; --version the version"])


# ---- parsing ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, with the nearest option for an unknown one."""

    def __init__(self, name: str) -> None:
        _, text, example = COMMANDS[name]
        super().__init__(
            prog=f"{PROG} {name}",
            description=text,
            epilog=f"example:\n  {PROG} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_all(self, args: list[str]) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(dashed(args))
        for word in rest:
            if word.startswith("-"):
                known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
                raise _unknown(word, known, self.prog)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed


def dashed(args: Sequence[str]) -> list[str]:
    """Option names with `-` for `_`; values stay as they are."""
    out = []
    for word in args:
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return out


def _unknown(word: str, known: Sequence[str], prog: str) -> UsageError:
    name = word.partition("=")[0]
    bare = name.strip("-")
    # the group left out: every option that ends so
    near = [k for k in known if k.endswith(f".{bare}")] or difflib.get_close_matches(name, known, n=1)
    # `--lr` is far from `--optim.base-lr` by letters, but is a word of it
    near = near or [k for k in known if bare in k.rpartition(".")[2].split("-")]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown option {name}{hint or f'; see {prog} --help'}")


def _set_up_logging(quiet: bool) -> None:
    class Stderr(logging.StreamHandler):
        # looked up for every line: a progress bar puts itself in the place of sys.stderr
        stream = property(lambda self: sys.stderr, lambda self, value: None)  # type: ignore[assignment]

    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    logger = logging.getLogger("extrema_fast")
    logger.setLevel(logging.WARNING if quiet or not first else logging.INFO)
    if not any(getattr(h, "_ours", False) for h in logger.handlers):
        handler = Stderr()
        handler._ours = True  # type: ignore[attr-defined]
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


# ---- commands with a configuration -----------------------------------------------------------------


class _Configured(NamedTuple):
    """A parsed command line: its own options, the configuration, and where that came from."""

    ours: argparse.Namespace
    cfg: Config
    name: str
    """preset"""
    base: Config
    """of the preset"""
    before: Config
    """with the --config file, without flags"""
    flags: list[str]
    """dotted"""


def _config_parser(name: str) -> _Parser:
    p = _Parser(name)
    p.usage = f"{PROG} {name} [PRESET] [options] [--dotted.option VALUE ...]"
    p.add_help = False
    p.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; default photos")
    p.add_argument("--config", metavar="FILE", help="TOML or JSON over the preset")
    return p


def _configure(p: _Parser, args: list[str]) -> _Configured | None:
    """Preset, file and dotted flags beside the options of `p`; None once --help has been printed."""
    args = dashed(args)
    # a preset by position comes first: later words may be values of dotted options
    by_position = args.pop(0) if args and not args[0].startswith("-") else None
    ours, rest = p.parse_known_args([a for a in args if a not in ("-h", "--help")])
    if by_position and ours.preset and by_position != ours.preset:
        raise UsageError(f"two presets, {by_position!r} and {ours.preset!r}; give one")
    name = by_position or ours.preset
    chosen = preset(name) if name else None
    before = load_config(ours.config, chosen) if ours.config else chosen or preset("photos")
    known = [s for a in p._actions for s in a.option_strings if s.startswith("--") and s != "--help"]
    if len(rest) < len(args) and {"-h", "--help"} & set(args):
        print(p.format_help() + "\ndotted options, with this preset's values:\n")
        _tyro(before, ["--help"], known, p.prog)
        return None
    cfg = _tyro(before, rest, known, p.prog)
    return _Configured(ours, cfg, name or "photos", chosen or preset("photos"), before, rest)


def _pretrain(args: list[str]) -> None:
    p = _config_parser("pretrain")
    p.add_argument("--init-from", metavar="PATH", help="weights to start from at step 0 (run, weights, .pth)")
    p.add_argument("--overwrite", action="store_true", help="move the run in --out aside and start anew")
    p.add_argument("--allow-config-change", action="store_true", help="continue a run with changed settings")
    p.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    p.add_argument("--dry-run", action="store_true", help="three real steps, nothing written")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    given = _configure(p, args)
    if given is None:
        return
    ours, cfg = given.ours, given.cfg
    _set_up_logging(ours.quiet)
    if ours.print_config:
        print(json.dumps(_resolved(given), indent=1))
    elif ours.dry_run:
        from .tools.dry_run import dry_run
        from .training.plan import describe

        print(describe(dry_run(cfg)))
    else:
        from .train import pretrain

        pretrain(
            cfg,
            init_from=ours.init_from,
            overwrite=ours.overwrite,
            allow_config_change=ours.allow_config_change,
            progress=not ours.quiet,
        )


def _tyro(base: Config, args: list[str], ours: Sequence[str], prog: str) -> Config:
    """`base` with dotted flags applied; raises UsageError in one line, with options in `ours` known too."""
    try:
        import tyro
    except ImportError:
        raise UsageError(f"the command line needs tyro, which is not installed; {INSTALL}") from None
    known = []
    for option, value in flatten(base).items():
        group, _, leaf = option.replace("_", "-").rpartition(".")
        prefix = f"--{group}." if group else "--"
        known += [prefix + leaf] + ([f"{prefix}no-{leaf}"] if isinstance(value, bool) else [])
    for word in args:
        if word.startswith("--") and word.partition("=")[0] not in [*known, "--help"]:
            raise _unknown(word, [*known, *ours], prog)
    if args == ["--help"]:
        with contextlib.suppress(SystemExit):
            tyro.cli(Config, default=base, args=args, prog=prog)
        return base
    printed = io.StringIO()
    width = os.environ.get("COLUMNS")
    # its message comes in a box as wide as the terminal; a wide one keeps it on one line
    os.environ["COLUMNS"] = "2000"
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(Config, default=base, args=args, prog=prog)
    except SystemExit:
        raise UsageError(_message(printed.getvalue(), prog)) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _message(box: str, prog: str) -> str:
    """The sentence inside tyro's error box."""
    lines = [line.strip(" │╭╮╰╯┃|") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-─━")]
    inside = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    text = " ".join(line for line in inside if line)
    for prefix in ("Error parsing Config: ", "Error parsing "):
        text = text.removeprefix(prefix)
    group, _, after = text.partition(": ")
    if after.startswith(f"{group}."):
        text = after
    if text.startswith("Unrecognized options: "):
        text += f"; a preset comes first: {prog} PRESET [options]"
    return text


def _resolved(given: _Configured) -> dict[str, Any]:
    """What --print-config shows; `config` alone reloads through --config."""
    _, cfg, name, base, before, flags = given
    from .data.sources import open_source
    from .distributed import detect
    from .training.plan import derived

    try:
        images = len(open_source(cfg.data.train, limit=cfg.data.limit, seed=cfg.train.seed))
        problem = None
    except ExtremaError as error:
        images, problem = None, str(error)
    typed = {f.partition("=")[0].lstrip("-").replace("-", "_").replace(".no_", ".") for f in flags}
    defaults, of_preset, of_file = (flatten(c) for c in (Config(), base, before))
    sources = {}
    for option, value in flatten(cfg).items():
        if option in typed:
            sources[option] = "flag"
        elif of_file[option] != of_preset[option]:
            sources[option] = "file"
        elif value != defaults[option]:
            sources[option] = f"preset {name}"
    values = derived(cfg, detect(os.environ)[1], images)
    if problem:
        values["images_problem"] = problem
    return {"preset": name, "config": to_dict(cfg), "derived": values, "sources": sources}


def _profile(args: list[str]) -> None:
    p = _config_parser("profile")
    p.add_argument("--out", metavar="FOLDER", help="where the trace goes (default: runs/profile_PRESET)")
    p.add_argument("--steps", type=int, default=3, metavar="N", help="steps profiled (default 3)")
    p.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before (default 5)")
    p.add_argument("--synthetic", action="store_true", help="random pictures from memory, no data set")
    p.add_argument("--json", action="store_true", help="print the whole result as JSON")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    given = _configure(p, args)
    if given is None:
        return
    ours, cfg, synthetic = given.ours, given.cfg, given.ours.synthetic
    _set_up_logging(ours.quiet)

    from .data.sources import BUILT_IN
    from .tools import profile

    train = cfg.data.train
    if train == given.base.data.train and train not in BUILT_IN and not Path(train).expanduser().exists():
        # where a preset expects its data set is a guess; a place the user has named is not
        log.info("no images at %s: random pictures from memory (real ones: --data.train DIR)", train)
        synthetic = True
    out = ours.out or f"runs/profile_{given.name.replace('-', '_')}"
    result = profile.profile(cfg, out, steps=ours.steps, warmup=ours.warmup, synthetic=synthetic)
    if ours.json:
        print(json.dumps(result, indent=1))
        return
    print(profile.describe(result))
    print(f"{out}: trace.json.gz (ui.perfetto.dev), profile.json, profile.txt")


# ---- the other commands ----------------------------------------------------------------------------


def _evaluate(name: str) -> Callable[[list[str]], None]:
    def command(args: list[str]) -> None:
        p = _Parser(name)
        p.add_argument("path", metavar="RUN_OR_WEIGHTS", help="run folder, weights folder or released .pth")
        p.add_argument(
            "--data", metavar="DIR", help="folder with train/ and test/ or val/; default: the run's"
        )
        p.add_argument("--train", metavar="DIR", help="labelled images to learn from")
        p.add_argument("--test", metavar="DIR", help="labelled images to be judged on")
        p.add_argument("--out", metavar="FILE", help="JSON result; default in a run: reports/evaluation.json")
        p.add_argument("--which", choices=("teacher", "student"), default="teacher")
        p.add_argument("--max-train", type=int, default=0, metavar="N", help="use N training images (0: all)")
        p.add_argument("--max-test", type=int, default=0, metavar="N")
        if name != "probe":
            p.add_argument("--k", type=int, help="neighbours (default: the run's, 20)")
            p.add_argument("--temperature", type=float, help="of the votes (default: the run's, 0.07)")
        p.add_argument("--batch-size", type=int)
        p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--force", action="store_true", help="measure again although nothing has changed")
        p.add_argument("--json", action="store_true", help="print the whole result as JSON")
        options = vars(p.parse_all(args))
        _set_up_logging(False)
        as_json, path, data = options.pop("json"), options.pop("path"), options.pop("data")
        if data is not None and options["train"] is not None:
            raise UsageError("--data and --train name the same thing; give one")
        options["train"] = data if data is not None else options["train"]

        from .evaluation import evaluate as evals

        function = {"evaluate": evals.evaluate, "knn": evals.knn_command, "probe": evals.probe_command}[name]
        result = function(path, options.pop("train"), options.pop("test"), **options)
        print(json.dumps(result, indent=1) if as_json else evals.format_table(result))

    return command


def _report(args: list[str]) -> None:
    p = _Parser("report")
    p.add_argument("run", metavar="RUN", help="run folder")
    p.add_argument("--images", type=int, default=8, metavar="N", help="test images shown (0: none)")
    options = p.parse_all(args)
    _set_up_logging(False)
    from .reporting.report import report

    print(report(options.run, images=options.images))


def _import(args: list[str]) -> None:
    p = _Parser("import")
    p.add_argument("file", metavar="FILE", help="released ExtreMA checkpoint (.pth), or bare encoder weights")
    p.add_argument("out", metavar="OUT", help="new weights folder")
    p.add_argument("--which", choices=("teacher", "student"), help="keep one network (default: both)")
    p.add_argument("--grid", type=int, nargs=2, metavar=("R", "C"), help="of a learned table not square")
    p.add_argument("--num-heads", type=int, metavar="N", help="default: width / 64")
    p.add_argument("--force", action="store_true", help="replace an earlier import or export at OUT")
    options = vars(p.parse_all(args))
    _set_up_logging(False)
    from .weights.load import import_released

    print(import_released(options.pop("file"), options.pop("out"), **options))


def _export(args: list[str]) -> None:
    p = _Parser("export")
    p.add_argument("weights", metavar="WEIGHTS", help="run, weights folder, weights file or released .pth")
    p.add_argument("out", metavar="OUT", help="new folder")
    p.add_argument("--format", default="extrema", help="extrema (= timm, default), vit, hf, onnx, "
                   "torch-export")  # fmt: skip
    p.add_argument("--which", choices=("teacher", "student"), help="default: teacher")
    p.add_argument("--img-size", type=int, nargs="+", metavar="PIXELS", help="another size: side, or H W")
    p.add_argument("--fc-norm", action="store_true", default=None, help="vit, hf: fresh norm after pooling")
    p.add_argument("--class-token", action="store_true", help="hf: whole encoder; loads with extrema_fast")
    p.add_argument("--opset", type=int, metavar="N", help="onnx: operator set (default 18)")
    p.add_argument("--force", action="store_true", help="replace an earlier import or export at OUT")
    options = vars(p.parse_all(args))
    _set_up_logging(False)
    size = options.pop("img_size")
    if size is not None and len(size) > 2:
        raise UsageError(f"--img-size: expected one side, or height and width, got {len(size)} numbers")
    from .weights.export import export

    result = export(
        options.pop("weights"), options.pop("out"), img_size=size[0] if size and len(size) == 1 else size,
        **options,
    )  # fmt: skip
    print(f"{result.folder}: {', '.join(result.files)}")
    for check, difference in result.differences.items():
        print(f"  {check}: largest difference {difference:.1e}")


def _embed(args: list[str]) -> None:
    p = _Parser("embed")
    p.add_argument("data", metavar="DATA", help="folder, list file, shards, manifest, or photos")
    p.add_argument("out", metavar="OUT", help="folder for the features; the same command again continues")
    p.add_argument(
        "--weights", required=True, metavar="PATH", help="run folder, weights folder or released .pth"
    )
    p.add_argument("--which", choices=("teacher", "student"), default="teacher")
    p.add_argument("--tokens", default="class", metavar="KIND", help="class (default), mean or patch")
    p.add_argument("--no-norm", dest="norm", action="store_false", help="before the final LayerNorm")
    p.add_argument("--dtype", default="fp32", metavar="TYPE", help="fp32 (default), fp16 or bf16")
    p.add_argument("--format", default="npy", metavar="NAME", help="npy (default), parquet or safetensors")
    p.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width")
    p.add_argument(
        "--keep-ratio", type=float, default=1.0, metavar="R", help="encode a random share of patches"
    )
    p.add_argument("--batch-size", type=int, metavar="N", help="images at a time (32 on a CPU, 256 on a GPU)")
    p.add_argument("--part-images", type=int, metavar="N", help="images per file (about 1024)")
    p.add_argument("--split", choices=("train", "test"), default="train", help="of a built-in image set")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="a random N of the images (0: all)")
    p.add_argument("--loader", choices=("auto", "dali", "pil"), default="auto")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="decoding threads (0: the cores)")
    p.add_argument("--exif", action="store_true", help="rotate by the EXIF tag")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    p.add_argument("--force", action="store_true", help="replace features of other settings in OUT")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    options = vars(p.parse_all(args))
    quiet = options.pop("quiet")
    _set_up_logging(quiet)
    options["img_size"] = _size(options["img_size"])

    from .tools.embed import describe, embed

    result = embed(
        options.pop("data"), options.pop("out"), options.pop("weights"), progress=not quiet, **options
    )
    if os.environ.get("RANK", "0") == "0":
        print(describe(result))


def _pack(args: list[str]) -> None:
    p = _Parser("pack")
    p.add_argument("data", metavar="MANIFEST", help="made by index; or any images: folder, list, shards")
    p.add_argument("out", metavar="OUT", help="folder for the shards; the same command again continues")
    p.add_argument(
        "--size", type=int, default=256, metavar="N", help="pixels (default 256); 0: bytes as they are"
    )
    p.add_argument("--side", choices=("short", "long"), default="short", help="the side that becomes --size")
    p.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEG files (default 90)")
    p.add_argument("--shard-mb", type=float, default=512, metavar="MB", help="size of a shard (default 512)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the shuffle")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    p.add_argument(
        "--max-bad", type=float, default=0.01, metavar="SHARE", help="unreadable images (default 0.01)"
    )
    p.add_argument("--force", action="store_true", help="move what is in OUT aside and start anew")
    p.add_argument(
        "--no-measure", dest="measure", action="store_false", help="do not measure the loader's rate"
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    options = vars(p.parse_all(args))
    quiet, as_json = options.pop("quiet"), options.pop("json")
    _set_up_logging(quiet)

    from .tools.pack import describe, pack

    result = pack(options.pop("data"), options.pop("out"), progress=not quiet, **options)
    print(json.dumps(result, indent=1) if as_json else describe(result))


def _size(sides: list[int] | None) -> int | tuple[int, int] | None:
    if sides is None or len(sides) == 1:
        return sides and sides[0]
    if len(sides) != 2:
        raise UsageError(f"--img-size: expected a side, or height and width, got {len(sides)} numbers")
    return sides[0], sides[1]


def _search(args: list[str]) -> None:
    p = _Parser("search")
    p.add_argument("query", metavar="QUERY", help="an image, a path in the index, or images as for embed")
    p.add_argument("index", metavar="INDEX", help="features made by embed")
    p.add_argument(
        "--k", type=int, metavar="N", help="images found for each query (default 10, if there are)"
    )
    p.add_argument("--out", metavar="FILE.png", help="a picture: each query with what was found")
    p.add_argument("--weights", metavar="PATH", help="where the weights of the index are now")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--force", action="store_true", help="replace a file in --out that is no earlier picture")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    options = vars(p.parse_all(args))
    _set_up_logging(quiet=True)
    as_json = options.pop("json")

    from .tools.search import format_table, search

    result = search(options.pop("query"), options.pop("index"), **options)
    print(json.dumps(result, indent=1) if as_json else format_table(result))


def _index(args: list[str]) -> None:
    p = _Parser("index")
    p.add_argument("data", metavar="DATA", help="folder, list file, shards, or a manifest to check again")
    p.add_argument(
        "--out", required=True, metavar="M.tsv", help="the manifest; the same command again continues"
    )
    p.add_argument("--strict", action="store_true", help="Pillow, too, has to decode each image")
    p.add_argument("--threads", type=int, metavar="N", help="images decoded at a time (default: the cores)")
    p.add_argument(
        "--max-pixels", type=int, metavar="N", help="larger images are not good (default: 178956970)"
    )
    p.add_argument("--force", action="store_true", help="replace another file in --out, look at all again")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.add_argument("--quiet", action="store_true", help="warnings, errors and the result only")
    options = {k: v for k, v in vars(p.parse_all(args)).items() if v is not None}
    quiet, as_json = options.pop("quiet"), options.pop("json")
    _set_up_logging(quiet)

    from .tools.index import describe, index

    result = index(options.pop("data"), options.pop("out"), progress=not quiet, **options)
    troubles = [t._asdict() for t in result.troubles]
    print(json.dumps(result._asdict() | {"troubles": troubles}, indent=1) if as_json else describe(result))


def _encoders(args: list[str]) -> None:
    p = _Parser("encoders")
    p.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern")
    options = p.parse_all(args)
    from .models.encoder import list_models

    names = list_models(options.pattern)
    if not names:
        raise UsageError(
            f"no encoder matches {options.pattern!r}{did_you_mean(options.pattern, list_models())}"
        )
    print("\n".join(names))


def _kernels(args: list[str]) -> None:
    p = _Parser("kernels")
    p.add_argument("--device", metavar="DEVICE", help="cuda or cpu (default: cuda where there is one)")
    p.add_argument("--json", action="store_true", help="as JSON")
    options = p.parse_all(args)
    import torch

    from .kernels import listing
    from .ops import dispatch as ops

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device: {device!r} is no device; use cpu or cuda") from None
    rows, chosen = listing.describe(device), ops.choices(device)
    if options.json:
        print(json.dumps({"device": device, "kernels": rows, "choices": chosen}, indent=1))
        return
    print(listing.headline(device))
    for row in rows:
        print(f"\n{row['op']} (version {row['version']}): {row['summary']}")
    print(f"\nchosen on {device}:")
    width = max(map(len, chosen))
    for op, c in chosen.items():
        names = ", ".join(ops.IMPLEMENTATIONS[op])
        print(f"  {op:<{width}}  {c['implementation']}: {c['reason']} (of {names})")


def _tune(args: list[str]) -> None:
    from .kernels import tune

    code = tune.main(args)
    if code:
        raise SystemExit(code)


# name -> (function, what it does, example)
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, str]] = {
    "pretrain": (
        _pretrain,
        "pretrain on images, or continue the run in --out",
        "pretrain photos --train.epochs 80 --out runs/longer",
    ),
    "evaluate": (
        _evaluate("evaluate"),
        "k-NN and linear probe beside a random encoder and raw pixels",
        "evaluate runs/photos",
    ),
    "knn": (_evaluate("knn"), "k-NN alone", "knn runs/cifar10 --data cifar10"),
    "probe": (
        _evaluate("probe"),
        "linear probe alone",
        "probe runs/cifar10 --train cifar10/train --test cifar10/test",
    ),
    "report": (_report, "write reports/report.html of a run", "report runs/photos"),
    "index": (
        _index,
        "decode every image once and list the good and the bad ones in a manifest, which training reads",
        "index imagenet/train --out imagenet.tsv",
    ),
    "pack": (
        _pack,
        "shuffled tar shards of smaller images, for fast reading",
        "pack images.tsv packed --size 256",
    ),
    "embed": (
        _embed,
        "features of every image: class token, mean or patch tokens, as files",
        "embed photos features --weights runs/photos",
    ),
    "search": (
        _search,
        "the nearest images by features, with a picture",
        "search query.jpg features --k 8 --out found.png",
    ),
    "import": (
        _import,
        "convert a released ExtreMA checkpoint into a weights folder",
        "import extrema_base.pth weights/extrema_base",
    ),
    "export": (
        _export,
        "write an encoder for timm, Hugging Face, ONNX or torch.export, checked on the way out",
        "export runs/photos exported/photos --format onnx",
    ),
    "encoders": (_encoders, "list the encoder names", "encoders '*base*'"),
    "kernels": (_kernels, "list the ops, what runs on this machine and why", "kernels --device cuda"),
    "profile": (
        _profile,
        "trace a few steps and show where their time goes",
        "profile paper_small_80x5 --train.batch-size 16 --steps 3",
    ),
    "tune": (_tune, "measure launch settings of the Triton kernels on this GPU", "tune --op short_attention"),
}
