"""What a complete set of weights is, so that an engine can refuse a wrong or partial update."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import safe_open

from rluf.errors import SyncError


class Checklist:
    """Which tensors an update must bring, by name and shape, and which have come.

    The list is that of the checkpoint the engine started from, plus lm_head.weight when embeddings are tied: the
    engine's output head is a repacked copy, and without a new one it silently goes on with the old weights.
    """

    def __init__(self, folder: Path, tied: bool) -> None:
        """Read names and shapes from the safetensors headers in `folder`."""
        self.expected = checkpoint_shapes(folder)
        self.copied: str | None = None
        """The tensor that is sent as lm_head.weight too, where embeddings are tied and the folder holds no head."""
        embeddings = [n for n in self.expected if n.endswith("embed_tokens.weight")]
        if tied and "lm_head.weight" not in self.expected and len(embeddings) == 1:
            self.copied = embeddings[0]
            self.expected["lm_head.weight"] = self.expected[self.copied]
        self._seen: set[str] = set()

    def start(self) -> None:
        """Forget what has come."""
        self._seen.clear()

    def admit(self, arriving: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Tick off (name, shape) pairs; SyncError if one is unknown, has another shape, or comes twice."""
        for name, shape in arriving:
            if name not in self.expected:
                raise SyncError(f"the learner sent {name}, which the engine's checkpoint does not hold")
            if tuple(shape) != self.expected[name]:
                raise SyncError(f"the learner sent {name} as {tuple(shape)}; the engine holds {self.expected[name]}")
            if name in self._seen:
                raise SyncError(f"the learner sent {name} twice in one publish")
            self._seen.add(name)

    def finish(self) -> None:
        """SyncError naming tensors that never came."""
        missing = sorted(self.expected.keys() - self._seen)
        if missing:
            some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise SyncError(f"{len(missing)} of {len(self.expected)} tensors were not sent: {some}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder that hold its weights: those of the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight in a Hugging Face folder; reads headers only, no weights.

    Rotary frequencies, which old checkpoints carry, are computed and not weights: they are left out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in sorted(handle.keys()):
                if not name.endswith("rotary_emb.inv_freq"):
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes
