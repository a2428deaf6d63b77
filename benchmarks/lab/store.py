"""Results are made once, part by part, and kept as JSON under the world's fingerprint: long work can be cut up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.candidates import FIXES, METHODS, RECIPE, Candidates, measured
from lab.dataset import Town
from lab.replies import Truth
from lab.simulated_world import Village
from lab.studies import STUDIES

from rluf.simulate.world import fingerprint
from rluf.tracking.run_files import jsonable

SEEDS = (1, 2, 3)


class Store:
    """Every part of every seed: `candidate/<name>` and `study/<name>`."""

    def __init__(self, root: Path, seeds: Sequence[int] = SEEDS) -> None:
        """Results go to <root>/<fingerprint of world and recipe>; claims are told of `seeds`."""
        self.seeds = tuple(seeds)
        self.root, self.world = root / f"{fingerprint()}-{RECIPE}", fingerprint()
        self._town: Town | None = None
        self._villages: dict[int, tuple[Village, Candidates]] = {}

    def village(self, seed: int) -> tuple[Village, Candidates]:
        """The village of a seed and its candidates."""
        if seed not in self._villages:
            self._town = self._town or Town()
            village = Village(self._town, Truth(self._town), seed, self.root / f"seed{seed}")
            self._villages[seed] = village, Candidates(village)
        return self._villages[seed]

    def part(self, seed: int, kind: str, name: str) -> dict[str, Any]:
        """One part, made if it is not there."""
        file = self._file(seed, kind, name)
        if not file.is_file():
            village, candidates = self.village(seed)
            started = time.process_time()
            found = (
                measured(village, candidates.make(name)) if kind == "candidate" else STUDIES[name](village, candidates)
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(jsonable({**found, "all_cpu_seconds": round(time.process_time() - started, 2)}))
            scratch = file.with_suffix(".part")
            scratch.write_text(text, "utf-8")
            scratch.rename(file)
        return dict(json.loads(file.read_text("utf-8")))

    def parts(self, kind: str, names: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Parts [seeds][names]."""
        return [[self.part(seed, kind, name) for name in names] for seed in self.seeds]

    def _file(self, seed: int, kind: str, name: str) -> Path:
        return self.root / f"seed{seed}" / kind / f"{name}.json"

    def missing(self) -> Iterator[tuple[int, str, str]]:
        """Parts that are not there yet, those that most claims rest on first."""
        turns = [
            [("study", "learnable"), *(("candidate", name) for name in (*Candidates.names()[:5], "judge"))],
            [("candidate", name) for name in (*Candidates.names(), *FIXES)],
            [("study", "size"), *(("candidate", name) for name in METHODS), *(("study", name) for name in STUDIES)],
        ]
        for turn in turns:
            for seed in self.seeds:
                for kind, name in turn:
                    if not self._file(seed, kind, name).is_file():
                        yield seed, kind, name

    def fill(self, seconds: float, say: Callable[[str], None]) -> int:
        """Make missing parts until all are there or `seconds` of CPU are used up; how many are left."""
        ends = time.process_time() + seconds
        for seed, kind, name in self.missing():
            if time.process_time() > ends:
                break
            started = time.process_time()
            self.part(seed, kind, name)
            say(f"seed {seed} {kind} {name}: {time.process_time() - started:.1f} s")
        return sum(1 for _ in self.missing())
