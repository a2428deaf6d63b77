"""Command-line options shared by all commands: --config, --dry-run, --help, and key=value overrides."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import BaseModel

from rluf.config.base import is_advanced
from rluf.config.cpu_dtype import AUTO_DTYPE
from rluf.config.load import (
    DEFAULT_SOURCE,
    QUICKSTART,
    LoadedSettings,
    iter_setting_fields,
    list_further_objectives,
    load_settings,
    parse_yaml,
    suggest_key,
)
from rluf.config.settings import Settings
from rluf.errors import DISK_FULL_ERRNOS, ResourceError, RlufError, SettingsError, TerminatedError

INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, `python -m prog`; its errors are one message and exit code 2, like those of settings."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(f"python -m {prog}", formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with the message, and a hint where an option does not exist."""
        unknown_option = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown_option != message.split()[0] and unknown_option.startswith("-"):
            message += self._suggest_option(unknown_option)
        if re.search(r"invalid \w+ value: '[^']*,", message):
            message += "; separate the values by spaces"
        if "ignored explicit argument" in message:
            message += "; the option takes no value"
        _exit_with_message(f"error: {message}; see {self.prog} --help", SettingsError.exit_code)

    def _suggest_option(self, unknown_option: str) -> str:
        """Hint for an option that does not exist: a similar option, or a setting written like an option."""
        name = unknown_option.partition("=")[0]
        similar_options = difflib.get_close_matches(name.replace("_", "-"), self._option_string_actions, 1, cutoff=0.75)
        if similar_options:
            return f"; did you mean {similar_options[0]}?"
        if not any(action.dest == "overrides" for action in self._actions):
            return ""
        hint = suggest_key(name.lstrip("-").replace("-", "_"))
        return f"; settings are written key=value, without dashes; {hint}"


@dataclass(frozen=True, slots=True)
class CommandOptions:
    """Options of one command in addition to the shared ones."""

    add: Callable[[argparse.ArgumentParser], None]
    """Adds them to the parser."""
    to_overrides: Callable[[argparse.Namespace], list[str]] = field(default=lambda _: [])
    """key=value overrides that they stand for; raises SettingsError for an invalid value."""
    check: Callable[[Settings], None] = field(default=lambda _: None)
    """Check of the settings in --dry-run, so that it refuses what the command would refuse; raises RlufError."""
    subcommands: tuple[str, ...] = ()
    """Names for messages; the command itself runs them before it parses the other options."""


def parse_command_line(
    command: str, description: str, arguments: Sequence[str] | None = None, options: CommandOptions | None = None
) -> LoadedSettings:
    """Load the settings that a command line selects. `command` is a module name, such as train or rluf.train.

    --help and --dry-run write to stdout and exit with SystemExit(0). An invalid command line or settings file ends with
    one message on stderr and SystemExit(2). `arguments` excludes the program name; None reads sys.argv. The values of
    the command's own options are in `options` of the result.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _parse_arguments(f"rluf.{command.removeprefix('rluf.')}", description, arguments, options)
    except RlufError as error:
        _exit_with_message(f"error: {error}", error.exit_code)


def _parse_arguments(
    command: str, description: str, arguments: Sequence[str], options: CommandOptions | None
) -> LoadedSettings:
    parser = CommandParser(
        command,
        usage=f"python -m {command} [--config FILE] [--dry-run] [key=value ...]",
        description=description,
        add_help=False,  # --help also prints all settings, which argparse's own action cannot
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=QUICKSTART,
        metavar="FILE",
        help="YAML settings file, or the name of a shipped one (tiny, human); without it: the quickstart",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print all settings and the figures derived from them, then exit"
    )
    if options is not None:
        options.add(parser)
    parser.add_argument("-h", "--help", action="store_true", help="print this and all settings, then exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override single settings")
    # Intermixed, so that key=value overrides may come before, between and after options.
    namespace = parser.parse_intermixed_args(arguments)
    if namespace.help:
        sys.stdout.write(f"{parser.format_help()}\n{format_settings_help()}")
        raise SystemExit(0)
    words = [word for word in namespace.overrides if "=" not in word]
    if words and options is not None and options.subcommands:
        names = ", ".join(options.subcommands)
        raise SettingsError(
            f"{words[0]!r} is neither a sub-command ({names}) nor key=value; see python -m {command} --help"
        )
    option_overrides = [] if options is None else options.to_overrides(namespace)
    loaded = replace(load_settings(namespace.config, [*namespace.overrides, *option_overrides]), options=namespace)
    if namespace.dry_run:
        if options is not None:
            options.check(loaded.settings)
        sys.stdout.write(format_dry_run(loaded))
        raise SystemExit(0)
    return loaded


def run_command(function: Callable[[], object]) -> int:
    """Run a command's function and return 0. Errors that a user can cause print one message instead of a traceback.

    RlufError exits with its own code, Ctrl-C with 130, SIGTERM with 143. Both signals unwind the stack, so that actors
    are ended and no file is half-written.
    """
    signal.signal(signal.SIGTERM, _handle_sigterm)
    try:
        function()
    except TerminatedError as error:
        _exit_with_message(f"terminated: {error}", error.exit_code)
    except RlufError as error:
        _exit_with_message(f"error: {error}", error.exit_code)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        path = error.filename or "the run folder, the cache or /tmp"
        _exit_with_message(
            f"error: {error.strerror} while writing {path}; free some space, or point run.root, run.cache or TMPDIR "
            "at a larger disk",
            ResourceError.exit_code,
        )
    except KeyboardInterrupt:
        _exit_with_message(
            "interrupted: stopped early; finished artifacts are cached and reused by the next run",
            INTERRUPTED_EXIT_CODE,
        )
    return 0


def _exit_with_message(message: str, exit_code: int) -> NoReturn:
    """Exit with a last line on stderr and this exit code, even when stdout or stderr is a file on a full disk."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            # The unwritten buffer would fail again at interpreter exit and replace the exit code by 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(exit_code) from None


