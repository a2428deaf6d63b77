"""Plug-ins named in settings as package.module:name, or pickle:FILE for functions of a notebook."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rluf.errors import SettingsError


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
    `argument_count` arguments, if any. Raises SettingsError, with the `known_names` of built-in ones, for a reference
    without colon, a failed import, or an object of another type.
    """
    module_name, colon, object_name = reference.partition(":")
    names = ", ".join(sorted(known_names))
    hint = f"choose one of {names}, or name your own as package.module:name" if names else "write package.module:name"
    if not colon or not object_name:
        raise SettingsError(f"there is no {kind} {reference!r}; {hint}")
    try:
        if module_name == "pickle":
            plugin = _load_pickle(Path(object_name))
        else:
            # A relative name would be a TypeError.
            plugin = getattr(importlib.import_module(module_name.lstrip("./")), object_name)
    # Other errors raised by the import are bugs of the plug-in and keep their traceback.
    except (ImportError, AttributeError, OSError) as error:
        if module_name.endswith(".py"):
            hint = f"write {Path(module_name).stem}:{object_name}, without .py, and start from the folder of the file"
        raise SettingsError(f"{kind} {reference!r} cannot be imported: {error}; {hint}") from error
    if not isinstance(plugin, protocol):
        expected = signature or getattr(protocol, "__name__", str(protocol))
        raise SettingsError(f"{kind} {reference!r}: expected {expected}, got {type(plugin).__name__}; {hint}")
    if argument_count and callable(plugin):
        check_signature(plugin, f"{kind} {reference!r}", signature, argument_count)
    return plugin


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
