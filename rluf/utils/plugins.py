"""Plug-ins named in settings as package.module:name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from rluf.errors import SettingsError


def load_plugin(
    reference: str,
    protocol: type[Any] | Any = Callable,
    *,
    kind: str,
    known_names: Iterable[str] = (),
    signature: str = "",
) -> Any:
    """Import the object that `reference` (package.module:name) names, an instance of `protocol`.

    `kind` says in errors what it is, such as judge, and `signature` what is expected. Raises SettingsError, with the
    `known_names` of built-in ones, for a reference without colon, a failed import, or an object of another type.
    """
    module_name, colon, object_name = reference.partition(":")
    names = ", ".join(sorted(known_names))
    hint = f"choose one of {names}, or name your own as package.module:name" if names else "write package.module:name"
    if not colon or not object_name:
        raise SettingsError(f"there is no {kind} {reference!r}; {hint}")
    try:
        plugin = getattr(importlib.import_module(module_name), object_name)
    # Other errors raised by the import are bugs of the plug-in and keep their traceback.
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"{kind} {reference!r} cannot be imported: {error}; {hint}") from error
    if not isinstance(plugin, protocol):
        expected = signature or getattr(protocol, "__name__", str(protocol))
        raise SettingsError(f"{kind} {reference!r}: expected {expected}, got {type(plugin).__name__}; {hint}")
    return plugin
