"""The flags that every command shares: --config, --dry-run, --help, and key=value overrides."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rluf.config.cpu_dtype import AUTO
from rluf.config.load import DEFAULT, Loaded, fields, load_settings, parse_yaml
from rluf.errors import ResourceError, RlufError, SettingsError, TerminatedError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 130
TERMINATED = 143


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours, so that they look and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see python -m {self.prog} --help")


def parse(command: str, description: str, argv: Sequence[str] | None = None) -> Loaded:
    """Settings that the command line asks for. `command` is the module's name, such as train or rluf.train.

    --help and --dry-run write to stdout and leave with SystemExit(0); what is wrong with the command line or a settings
    file is one message on stderr and SystemExit(2). `argv` is without the program's name; None takes the process's own.
    """
    try:
        return _parse(
            f"rluf.{command.removeprefix('rluf.')}", description, sys.argv[1:] if argv is None else list(argv)
        )
    except SettingsError as error:
        _leave(f"error: {error}", error.exit_code)


def _parse(command: str, description: str, argv: list[str]) -> Loaded:
    parser = _Parser(
        prog=command,
        usage=f"python -m {command} [--config FILE] [--dry-run] [key=value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML; without it: the quickstart")
    parser.add_argument(
        "--dry-run", action="store_true", help="show all settings and what follows from them, do nothing"
    )
    if command == "rluf.train":
        parser.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint; the same as run.resume=latest"
        )
        parser.add_argument(
            "--profile", metavar="steps=N", help="profile N steps, from the second on; the same as run.profile_steps=N"
        )
    parser.add_argument("-h", "--help", action="store_true", help="show this and all settings, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change single settings")
    given = parser.parse_intermixed_args(argv)
    if given.help:
        sys.stdout.write(f"{parser.format_help()}\n{settings_help()}")
        raise SystemExit(0)
    flags = ["run.resume=latest"] if getattr(given, "resume", False) else []
    if (profile := getattr(given, "profile", None)) is not None:
        steps = profile.removeprefix("steps=")
        if not steps.isdecimal():
            parser.error(f"--profile takes steps=N, such as steps=3, not {profile!r}")
        flags.append(f"run.profile_steps={steps}")
    loaded = load_settings(given.config, [*given.overrides, *flags])
    if given.dry_run:
        sys.stdout.write(dry_run_text(loaded))
        raise SystemExit(0)
    return loaded


def guard(function: Callable[[], object]) -> int:
    """Run a command's work; returns 0. What a user can cause ends in one message on stderr, not in a traceback.

    RlufError leaves with SystemExit of its own code, Ctrl-C with 130, SIGTERM with 143. Both unwind the stack, so that
    actors are ended and nothing stays half-written.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        function()
    except TerminatedError as error:
        _leave(f"terminated: {error}", error.exit_code)
    except RlufError as error:
        _leave(f"error: {error}", error.exit_code)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or "the run folder, the cache or /tmp"
        _leave(
            f"error: {error.strerror} while writing {where}; free some space, or point run.root, run.cache or TMPDIR "
            "at a larger disk",
            ResourceError.exit_code,
        )
    except KeyboardInterrupt:
        _leave("interrupted: stopped before the end; finished stages are kept and reused by the next run", INTERRUPTED)
    return 0


def _leave(message: str, code: int) -> NoReturn:
    """End with a last line on stderr and this exit code; the code also where the line's own file has no room."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # what is still held back must not fail again when Python ends, which would change the code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code) from None


def _terminate(signum: int, _: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)
    _leave("terminated: stopped before the end; finished stages are kept and reused by the next run", TERMINATED)


def settings_help() -> str:
    """Every setting with its default and its one line of documentation."""
    defaults = flat(load_settings(None))
    lines = ["settings (key = default: meaning):"]
    for key, info in fields():
        about = " ".join((info.description or "").split())
        lines.append(f"  {key} = {defaults[key]}\n      {about}")
    return "\n".join(lines) + "\n"


def flat(loaded: Loaded) -> dict[str, str]:
    """Every value as YAML text by dotted key."""
    values: dict[str, str] = {}
    for key in loaded.sources:
        value: object = loaded.settings
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = _yaml(value)
    return values


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    text = str(value)
    return json.dumps(text) if isinstance(value, str) and parse_yaml(text, text) != text else text


def dry_run_text(loaded: Loaded) -> str:
    """The resolved tree as YAML that can be saved and used again, each value's source, then the derived figures."""
    from rluf.config.derived import describe

    lines: list[str] = []
    above: list[str] = []
    values = flat(loaded)
    for key, _ in fields():
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != above[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        above = sections
        text = f"{'  ' * len(sections)}{name}: {values[key]}"
        lines.append(f"{text:<60}  # {loaded.sources[key]}")
    changed = sum(source != DEFAULT and not source.startswith(AUTO) for source in loaded.sources.values())
    lines.append(
        f"\n# {changed} of {len(values)} settings come from a file or an override, the others from the defaults"
    )
    lines += [f"# {line}" for line in describe(loaded.settings)]
    return "\n".join(lines) + "\n"
