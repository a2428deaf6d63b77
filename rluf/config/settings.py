"""The settings of all commands, checked by the rules between their keys."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from rluf.config.rules import find_first_violation
from rluf.config.tree import SettingsTree


class Settings(SettingsTree):
    """All settings of all commands. YAML files and key=value overrides fill it; `--dry-run` prints it."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        problem = find_first_violation(self)
        if problem is not None:
            raise ValueError(problem)
        return self
