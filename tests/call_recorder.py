"""Records which files of the repository are entered, and reads the walks of docs/architecture.md."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("rluf", "actors", "cluster"))
NOT_PART_OF_A_WALK = ("rluf/config/", "rluf/tracking/", "rluf/utils/", "rluf/errors.py", "rluf/types.py")
"""docs/architecture.md states this rule."""
WALK_ROW = re.compile(r"^\| *\d+ *\| *`([^`]+)` *\|", re.MULTILINE)

_entered: set[str] = set()
_seen_code: set[int] = set()


def start_recording() -> None:
    """Record functions entered on this thread and on threads that start from now on."""
    _entered.clear()
    _seen_code.clear()
    threading.setprofile(_record_call)
    sys.setprofile(_record_call)


def stop_recording() -> list[str]:
    """The files entered since `start_recording`, relative to the repository."""
    sys.setprofile(None)
    threading.setprofile(None)
    return sorted(path.removeprefix(f"{ROOT}/") for path in _entered)


def _record_call(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    # Resumed generators and coroutines are calls too: a file counts where any of its code runs.
    if event != "call" or id(code) in _seen_code:
        return
    _seen_code.add(id(code))
    if code.co_filename.startswith(PACKAGES) and not _is_importing(frame):
        _entered.add(code.co_filename)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: its decorators and class bodies are no step of a walk."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def read_walk(heading: str) -> set[str]:
    """The files in the numbered table below a heading of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (section,) = (part for part in re.split(r"^#+ ", page, flags=re.MULTILINE) if part.startswith(f"{heading}\n"))
    return set(WALK_ROW.findall(section))


def list_walk(entered: list[str]) -> set[str]:
    """The entered files that belong to a walk."""
    return {path for path in entered if not path.startswith(NOT_PART_OF_A_WALK)}
