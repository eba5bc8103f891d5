"""The command line: each command parses its options, calls one Python function and prints the result.

Errors that a user can fix are printed as one line on standard error, and set the exit code. torch is not imported
until a command needs it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from . import __version__, config
from .config import (
    FINETUNE_PRESETS,
    NOT_TUNED,
    PRESETS,
    Config,
    FinetuneConfig,
    did_you_mean,
    flatten,
    from_dict,
    near_options,
    nested,
    preset,
    read_config,
    to_dict,
)
from .errors import (
    ExtremaError,
    OutOfMemoryError,
    Preempted,
    StorageError,
    UsageError,
    is_out_of_memory,
    is_storage_error,
    of_storage,
    one_line,
    printable,
)
from .signals import Stopped, watched

log = logging.getLogger(__name__)

PROG = "extrema-fast"
# commands that continue; those of a run handle a first signal themselves
_RUNS, _CONTINUED = ("pretrain", "finetune"), ("index", "pack", "embed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: command-line arguments; None: `sys.argv`. In that case a signal ends the process without waiting for
            threads.

    Returns:
        The exit code: 0, that of the ExtremaError, or 128 + the number of the signal.
    """
    with watched():
        code = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None and code > 128:
        os._exit(code)
    return code


def _run(args: list[str]) -> int:
    # use huge pages for CPU tensors, if available; torch reads this at its first allocation
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # run ops without an MPS kernel on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    try:
        try:
            _dispatch(args)
        finally:
            _flush()
        return 0
    except Preempted as error:
        if _is_first():
            _say(f"{PROG}: {error}\nto continue: {PROG} {shlex.join(args)}")
        return error.exit_code
    except ExtremaError as error:
        return _fail(error)
    except KeyboardInterrupt as error:
        command = args[0] if args else ""
        if command in _CONTINUED:
            if _is_first():
                _say(f"\n{PROG}: interrupted; finished work is kept\nto continue: {PROG} {shlex.join(args)}")
            return Preempted.exit_code
        how = str(error) if isinstance(error, Stopped) else "interrupted"
        _say(f"\n{PROG}: {how}" + "; the same command continues from what it has kept" * (command in _RUNS))
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    except BrokenPipeError:
        # the reader (head, less) has exited
        return 0
    # not converted by any caller
    except OSError as error:
        return _fail(of_storage(error))
    except Exception as error:
        if is_out_of_memory(error):
            what = "not enough memory for this; use less at a time, or a larger machine"
            return _fail(OutOfMemoryError(f"{what} ({one_line(error) or 'MemoryError'})"))
        if not is_storage_error(error):
            raise
        return _fail(StorageError(one_line(error)))


def _fail(error: ExtremaError) -> int:
    if _is_first() or not error.of_all:
        _say(f"{PROG}: error: {' '.join(str(error).split())}")
    return error.exit_code


def _is_first() -> bool:
    """Whether this is process 0 of the run."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _say(text: str) -> None:
    # the terminal may be gone
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def _print(result: object) -> None:
    """Prints a result; all output to stdout goes through here."""
    print(printable(str(result)))


def _print_once(result: object) -> None:
    """Prints what all processes of a run have."""
    if _is_first():
        _print(result)


def _flush() -> None:
    """Flushes standard output now, since an error at interpreter exit could no longer be handled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # a stream replaced by a test has no file descriptor
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise StorageError(f"standard output: cannot be written ({error.strerror})") from None


def _dispatch(args: list[str]) -> None:
    if args and args[0] in ("--version", "-V"):
        _print(f"{PROG} {__version__}")
        return
    if args[:1] == ["help"] and len(args) > 1:
        args = [args[1], "--help"]
    if not args or args[0] in ("--help", "-h", "help"):
        _print(_overview())
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        if name.startswith("-"):
            raise UsageError(f"unknown option {name}; the command comes first, see {PROG} --help")
        if name in PRESETS or os.path.exists(name):
            raise UsageError(f"{name!r} is no command; to train with it: {PROG} pretrain {shlex.join(args)}")
        raise UsageError(f"unknown command {name!r}{did_you_mean(name, list(COMMANDS))}")
    COMMANDS[name][0](_Parser(name), rest)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {run.__doc__}" for name, (run, _) in COMMANDS.items()]
    first = (COMMANDS[name][1] for name in ("pretrain", "evaluate", "embed", "search"))
    lines += ["", "examples:", *(f"  {PROG} {example}" for example in first), ""]
    lines.append(f"{PROG} COMMAND --help shows options and an example; --version the version")
    return "\n".join(lines)


# ---- parsing ---------------------------------------------------------------------------------------


# name -> (function of parser and arguments, whose docstring is the help summary; example)
COMMANDS: dict[str, tuple[Callable[[_Parser, list[str]], None], str]] = {}


