"""The command line: `burnish <recipe or tool> [settings.yaml] key=value ...`, found by file name."""

import ast
import importlib
import inspect
import os
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType

import burnish
from burnish.config import ConfigError, Stopped, UnknownKey, fields, nearest_name, parse

FLAGS = {
    "--help": "show this and stop",
    "--json": "print one JSON object and nothing else (tools)",
    "--traceback": "on an error, show where in the code it came from",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit status: 0, 1 after an error, 2 for a wrong command line, 130 when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        _show(_overview())
        return 0
    if words[0] == "--version":
        print(burnish.__version__)
        return 0
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _stop) if main_thread else None
    try:
        return _run(words)
    except (ConfigError, ValueError, OSError, MemoryError, ImportError, ArithmeticError) as error:
        if "--traceback" in words:
            traceback.print_exc()
        print(f"burnish {words[0]}: {_told(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(
            f"burnish {words[0]}: stopped; a run goes on from its last checkpoint with save.resume=true",
            file=sys.stderr,
        )
        return 130
    except Stopped as stopped:
        print(f"burnish {words[0]}: {stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named because torch is not imported here
            raise
        print(f"burnish {words[0]}: {_told(MemoryError())} ({' '.join(str(error).split())})", file=sys.stderr)
        return 1
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _told(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory: model.storage=nf4, a smaller run.microbatch_tokens or another device needs less"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _run(words: list[str]) -> int:
    name, rest = words[0], words[1:]
    commands = _commands()
    if name not in commands:
        nearest = nearest_name(name, list(commands))
        hint = f"did you mean '{nearest}'?" if nearest else f"there are {', '.join(commands)}"
        raise ConfigError(f"there is no recipe or tool '{name}'; {hint}")
    module = importlib.import_module(commands[name][0])
    flags = {word for word in rest if word in (*FLAGS, "-h")}
    rest = [word for word in rest if word not in flags]
    if flags & {"--help", "-h"}:
        _show(_help(name, module))
        return 0
    extra: list[object] = []
    if actions := getattr(module, "ACTIONS", ()):
        if not rest or rest[0] not in actions:
            raise ConfigError(f"write burnish {name} {'|'.join(actions)} key=value ...")
        extra.append(rest.pop(0))
    if "as_json" in inspect.signature(module.main).parameters:
        extra.append("--json" in flags)
    elif "--json" in flags:
        raise ConfigError(f"--json is for tools; {name} writes results.json into its run folder")
    try:
        config = parse(module.Config, rest)
    except UnknownKey as error:
        raise ConfigError(_unknown(name, error, commands)) from None
    module.main(config, *extra)
    return 0


def _show(text: str) -> None:
    """Print a text of which the reader may want the beginning alone, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed when Python ends


def _unknown(name: str, error: UnknownKey, commands: Mapping[str, tuple[str, str, str]]) -> str:
    """What to say of a key that this command has not: which others have it, if any do, and what there is instead."""
    modules = {other: importlib.import_module(module) for other, (module, *_) in commands.items()}
    known = {other: [key for key, *_ in fields(module.Config)] for other, module in modules.items()}
    having = ", ".join(other for other, keys in known.items() if error.key in keys)
    group, _, last = error.key.rpartition(".")
    if not having:
        return str(error)
    if any(key.rpartition(".")[2] == last for key in known[name]):  # its own word for the same thing
        return f"{error} ('{error.key}' is a setting of {having})"
    beside = [key for key in known[name] if group and key.rpartition(".")[0] == group]
    here = f"{name} has {', '.join(beside)}" if beside else "--help lists the keys"
    return f"'{error.key}' is a setting of {having}, not of {name}: {here}"


def _commands() -> dict[str, tuple[str, str, str]]:
    """Name -> (module, kind, first sentence) of every recipe and tool, read from the files without importing them."""
    found: dict[str, tuple[str, str, str]] = {}
    for kind in ("recipes", "tools"):
        for path in sorted((Path(__file__).parent / kind).glob("*.py")):
            if path.stem != "__init__":
                sentence = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
                found[path.stem] = (f"burnish.{kind}.{path.stem}", kind, " ".join(sentence.split()))
    return found


def _overview() -> str:
    lines = [burnish.__doc__ or "", "", "usage: burnish <recipe or tool> [settings.yaml] key=value ..."]
    commands = _commands()
    width = max(map(len, commands))
    for kind in ("recipes", "tools"):
        lines += ["", f"{kind}:"]
        for name, (_, of_kind, sentence) in commands.items():
            if of_kind == kind:
                lines.append(_entry(name, sentence, width))
    lines += ["", "burnish <name> --help lists its settings. An example that runs anywhere:"]
    lines += ["  burnish sft model.path=embedded data.path=embedded run.folder=runs/first run.steps=20"]
    return "\n".join(lines)


def _help(name: str, module: ModuleType) -> str:
    actions = f" {'|'.join(module.ACTIONS)}" if hasattr(module, "ACTIONS") else ""
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")
    lines = ["\n\n".join(textwrap.fill(" ".join(text.split()), _width()) for text in paragraphs), ""]
    lines += [f"usage: burnish {name}{actions} [settings.yaml] key=value ...", ""]
    group = ""
    for key, kind, default, sentence in fields(module.Config):
        if key.rpartition(".")[0] != group:
            group = key.rpartition(".")[0]
            lines.append("")
        lines.append(f"  {key}={default}")
        lines.append(textwrap.fill(f"{sentence} [{kind}]", _width(), initial_indent=" " * 6, subsequent_indent=" " * 6))
    lines.append("")
    lines += [_entry(flag, sentence, 11) for flag, sentence in FLAGS.items()]
    return "\n".join(lines)


def _entry(name: str, sentence: str, width: int) -> str:
    indent = " " * (width + 4)
    return textwrap.fill(f"  {name:<{width}}  {sentence}", _width(), subsequent_indent=indent)


def _width() -> int:
    """Columns of text: the terminal's, but no more than are read with ease."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)
