"""Base class of every settings section, and the validator that refuses the lists of earlier releases."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

ActorCount = Annotated[int, Field(ge=1)]

ADVANCED = "advanced"
"""Marker of a setting that few runs change: `name: Annotated[float, ADVANCED] = 0.5`. The help lists these last."""


class SettingsSection(BaseModel):
    """A frozen group of settings; unknown keys are refused. Derived values are properties."""

    model_config = ConfigDict(
        frozen=True,  # actors of one run must never see different settings
        extra="forbid",
        validate_default=True,  # defaults go through the validators that convert entries
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,  # YAML reads name: 20250101 as a number
        allow_inf_nan=False,
    )


def refuse_list(example: str) -> BeforeValidator:
    """Validator of a mapping that refuses the list of strings of earlier releases, and shows `example` in its place."""

    def check_value(value: object) -> object:
        if isinstance(value, (list, tuple)):
            raise ValueError(f"expected a mapping, got a list; write one such as {example}")
        return value

    return BeforeValidator(check_value)


def is_advanced(field: FieldInfo) -> bool:
    """Whether the setting carries the marker ADVANCED."""
    return any(item is ADVANCED for item in field.metadata)