def _command(example: str) -> Callable[[Callable], Callable]:
    """Registers a function as the command named by the first word of its example."""

    def register(run: Callable[[_Parser, list[str]], None]) -> Callable:
        COMMANDS[example.split()[0]] = run, example
        return run

    return register


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and suggests similar options for an unknown one."""

    def __init__(self, name: str, **options: Any) -> None:
        run, example = COMMANDS[name]
        self._words: list[str] = []
        super().__init__(
            prog=f"{PROG} {name}",
            description=run.__doc__,
            epilog=f"example:\n  {PROG} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        shown = self.add_argument_group("verbosity").add_mutually_exclusive_group()
        for option, level, text in (
            ("--quiet", logging.WARNING, "show only warnings, errors and the result"),
            ("--verbose", logging.DEBUG, "also show automatic choices and the reasons for them"),
        ):
            shown.add_argument(
                option, dest="level", action="store_const", const=level, default=logging.INFO, help=text
            )

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            # the required option may be misspelled
            for word in self._words:
                if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                    raise self._unknown(word)
        for word, kind in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f"invalid {word} value:", f"expected {kind}, got")
        message = message.removeprefix("argument ")
        if found := re.fullmatch(r"(--\S+): ignored explicit argument (.*)", message):
            message = f"unexpected argument {found[2]}{self._no_value(found[1])}"
        raise UsageError(f"{message}; see {self.prog} --help")

    # a short name, since most lines below start with it
    add = argparse.ArgumentParser.add_argument

    def switch(self, name: str, text: str, **options: Any) -> None:
        """An option without a value."""
        self.add(name, action="store_true", help=text, **options)

    def parse_all(self, args: list[str]) -> argparse.Namespace:
        """Like parse_args, but suggests similar options for an unknown one; also sets up logging."""
        self._words = _dashed(args)
        parsed, rest = self.parse_known_args(self._words)
        for word in rest:
            if word.startswith("-"):
                raise self._unknown(word)
        if rest:
            before = (self._no_value(a) for a, b in itertools.pairwise(self._words) if b == rest[0])
            hint = ", a preset comes first" if rest[0] in PRESETS else next(filter(None, before), "")
            self.error(f"unexpected argument {rest[0]!r}{hint}")
        for action in self._actions:
            # an empty folder name would mean the current folder; dotted options may be empty
            if "." not in action.dest and getattr(parsed, action.dest, None) in ("", [""]):
                self.error(f"{'/'.join(action.option_strings) or action.metavar}: {_EMPTY}")
        _set_up_logging(parsed.level)
        parsed.progress = parsed.level < logging.WARNING
        del parsed.level
        return parsed

    def options(self, args: list[str], *, progress: bool = False) -> dict[str, Any]:
        """The arguments by name; `progress` is included only for functions that take it."""
        found = vars(self.parse_all(args))
        return found if progress else {k: v for k, v in found.items() if k != "progress"}

    def _no_value(self, word: str) -> str:
        """`: OPTION takes no value`, and how to turn it off; empty if it is not a switch."""
        action = self._option_string_actions.get(word)
        if action is None or action.nargs != 0:
            return ""
        off = _off(word)
        return f": {word} takes no value" + f", {off} turns it off" * (off in self._option_string_actions)

    def _unknown(self, word: str) -> UsageError:
        known = [s for a in self._actions for s in a.option_strings if s.startswith("--") and s != "--help"]
        name = word.partition("=")[0]
        bare = name.strip("-")
        members = [k for k in known if k.startswith(f"{name}.")]
        # `no` placed before the group instead of the name
        near = [k for k in known if bare.startswith("no-") and k == _off(bare[3:])] or near_options(
            name, known
        )
        elsewhere = USED_ELSEWHERE.get(bare.rpartition(".")[2]) if self.prog.endswith(" pretrain") else None
        if removed := config.REMOVED.get(bare.replace("-", "_")):
            hint = f"this option was removed: {removed[1]}"
        elif members:
            hint = f"it is a group: {', '.join(members[:3])}, ..."
        elif elsewhere or near:
            hint = elsewhere or f"did you mean {' or '.join(near)}?"
        else:
            hint = f"see {self.prog} --help"
        return UsageError(f"unknown option {name}; {hint}")


class _Added(Exception):
    """Raised once all options have been added."""


class _Unused(_Parser):
    def parse_all(self, args: list[str]) -> NoReturn:
        raise _Added


def _parser_of(name: str) -> _Parser:
    """The parser of a command, with all its options."""
    parser = _Unused(name)
    with suppress(_Added):
        COMMANDS[name][0](parser, [])
    return parser


_THREADS = "--data.threads is the number of decoding threads"
_OUT = "--out is the run folder"
# options of other tools that users may try with `pretrain` -> the equivalent here
USED_ELSEWHERE = {
    "resume": "the same command continues the run in --out",
    "gpus": "start one process per GPU: torchrun --nproc-per-node 8 -m extrema_fast pretrain ...",
    "gpu": "--system.device cuda:N is the GPU",
    "workers": _THREADS,
    "num-workers": _THREADS,
    "output": _OUT,
    "output-dir": _OUT,
    "knn": "evaluation during training: --eval.every-epochs, --eval.k; afterwards: evaluate RUN",
}


def _off(switch: str) -> str:
    """The option that turns off a boolean setting: `--log.no-report` for `--log.report`."""
    group, dot, leaf = switch.removeprefix("--").rpartition(".")
    return f"--{group}{dot}no-{leaf}"


def _dashed(args: Sequence[str]) -> list[str]:
    """Replaces `_` by `-` in option names; values are not changed."""
    out = []
    for word in args:
        name, equals, value = word.partition("=")
        out.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return out


class _Stderr(logging.StreamHandler):
    # looked up for every line, since a progress bar replaces sys.stderr
    stream = property(lambda self: sys.stderr, lambda self, value: None)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


_STDERR = _Stderr()


def _set_up_logging(level: int) -> None:
    logger = logging.getLogger("extrema_fast")
    logger.setLevel(level if _is_first() else logging.WARNING)
    logger.addHandler(_STDERR)


def _show(result: Any, as_json: bool, describe: Callable[[Any], str]) -> None:
    _print(json.dumps(result, indent=1) if as_json else describe(result))


def _side(sides: list[int] | None) -> int | tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) > 2:
        raise UsageError(f"--img-size: expected a side, or height and width, got {len(sides)} numbers")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


_EMPTY = "expected a name, got an empty word (a variable of the shell that is not set?)"


# ---- commands with a configuration -----------------------------------------------------------------


class _Configured(NamedTuple):
    """A parsed command line: the command's own options, the configuration, and its sources."""

    ours: argparse.Namespace
    cfg: Config
    # the preset; for `own` the settings it chose, without those given
    name: str
    base: Config
    # dotted options given on the command line, and in the --config file
    flags: dict[str, Any]
    of_file: dict[str, Any]