def _handle_sigterm(signum: int, _: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)  # a second SIGTERM must not interrupt the cleanup
    _exit_with_message(
        "terminated: stopped early; finished artifacts are cached and reused by the next run", TERMINATED_EXIT_CODE
    )


def format_settings_help() -> str:
    """Every setting with its default and its description, the advanced ones last."""
    defaults = flatten_settings(load_settings(None))
    sections: dict[bool, list[str]] = {False: [], True: []}
    for key, info in iter_setting_fields():
        description = " ".join((info.description or "").split())
        sections[is_advanced(info)].append(f"  {key} = {defaults[key]}\n      {description}")
    lines = ["settings (key = default: meaning):", *sections[False]]
    lines += ["", "advanced settings, whose defaults suit most runs:", *sections[True]]
    lines.append(
        "  objectives.<name>.*, reward.<name>.*\n      A further objective of any name, and its reward model: the same "
        "keys as those of love."
    )
    return "\n".join(lines) + "\n"


def flatten_settings(loaded: LoadedSettings) -> dict[str, str]:
    """Every value as YAML text, by dotted key."""
    values: dict[str, str] = {}
    for key in loaded.sources:
        value: object = loaded.settings
        for name in key.split("."):
            value = getattr(value, name)
        values[key] = format_yaml_value(value)
    return values


def format_yaml_value(value: object) -> str:
    """`value` as YAML on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(format_yaml_value(item) for item in value)}]"
    if isinstance(value, BaseModel):
        return format_yaml_value(value.model_dump(exclude_defaults=True))
    if isinstance(value, Mapping):
        items = (f"{format_yaml_value(key)}: {format_yaml_value(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    text = str(value)
    # Inside [] and {} a comma, bracket or ": " ends plain text, so such text is quoted although it is valid outside.
    has_flow_syntax = isinstance(value, str) and any(mark in text for mark in (",", "[", "]", "{", "}", ": ", " #"))
    if isinstance(value, str) and (has_flow_syntax or parse_yaml(text, text) != text):
        return json.dumps(text)
    return text


def format_dry_run(loaded: LoadedSettings) -> str:
    """The resolved settings as YAML that can be saved and loaded, each value's source, then the derived figures."""
    from rluf.config.derived import format_derived_figures

    lines: list[str] = []
    open_sections: list[str] = []
    values = flatten_settings(loaded)
    for key, _ in iter_setting_fields(list_further_objectives(loaded.settings)):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != open_sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        text = f"{'  ' * len(sections)}{name}: {values[key]}"
        lines.append(f"{text:<60}  # {loaded.sources[key]}")
    # A resolved dtype has a source of its own, although no file or override set it.
    changed_count = sum(
        source != DEFAULT_SOURCE and not source.startswith(AUTO_DTYPE) for source in loaded.sources.values()
    )
    lines.append(
        f"\n# {changed_count} of {len(values)} settings come from a file or an override, the others are defaults"
    )
    lines += [f"# {line}" for line in format_derived_figures(loaded.settings)]
    return "\n".join(lines) + "\n"
