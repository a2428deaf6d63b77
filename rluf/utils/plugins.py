"""Plug-ins named in settings as package.module:name, or pickle:FILE for functions of a notebook."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import stat
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rluf.errors import RlufError, SettingsError

IMPORT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NameError, OSError,
    pickle.PickleError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What a module with a mistake in it, or a damaged file of a function, raises when it is imported."""


def load_plugin(
    reference: str,
    protocol: type[Any] | Any = Callable,
    *,
    kind: str,
    known_names: Iterable[str] = (),
    signature: str = "",
    argument_count: int = 0,
) -> Any:
    """Import the object that `reference` (package.module:name) names, an instance of `protocol`.

    `kind` says in errors what it is, such as judge, and `signature` what is expected; a function must take
    `argument_count` arguments, if any, and must not be async. Raises SettingsError, with the `known_names` of built-in
    ones, for a reference without colon, a failed import (with file and line), or an object of another type.
    """
    module_name, _, object_name = reference.partition(":")
    names = ", ".join(sorted(known_names))
    hint = f"choose one of {names}, or name your own as package.module:name" if names else "write package.module:name"
    if not (module_name and object_name):
        raise SettingsError(f"there is no {kind} {reference!r}; {hint}")
    try:
        if module_name == "pickle":
            plugin = _load_pickle(Path(object_name))
        else:
            # A relative name would be a TypeError.
            plugin = getattr(importlib.import_module(module_name.lstrip("./")), object_name)
    except IMPORT_ERRORS as error:
        problem = getattr(error, "msg", error)
        if location := _find_error_location(error):
            problem, hint = f"{type(error).__name__} in {location}: {problem}", "correct that line"
        elif module_name == "pickle":
            hint = "pass the function to rluf.load_settings again"
        elif module_name.endswith(".py"):
            hint = f"write {Path(module_name).stem}:{object_name}, without .py, and start from the folder of the file"
        raise SettingsError(f"{kind} {reference!r} cannot be imported: {problem}; {hint}") from error
    if not isinstance(plugin, protocol):
        expected = signature or getattr(protocol, "__name__", str(protocol))
        raise SettingsError(f"{kind} {reference!r}: expected {expected}, got {type(plugin).__name__}; {hint}")
    if argument_count and callable(plugin):
        if inspect.iscoroutinefunction(plugin):
            raise SettingsError(f"{kind} {reference!r}: expected {signature}; an async one is not awaited here")
        check_signature(plugin, f"{kind} {reference!r}", signature, argument_count)
    return plugin


def _find_error_location(error: Exception) -> str:
    """File and line of the plug-in that failed, as text; empty where the plug-in itself was not found."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    own_locations = (f"{Path(__file__).parents[1]}{os.sep}", importlib.__file__, "<")
    frames = [frame for frame in frames if not frame[0].startswith(own_locations)]
    # The module's own line, and the line that failed, which may be in a module that it imports.
    locations = [f"{Path(path).name}, line {line}" for path, line in dict.fromkeys((*frames[:1], *frames[-1:]))]
    return " > ".join(locations)


class PluginErrors:
    """Block in which a plug-in is called: its exception becomes a SettingsError with `label`, its file and line."""

    def __init__(self, label: str) -> None:
        """`label` is what was called, such as judge 'mine:brief'."""
        self._label = label

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, error_type: object, error: BaseException | None, trace: object) -> None:
        """Raise the SettingsError; what the user need not correct (RlufError, Ctrl-C) passes."""
        if isinstance(error, Exception) and not isinstance(error, RlufError):
            location = f" in {location}" if (location := _find_error_location(error)) else ""
            raise SettingsError(f"{self._label} failed with {type(error).__name__}{location}: {error}") from error


def check_signature(function: Any, label: str, signature: str, argument_count: int) -> None:
    """Raise SettingsError unless the object takes so many arguments; `signature` says what it should be."""
    if not callable(function):
        raise SettingsError(f"{label}: expected {signature}, got {type(function).__name__} {str(function)[:100]!r}")
    try:
        inspect.signature(function).bind(*[None] * argument_count)
    except TypeError as error:
        raise SettingsError(f"{label}: expected {signature}; {error}") from None
    except ValueError:  # a built-in function without a signature
        pass


def _load_pickle(path: Path) -> Any:
    """The function that rluf.load_settings stored. The file is code, so it must be the user's own."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(
            f"{path}: expected a file that only its owner, the user of this process, can write; loading it runs code. "
            "Pass the function to rluf.load_settings again, or make run.cache a folder of your own"
        )
    return pickle.loads(path.read_bytes())
