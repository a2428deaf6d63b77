"""What single claims ask beyond the candidates: reward models on less, longer and dirtier data, mitigations, rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lab.candidates import Candidates
from lab.village import Village

Study = Callable[[Village, Candidates], dict[str, Any]]

STUDIES: dict[str, Study] = {}
"""Study by name."""
