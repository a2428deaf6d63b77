"""Base class of every settings section, and the validator that refuses the lists of earlier releases."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
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

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true where a number is expected: pydantic reads it as 1."""
        items = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        field = cls.model_fields.get(info.field_name or "")
        if field is not None and any(isinstance(item, bool) for item in items):
            leaf_types = _list_leaf_types(field.annotation)
            if leaf_types & {int, float} and bool not in leaf_types:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _list_leaf_types(annotation: Any) -> set[type]:
    """Types in an annotation, such as int and float in tuple[int, ...] | float."""
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation}
    return {leaf for argument in get_args(annotation) for leaf in _list_leaf_types(argument)}


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