def _add_dotted(
    p: _Parser, of: type[Config] = Config, without: Sequence[str] = ()
) -> dict[str, argparse.Action]:
    """Adds an option for every configuration field that `p` has no option for; returns them by dotted name."""
    docs = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for member, after in itertools.pairwise(node.body):
            if isinstance(member, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(str(ast.literal_eval(after.value)).split())
                docs[node.name, ast.unparse(member.target)] = text.replace("%", "%%")
    sections: dict[str, Any] = {
        k: hint for k, hint in get_type_hints(of).items() if dataclasses.is_dataclass(hint)
    }
    actions: dict[str, argparse.Action] = {}
    for section, cls in {"": of, **sections}.items():
        if {f"{section}.{field}" for field in get_type_hints(cls)} <= {*without}:
            continue
        group = p.add_argument_group(section, (cls.__doc__ or "").partition("\n")[0]) if section else p
        prefix = f"--{section}." if section else "--"
        for field, hint in get_type_hints(cls).items():
            leaf, name = field.replace("_", "-"), f"{prefix}{field}"[2:]
            if dataclasses.is_dataclass(hint) or prefix + leaf in p._option_string_actions or name in without:
                continue
            options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
            options["help"] = docs[cls.__name__, field]
            if hint is bool:
                actions[name] = group.add_argument(prefix + leaf, action="store_true", **options)
                options["help"] = argparse.SUPPRESS
                group.add_argument(_off(prefix + leaf), action="store_false", **options)
                continue
            if get_origin(hint) is tuple:
                args = get_args(hint)
                options["nargs"], hint = "+" if args[-1] is Ellipsis else len(args), args[0]
            if get_origin(hint) is Literal:
                # validated with the configuration, which also knows the old names of values
                options["metavar"] = metavar = "{" + ",".join(get_args(hint)) + "}"
                if len(metavar) > 40:
                    options["metavar"] = "NAME"
                    options["help"] += f" One of {', '.join(get_args(hint))}."
            else:
                options |= {"type": hint, "metavar": hint.__name__.upper()}
            actions[name] = group.add_argument(prefix + leaf, **options)
    return actions


def _configure(p: _Parser, args: list[str]) -> _Configured:
    """Parses preset (or images, for the preset `own`), file and dotted options along with the options of `p`."""
    dotted = _add_dotted(p)
    p.usage = f"{p.prog} [PRESET or IMAGES] [options] [--dotted.option ...]"
    p.add(
        "--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; default: own for given images, else photos"
    )
    p.add("--config", metavar="FILE", help="TOML or JSON file with settings that override the preset")
    args = _dashed(args)
    # only the first word can be a preset or images; later words may be values of options
    by_position = args.pop(0) if args and not args[0].startswith("-") else None
    images = by_position if by_position is not None and _names_images(by_position) else None
    by_position = None if images else by_position
    wanted = [a for a in args if a not in ("-h", "--help")]
    ours = p.parse_all(wanted)
    if by_position and ours.preset and by_position != ours.preset:
        raise UsageError(f"two presets, {by_position!r} and {ours.preset!r}; give one")
    of_preset, in_file = read_config(ours.config) if ours.config else (None, {})
    if "tune" in in_file:
        raise UsageError(f"{ours.config}: has the settings of a fine-tuning; use {PROG} finetune --config")
    own = images or (not ours.config and _of_user(getattr(ours, "data.train", "")))
    name = str(by_position or ours.preset or ("own" if own else of_preset or "photos"))
    base = preset(name)
    if len(wanted) < len(args):
        _show_help(p, dotted, flatten(from_dict(in_file, base)))
    flags = {option: getattr(ours, option) for option in dotted if hasattr(ours, option)}
    if images and flags.setdefault("data.train", images) != images:
        raise UsageError(f"images are named twice, {images!r} and {flags['data.train']!r}; give one")
    options = flatten(in_file)
    if name.replace("-", "_") == "own":
        from .training.own import choose

        # `profile` and `tune` have no such options
        overwrite, init_from = getattr(ours, "overwrite", False), getattr(ours, "init_from", None)
        cfg, base = choose(options | flags, overwrite=overwrite, init_from=init_from)
    else:
        cfg = from_dict(nested(flags), from_dict(in_file, base))
    return _Configured(ours, cfg, name, base, flags, options)


def _show_help(p: _Parser, dotted: dict[str, argparse.Action], values: dict[str, Any]) -> NoReturn:
    """Prints the help with the value of each option, and exits."""
    for option, action in dotted.items():
        words = v if isinstance(v := values[option], list) else [v]
        shown = " ".join(f"{w:.4g}" if isinstance(w, float) else str(w) for w in words) or "empty"
        off = f"; {_off(action.option_strings[0])} turns it off" * (v is True)
        action.help = f"{action.help} (now: {shown.replace('%', '%%')}{off})".strip()
    p.print_help()
    p.exit()


def _of_user(images: str) -> bool:
    """Whether `--data.train` names the user's own images."""
    if not images:
        return False
    from .data.sources import BUILT_IN

    return images not in BUILT_IN


def _names_images(word: str) -> bool:
    """Whether the first word names images and not a preset; raises UsageError if it names neither."""
    if not word:
        raise UsageError(f"PRESET or IMAGES: {_EMPTY}")
    if word.replace("-", "_") in PRESETS:
        return False
    path = Path(word).expanduser()
    # it may also be a folder inside an archive
    there = path.exists() or any(p.is_file() for p in path.parents)
    if there or "://" in word or any(c in word for c in "*?[{"):
        return True
    if os.sep in word or word.startswith(("~", ".")) or os.path.splitext(word)[1]:
        raise UsageError(f"{word}: no such file or folder, and no preset{did_you_mean(word, list(PRESETS))}")
    raise UsageError(
        f"unknown preset {word!r}{did_you_mean(word, list(PRESETS))} (nor is there a file or folder {word} of images)"
    )


@_command("pretrain my_images --train.epochs 80 --out runs/longer")
def _pretrain(p: _Parser, args: list[str]) -> None:
    """Pretrain an encoder on images, or continue the run in --out."""
    p.add("--init-from", metavar="PATH", help="initial weights: run, weights, or another project's ViT")
    p.switch("--overwrite", "move a run in --out aside and start a new one")
    p.switch("--allow-config-change", "continue the run even if its settings have changed")
    p.switch("--print-config", "print all settings in a form that --config reads, and exit")
    p.switch("--dry-run", "run three real steps without writing anything")
    given = _configure(p, args)
    ours, cfg = given.ours, given.cfg
    if ours.print_config:
        _print_once(json.dumps(_resolved(given), indent=1))
    elif ours.dry_run:
        from .tools.dry_run import dry_run
        from .training.resolve import describe

        _print_once(describe(dry_run(cfg, init_from=ours.init_from, overwrite=ours.overwrite)))
    else:
        from .train import pretrain

        pretrain(
            cfg,
            # a file may be based on another preset
            preset=None if ours.config else (given.name, given.base),
            init_from=ours.init_from,
            overwrite=ours.overwrite,
            allow_config_change=ours.allow_config_change,
            progress=ours.progress,
        )


@_command("finetune runs/photos --data pets --out runs/pets")
def _finetune(p: _Parser, args: list[str]) -> None:
    """Fine-tune a classifier, or continue the run in --out."""
    wanted = [a for a in args if a not in ("-h", "--help")]
    helps = len(wanted) < len(args)
    p.add(
        "weights",
        metavar="WEIGHTS",
        nargs="?" if helps else None,
        help="run, weights, another project's ViT, or none (random weights)",
    )
    p.add("--data", metavar="DIR", help="folder with train/ and test/ or val/, each with class folders")
    p.add("--preset", choices=FINETUNE_PRESETS, help="small (default, for a CPU) or paper (needs timm)")
    p.add("--config", metavar="FILE", help="TOML or JSON file with settings that override the preset")
    p.switch("--overwrite", "move a run in --out aside and start a new one")
    p.switch("--allow-config-change", "continue the run even if its settings have changed")
    p.switch("--print-config", "print all settings in a form that --config reads, and exit")
    p.usage = f"{p.prog} WEIGHTS --data DIR [options] [--dotted.option ...]"
    dotted = _add_dotted(p, FinetuneConfig, [*NOT_TUNED, "tune.weights"])
    ours = p.parse_all(wanted)
    of_preset, in_file = read_config(ours.config) if ours.config else (None, {})
    name = str(ours.preset or of_preset or "small")
    if helps:
        given, values = flatten(in_file), flatten(from_dict(in_file, FINETUNE_PRESETS[name]()))
        of_weights = (
            o for o in dotted if o.startswith("model.") or o in ("data.mean", "data.std", "data.range")
        )
        own = {o: "that of the weights" for o in of_weights if o not in given and o != "model.drop_path"}
        _show_help(p, dotted, values | own)
    flags = {option: getattr(ours, option) for option in dotted if hasattr(ours, option)}
    if ours.data is not None:
        from .data.sources import split_folders

        if "data.train" in flags:
            raise UsageError("--data and --data.train name the same thing; give one")
        below, test = split_folders(ours.data)
        flags = {"data.train": below, **({"data.test": test} if test else {}), **flags}
    from .training.tuning import begin_config

    # settings that affect how the weights are read
    early = flatten(in_file) | flags
    base = begin_config(ours.weights, name, early.get("out"), early.get("model.heads") or None)
    # the output of --print-config names the weights, too
    if "tune" in in_file:
        in_file["tune"] = {**in_file["tune"], "weights": ours.weights}
    cfg = from_dict(nested(flags), from_dict(in_file, base))
    if ours.print_config:
        _print_once(json.dumps({"preset": name, "config": to_dict(cfg)}, indent=1))
        return
    from .train import finetune

    finetune(
        None,
        cfg,  # type: ignore[arg-type]
        preset=(name, base),
        overwrite=ours.overwrite,
        allow_config_change=ours.allow_config_change,
        progress=ours.progress,
    )


def _resolved(given: _Configured) -> dict[str, Any]:
    """The output of --print-config; --config reads it, or its `config` alone."""
    cfg = given.cfg
    defaults, of_preset = flatten(Config()), flatten(given.base)
    in_file = flatten(from_dict(nested(given.of_file), given.base))
    sources = {}
    for option, value in flatten(cfg).items():
        if option in given.flags:
            sources[option] = "flag"
        elif option in given.of_file and (given.name == "own" or in_file[option] != of_preset[option]):
            sources[option] = "file"
        elif value != defaults[option]:
            sources[option] = f"preset {given.name}"
    return {
        "preset": given.name,
        "config": to_dict(cfg),
        "derived": config.derived(cfg, int(os.environ.get("WORLD_SIZE", 1))),
        "sources": sources,
    }


_CROP_PCT = "crop size / resized short side (default: the weights'; 1: already cropped)"


def _evaluation(p: _Parser, args: list[str], metrics: Sequence[str]) -> None:
    p.add("path", metavar="RUN_OR_WEIGHTS", help="run folder, weights folder or released .pth file")
    p.add("--data", metavar="DIR", help="folder with train/ and test/ or val/ (default: the run's)")
    p.add("--train", metavar="DIR", help="labeled training images")
    p.add("--test", metavar="DIR", help="labeled test images")
    p.add("--out", metavar="FILE", help="JSON result file (default for a run: reports/evaluation.json)")
    p.add("--which", choices=("teacher", "student"), default="teacher", help="network (default: teacher)")
    p.add("--max-train", type=int, default=0, metavar="N", help="use at most N training images (0: all)")
    p.add("--max-test", type=int, default=0, metavar="N", help="use at most N test images (0: all)")
    if "knn" in metrics:
        p.add("--k", type=int, metavar="N", help="neighbors (default: the run's, or 20)")
        p.add("--temperature", type=float, metavar="T", help="vote temperature (default: the run's, or 0.07)")
    if "probe" in metrics:
        p.add("--protocol", default="paper", metavar="NAME", help="probe: paper (default), grid or logistic")
    p.add(
        "--labels", metavar="FRACTION", help="fraction of labels to use (e.g. 0.01), or a file of image names"
    )
    p.add("--batch-size", type=int, metavar="N", help="images per forward pass (default: the run's)")
    p.add("--crop-pct", type=float, metavar="FRACTION", help=_CROP_PCT)
    p.add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    p.add("--seed", type=int, default=0, metavar="S", help="random seed of subsets, probe and labels")
    p.add("--seeds", type=int, default=1, metavar="N", help="mean and standard deviation over N seeds")
    p.switch("--force", "evaluate again even if nothing has changed")
    p.switch("--json", "print the whole result as JSON")
    o = p.options(args)
    as_json, data = o.pop("json"), o.pop("data")
    if data is not None and o["train"] is not None:
        raise UsageError("--data and --train name the same thing; give one")
    o["train"] = o["train"] if data is None else data
    from .evaluation.evaluate import evaluate

    _show_measured(lambda: evaluate(metrics=metrics, **o), as_json)


def _show_measured(measure: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Shows the result of an evaluation, even if its file cannot be written."""
    from .evaluation.result import format_table

    try:
        _show(measure(), as_json, format_table)
    except StorageError as error:
        # minutes of work: show it even though it could not be saved
        if error.result is not None:
            _show(error.result, as_json, format_table)
        raise


@_command("evaluate runs/photos")
def _evaluate(p: _Parser, args: list[str]) -> None:
    """Run k-NN and a linear probe, against random weights and pixels."""
    _evaluation(p, args, ("knn", "probe"))


@_command("knn runs/cifar10 --data cifar10")
def _knn(p: _Parser, args: list[str]) -> None:
    """Run only the k-NN part of evaluate."""
    _evaluation(p, args, ("knn",))


@_command("probe runs/cifar10 --train cifar10/train --test cifar10/test")
def _probe(p: _Parser, args: list[str]) -> None:
    """Run only the linear-probe part of evaluate."""
    _evaluation(p, args, ("probe",))


@_command("segment runs/photos --data VOCdevkit/VOC2012")
def _segment(p: _Parser, args: list[str]) -> None:
    """Evaluate patch tokens on segmentation masks: probe and k-means."""
    p.add("path", metavar="RUN_OR_WEIGHTS", help="run folder, weights folder or released .pth file")
    p.add("--data", required=True, metavar="DIR", help="VOC, ADE20K, or a folder with images/ and masks/")
    p.add("--out", metavar="FILE", help="JSON result file (default for a run: in its reports/)")
    p.add("--which", choices=("teacher", "student"), default="teacher", help="network (default: teacher)")
    p.add("--img-size", type=int, nargs="+", metavar="N", help="pixels: side, or height and width")
    p.add("--max-train", type=int, default=0, metavar="N", help="use at most N training images (0: all)")
    p.add("--max-test", type=int, default=0, metavar="N", help="use at most N test images (0: all)")
    p.add("--batch-size", type=int, metavar="N", help="images per forward pass (default: the run's)")
    p.add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    p.add("--seed", type=int, default=0, metavar="S", help="random seed of subsets, probe and k-means")
    p.add("--seeds", type=int, default=1, metavar="N", help="mean and standard deviation over N seeds")
    p.switch("--force", "evaluate again even if nothing has changed")
    p.switch("--json", "print the whole result as JSON")
    o = p.options(args)
    as_json = o.pop("json")
    o["img_size"] = _side(o["img_size"])
    from .evaluation.segmentation import segment

    _show_measured(lambda: segment(**o), as_json)


@_command("report runs/photos")
def _report(p: _Parser, args: list[str]) -> None:
    """Write the report of a run, reports/report.html."""
    p.add("run_dir", metavar="RUN", help="run folder")
    p.add("--images", type=int, default=8, metavar="N", help="test images to show (default 8; 0: none)")
    p.add("--data", metavar="DIR", help="folder with train/ and test/ (default: the run's)")
    o = p.options(args)
    from .reporting.report import report

    _print(report(**o))


@_command("replay runs/photos --step 120")
def _replay(p: _Parser, args: list[str]) -> None:
    """Recompute a step to find what made it NaN or infinite."""
    p.add("path", metavar="RUN", help="run folder, or the debug/step_* folder of a skipped step")
    p.add("--step", type=int, metavar="N", help="step number as in the log (default: the last skipped step)")
    p.add("--rank", type=int, metavar="R", help="only the images of this process")
    p.add("--device", help="auto, cpu, cuda, cuda:N, mps (default: the run's)")
    p.switch("--json", "print the result as JSON")
    o = p.options(args)
    as_json = o.pop("json")
    from .tools.replay import describe, replay

    _show(replay(**o), as_json, describe)


@_command("runs runs")
def _runs(p: _Parser, args: list[str]) -> None:
    """List runs with their state, progress and results."""
    p.add("folder", nargs="?", default="runs", metavar="DIR", help="folder of runs (default: runs)")
    p.switch("--json", "print the result as JSON")
    o = p.options(args)
    from .tools.runs import as_json, format_table, runs

    found = runs(o["folder"])
    _print(json.dumps(as_json(found), indent=1) if o["json"] else format_table(found, o["folder"]))


@_command("compare runs/photos runs/longer")
def _compare(p: _Parser, args: list[str]) -> None:
    """Write a page that compares runs: results, curves and settings."""
    p.add("runs", nargs="+", metavar="RUN", help="run folders")
    p.add("--out", default="comparison.html", metavar="FILE", help="page to write (default: comparison.html)")
    o = p.options(args)
    from .reporting.compare import compare

    _print(compare(o["runs"], o["out"]))


@_command("doctor")
def _doctor(p: _Parser, args: list[str]) -> None:
    """Check this machine and installation, including a small run."""
    p.add("out", nargs="?", default="runs", metavar="DIR", help="folder for future runs (default: runs)")
    p.switch("--json", "print the result as JSON")
    o = p.options(args)
    from .tools import doctor

    findings = []
    for finding in doctor.doctor(o["out"]):
        findings.append(finding)
        if not o["json"]:
            _print(doctor.describe(finding))
            _flush()
    error = doctor.problem(findings)
    if o["json"]:
        _print(json.dumps({"ok": error is None, "checks": [f._asdict() for f in findings]}, indent=1))
    if error is not None:
        raise error
    if not o["json"]:
        _print("\na run can start here")


@_command("index imagenet/train --out imagenet.tsv")
def _index(p: _Parser, args: list[str]) -> None:
    """Verify all images and list them in a manifest for training."""
    p.add("data", metavar="DATA", help="folder, list file, shards, or a manifest to verify again")
    p.add("--out", required=True, metavar="M.tsv", help="manifest to write; rerun the command to continue it")
    p.switch("--strict", "also require Pillow to decode each image")
    p.add("--threads", type=int, metavar="N", help="decoding processes (default: one per core)")
    p.add(
        "--max-pixels",
        type=int,
        default=config.MAX_PIXELS,
        metavar="N",
        help="treat images with more pixels as bad (default: 178956970)",
    )
    p.switch("--force", "replace another file in --out, verify all images again")
    p.switch("--json", "print the result as JSON")
    o = p.options(args, progress=True)
    as_json = o.pop("json")
    from .tools.index import describe, index

    result = index(**o)
    troubles = [t._asdict() for t in result.troubles]
    _print(json.dumps(result._asdict() | {"troubles": troubles}, indent=1) if as_json else describe(result))


@_command("pack images.tsv packed --size 256")
def _pack(p: _Parser, args: list[str]) -> None:
    """Pack images into shuffled, downscaled tar shards for fast reading."""
    p.add("data", metavar="MANIFEST", help="manifest made by index, or a folder, list file or shards")
    p.add("out", metavar="OUT", help="folder for the shards; rerun the command to continue")
    p.add(
        "--size", type=int, default=256, metavar="N", help="downscale to N pixels (default 256; 0: keep size)"
    )
    p.add("--side", choices=("short", "long"), default="short", help="side set to --size (default: short)")
    p.add("--quality", type=int, default=90, metavar="Q", help="JPEG quality (default 90)")
    p.add("--shard-mb", type=float, default=512, metavar="MB", help="shard size in MB (default 512)")
    p.add("--seed", type=int, default=0, metavar="S", help="random seed of the shuffle (default 0)")
    p.add("--threads", type=int, default=0, metavar="N", help="number of threads (default: one per core)")
    p.add(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="max. fraction unreadable (default 0.01)",
    )
    p.switch("--force", "move the contents of OUT aside and start again")
    p.add("--no-measure", dest="measure", action="store_false", help="do not benchmark the loader afterwards")
    p.switch("--json", "print the result as JSON")
    o = p.options(args, progress=True)
    as_json = o.pop("json")
    from .tools.pack import describe, pack

    _show(pack(**o), as_json, describe)


@_command("embed photos features --weights runs/photos")
def _embed(p: _Parser, args: list[str]) -> None:
    """Write the features of every image: class, mean or patch tokens."""
    p.add("data", metavar="DATA", help="folder, list file, shards, manifest, or photos")
    p.add("out", metavar="OUT", help="folder for the features; rerun the command to continue")
    p.add("--weights", required=True, metavar="PATH", help="run, weights folder or released .pth file")
    p.add("--which", choices=("teacher", "student"), default="teacher", help="network (default: teacher)")
    p.add("--tokens", default="class", metavar="KIND", help="class (default), mean of patches or patch")
    p.add("--no-norm", dest="norm", action="store_false", help="leave out the final LayerNorm")
    p.add("--dtype", default="fp32", metavar="TYPE", help="fp32 (default), fp16 or bf16")
    p.add("--format", default="npy", metavar="NAME", help="npy (default), parquet or safetensors")
    p.add("--img-size", type=int, nargs="+", metavar="N", help="pixels: side, or height and width")
    p.add("--crop-pct", type=float, metavar="FRACTION", help=_CROP_PCT)
    p.add(
        "--keep-ratio", type=float, default=1.0, metavar="R", help="fraction of patches to encode (default 1)"
    )
    p.add("--batch-size", type=int, metavar="N", help="images at a time (default: 32 on a CPU, 256 on a GPU)")
    p.add("--part-images", type=int, metavar="N", help="images per file (default: about 1024)")
    p.add("--split", choices=("train", "test"), default="train", help="split of a built-in image set")
    p.add("--limit", type=int, default=0, metavar="N", help="encode a random subset of N images (0: all)")
    p.add("--loader", choices=("auto", "dali", "pil"), default="auto", help="image decoder")
    p.add("--threads", type=int, default=0, metavar="N", help="decoding threads (0: by number of cores)")
    p.switch("--exif", "rotate images by their EXIF orientation")
    p.add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    p.switch("--strict", "stop at an image that cannot be read, instead of skipping it")
    p.switch("--force", "replace features in OUT that have other settings")
    o = p.options(args, progress=True)
    o["img_size"] = _side(o["img_size"])
    from .tools.embed import describe, embed

    _print_once(describe(embed(**o)))


@_command("search query.jpg features --k 8 --out found.png")
def _search(p: _Parser, args: list[str]) -> None:
    """Find the nearest images by features; table and contact sheet."""
    p.add("query", metavar="QUERY", help="image file, path in the index, or images as for embed")
    p.add("index", metavar="INDEX", help="folder written by embed")
    p.add("--k", type=int, metavar="N", help="number of neighbors per query (default 10)")
    p.add("--out", metavar="FILE.png", help="contact sheet of queries and neighbors")
    p.add("--weights", metavar="PATH", help="location of the index's weights, if moved")
    p.add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    p.switch("--force", "replace a file in --out that search did not write")
    p.switch("--json", "print the result as JSON")
    o = p.options(args)
    as_json = o.pop("json")
    from .tools.search import format_table, search

    _show(search(**o), as_json, format_table)


@_command("visualize runs/photos cat.jpg dog.jpg --out pictures")
def _visualize(p: _Parser, args: list[str]) -> None:
    """Show attention, similarity and PCA of images or a video on a page."""
    p.add("weights", metavar="WEIGHTS", help="run, weights folder or released .pth file")
    p.add("images", nargs="+", metavar="IMAGES", help="image files, a video, or images as for embed")
    p.add("--out", default="pictures", metavar="DIR", help="folder for the pictures (default: pictures)")
    p.add("--make", nargs="+", default=[], metavar="NAME", help="attention, similarity, pca, neighbors, map")
    p.add("--patch", type=int, nargs=2, metavar=("X", "Y"), help="compare with the patch at this pixel")
    p.add("--show", type=int, default=8, metavar="N", help="images whose patches are shown (default 8)")
    p.add("--patches", type=int, metavar="N", help="patches along the longer side (default 32, or fewer)")
    p.add("--frames", type=int, default=48, metavar="N", help="maximum number of video frames (default 48)")
    p.add("--map", choices=("tsne", "umap", "pca"), help="projection (default: tsne if installed, else pca)")
    p.add("--which", choices=("teacher", "student"), help="network (default: teacher)")
    p.add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    p.switch("--force", "replace a folder in --out that holds other files")
    o = p.options(args)
    from .tools.visualize import describe, visualize

    o["patch"] = tuple(o["patch"]) if o["patch"] else None
    _print(describe(visualize(**o)))


@_command("import extrema_base.pth weights/extrema_base")
def _import(p: _Parser, args: list[str]) -> None:
    """Convert a released ExtreMA checkpoint to a weights folder."""
    p.add("file", metavar="FILE", help="released ExtreMA checkpoint (.pth), or bare encoder weights")
    p.add("out", metavar="OUT", help="new weights folder")
    p.add("--which", choices=("teacher", "student"), help="keep only one network (default: both)")
    p.add("--grid", type=int, nargs=2, metavar=("R", "C"), help="grid of a non-square position table")
    p.add("--num-heads", type=int, metavar="N", help="attention heads, if unknown (default: width / 64)")
    p.switch("--force", "replace an earlier import or export in OUT")
    o = p.options(args)
    from .weights.load import import_released

    _print(import_released(**o))


@_command("export runs/photos exported/photos --format onnx")
def _export(p: _Parser, args: list[str]) -> None:
    """Export an encoder to timm, Hugging Face, ONNX or torch.export."""
    p.add("weights", metavar="WEIGHTS", help="run, weights folder or file, or released .pth file")
    p.add("out", metavar="OUT", help="new folder")
    p.add(
        "--format",
        default="extrema",
        metavar="NAME",
        help="extrema (= timm, default), vit, hf, onnx, torch-export",
    )
    p.add("--which", choices=("teacher", "student"), help="network (default: teacher)")
    p.add("--img-size", type=int, nargs="+", metavar="PIXELS", help="image size: side, or height and width")
    p.switch("--fc-norm", "vit, hf: replace the final norm by a new one after pooling", default=None)
    p.switch("--class-token", "hf: export the whole encoder; needs extrema_fast to load")
    p.add("--opset", type=int, metavar="N", help="onnx: operator set version (default 18)")
    p.switch("--force", "replace an earlier import or export in OUT")
    o = p.options(args)
    o["img_size"] = _side(o["img_size"])
    from .weights.export import export

    result = export(**o)
    _print(f"{result.folder}: {', '.join(result.files)}")
    for check, difference in result.differences.items():
        _print(f"  {check}: largest difference {difference:.1e}")


@_command("completion bash")
def _completion(p: _Parser, args: list[str]) -> None:
    """Print a completion script for bash, zsh or fish."""
    from .tools.completion import SHELLS, script

    p.add("shell", choices=SHELLS, help='eval "$(extrema-fast completion bash)" in ~/.bashrc')
    shell = p.options(args)["shell"]
    _print(script(PROG, {name: _parser_of(name) for name in COMMANDS}, list(PRESETS), shell))


@_command("encoders '*base*'")
def _encoders(p: _Parser, args: list[str]) -> None:
    """List the encoder names."""
    p.add("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern")
    pattern = p.options(args)["pattern"]
    names = config.list_models(pattern)
    if not names:
        raise UsageError(f"no encoder matches {pattern!r}{did_you_mean(pattern, config.list_models())}")
    _print("\n".join(names))


@_command("kernels --device cuda")
def _kernels(p: _Parser, args: list[str]) -> None:
    """List the ops, and which implementation runs here and why."""
    p.add("--device", metavar="DEVICE", help="cuda or cpu (default: cuda if available)")
    p.switch("--json", "print the result as JSON")
    o = p.options(args)
    import torch

    from .kernels import _cache, tune
    from .ops import dispatch as ops
    from .ops import measure

    device = o["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device: {device!r} is no device; use cpu or cuda") from None
    rows, chosen = tune.describe(device), ops.choices(device)
    there = torch.device(device).type == "cuda" and torch.cuda.is_available()
    measured = measure.describe(device, filter(measure.has_cases, chosen)) if there else []
    if o["json"]:
        _print(
            json.dumps({"device": device, "kernels": rows, "choices": chosen, "measured": measured}, indent=1)
        )
        return
    _print(tune.headline(device))
    for row in rows:
        _print(f"\n{row['op']} (version {row['version']}): {row['summary']}")
    _print(f"\nchosen on {device}:")
    width = max(map(len, chosen))
    for op, c in chosen.items():
        names = ", ".join(ops.IMPLEMENTATIONS[op])
        _print(f"  {op:<{width}}  {c['implementation']}: {c['reason']} (of {names})")
    if there:
        settings = ", ".join(f"{row['op']} {row['tuned']}" for row in rows if row["tuned"]) or "none"
        _print(f"\nmeasured on this GPU with these versions ({_cache.folder()}); launch settings: {settings}")
        _print(
            "\n".join(f"  {line}" for line in measured)
            or "  nothing yet; a run measures, and `extrema-fast tune`"
        )


@_command("profile paper_small_80x5 --train.batch-size 16 --steps 3")
def _profile(p: _Parser, args: list[str]) -> None:
    """Profile a few steps and print the time per component."""
    p.add("--out", metavar="FOLDER", help="folder for the trace (default: runs/profile_PRESET)")
    p.add("--steps", type=int, default=3, metavar="N", help="steps to profile (default 3)")
    p.add("--warmup", type=int, default=5, metavar="N", help="steps to run first (default 5)")
    p.switch("--synthetic", "use random images from memory instead of a data set")
    p.switch("--json", "print the whole result as JSON")
    given = _configure(p, args)
    ours, cfg, synthetic = given.ours, given.cfg, given.ours.synthetic
    from .data.sources import BUILT_IN
    from .tools import profile

    train = cfg.data.train
    if train == given.base.data.train and train not in BUILT_IN and not Path(train).expanduser().exists():
        # the preset's path is only a guess, a path given by the user is not
        log.info("no images at %s: random images from memory (real ones: --data.train DIR)", train)
        synthetic = True
    out = ours.out or f"runs/profile_{given.name.replace('-', '_')}"
    result = profile.profile(cfg, out, steps=ours.steps, warmup=ours.warmup, synthetic=synthetic)
    _show(result, ours.json, profile.describe)
    if not ours.json:
        _print(f"{out}: trace.json.gz (ui.perfetto.dev), profile.json, profile.txt")


@_command("tune paper_base_80x5")
def _tune(p: _Parser, args: list[str]) -> None:
    """Benchmark a run's ops and kernel launch settings on this GPU."""
    p.add("--op", nargs="*", default=[], metavar="OP", help="kernels to tune, by folder name (default: all)")
    given = _configure(p, args)
    from .distributed import pick_device
    from .kernels._spec import OPS
    from .ops import measure
    from .training.resolve import resolve

    for op in given.ours.op:
        if op not in OPS:
            raise UsageError(f"--op: no op {op!r}{did_you_mean(op, list(OPS))}")
    device = pick_device(given.cfg.system.device)
    if device.type != "cuda":
        raise UsageError(
            "tune: needs a CUDA device, and this PyTorch sees none; on a CPU nothing is measured"
        )
    found: dict[str, measure.Choice] = {}

    def choose(problems: list[measure.Problem]) -> dict[str, measure.Choice]:
        found.update(measure.tune_and_measure(problems, str(device), given.ours.op))
        return found

    resolve(given.cfg, device, choose=choose)
    for name, choice in found.items():
        _print(f"{name}: {choice.implementation or 'the fixed rule'}, {choice.reason}")
