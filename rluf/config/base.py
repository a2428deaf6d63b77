"""Base class of every settings section, and the validator that refuses the old `name:value` strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

ActorCount = Annotated[int, Field(ge=1)]


class SettingsSection(BaseModel):
    """A frozen group of settings; unknown keys are refused. Derived values are properties."""

    model_config = ConfigDict(
        frozen=True,  # actors of one run must never see different settings
        extra="forbid",
        validate_default=True,  # defaults go through the validators that convert entries
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,  # YAML reads name: 20250101 as a number
    )


def mapping_from_entries(value: object, split_entry: Callable[[str], tuple[str, str]]) -> object:
    """Return a mapping unchanged; refuse the list of `name:value` strings that earlier releases used.

    The error shows the same entries as a mapping, so that a settings file can be corrected by copy and paste.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if not value:
        raise ValueError("expected a mapping, got an empty list; write {}")
    pairs = [split_entry(str(entry)) for entry in value]
    mapping = ", ".join(f"{name}: {rest}" for name, rest in pairs)
    raise ValueError(f"expected a mapping, got a list; write {{{mapping}}}")


def split_at_last_colon(entry: str) -> tuple[str, str]:
    """`name` and `value` of an entry `name:value`; the name itself may contain colons."""
    name, _, rest = entry.rpartition(":")
    return name, rest


def split_at_first_colon(entry: str) -> tuple[str, str]:
    """`name` and `value` of an entry `name:value`; the value itself may contain colons, as URLs do."""
    name, _, rest = entry.partition(":")
    return name, rest
