"""Caches of their own for tests that must not reuse artifacts, without building the embedded models again."""

from __future__ import annotations

from pathlib import Path

from rluf.config.settings import Settings
from rluf.utils.paths import resolve_cache_folder


def link_models(cache_folder: Path) -> Path:
    """Make `models` in the new folder a link to that of the default cache; returns the folder.

    SmolLM2 takes 20 s of a core to convert, and no test but those of the conversion checks that it happens.
    """
    models_folder = resolve_cache_folder(Settings()) / "models"
    models_folder.mkdir(parents=True, exist_ok=True)
    cache_folder.mkdir(parents=True)
    (cache_folder / "models").symlink_to(models_folder)
    return cache_folder
