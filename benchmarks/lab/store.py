"""Results of the claims, computed once and stored as JSON by the world's fingerprint, so work can be interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import studies
from lab.candidates import (
    CANDIDATE_NAMES,
    HACK_PRICE,
    HACK_SPECS,
    RECIPE_VERSION,
    SPEC_BY_NAME,
    CandidateSet,
    PolicySpec,
)
from lab.dataset import ReplyDataset
from lab.replies import GroundTruthCache
from lab.simulated_world import ClaimWorld

from rluf.simulate.world import WORLD, fingerprint_world
from rluf.utils.files import atomic_write, to_jsonable

CLAIM_SEEDS = tuple(range(21, 29))
PHASE_SEEDS = CLAIM_SEEDS[:2]
"""Seeds of the phase diagram, which has no verdict."""
STAGES: Sequence[Sequence[tuple[str, str]]] = (
    [("study", "learnable"), *(("candidate", name) for name in ("w0", "w0.1", "w0.3", "w0.5", "judge", "permuted")),
     ("candidate", "w0-again"), ("candidate", "base-again")],
    [("study", "hacking")],
    [("study", "phase")],
    [("candidate", name) for name in CANDIDATE_NAMES],
    [("study", name) for name in ("refresh", "noise", "choice")],
)  # fmt: skip
"""Results in the order of computation: each stage for all seeds before the next."""


class ResultStore:
    """Results of all seeds: `candidate/<name>` and `study/<name>`."""

    def __init__(self, root: Path, seeds: Sequence[int] = CLAIM_SEEDS) -> None:
        """Store results in <root>/<fingerprint>-<recipe version>; claims are evaluated on `seeds`."""
        self.seeds, self.world_fingerprint = tuple(seeds), fingerprint_world()
        self.result_folder = root / f"{self.world_fingerprint}-{RECIPE_VERSION}"
        self._dataset: ReplyDataset | None = None
        self._world_by_price: dict[tuple[int, float], ClaimWorld] = {}
        self._candidates: dict[int, CandidateSet] = {}

    def load_world(self, seed: int, price: float = WORLD.love_signoff) -> ClaimWorld:
        """The world of a seed in which a sign-off adds `price` to the log-odds of a heart."""
        if (seed, price) not in self._world_by_price:
            self._dataset = self._dataset or ReplyDataset()
            folder = self.result_folder / f"seed{seed}" / f"price{price:g}"
            self._world_by_price[seed, price] = ClaimWorld(
                self._dataset, GroundTruthCache(self._dataset), seed, folder, replace(WORLD, love_signoff=price)
            )
        return self._world_by_price[seed, price]

    def load_candidates(self, seed: int) -> CandidateSet:
        """The candidates of a seed in the shipped world."""
        if seed not in self._candidates:
            self._candidates[seed] = CandidateSet(self.load_world(seed), SPEC_BY_NAME)
        return self._candidates[seed]

    def compute(self, seed: int, kind: str, name: str) -> Mapping[str, Any]:
        """Compute one result."""
        if kind == "candidate":
            return self.load_candidates(seed).measure(name)
        if name in ("hacking", "refresh"):
            candidates = CandidateSet(self.load_world(seed, HACK_PRICE), HACK_SPECS)
            return studies.study_hacking(candidates) if name == "hacking" else studies.study_refresh(candidates)
        if name == "phase":

            def load_candidates(price: float, specs: Mapping[str, PolicySpec]) -> CandidateSet:
                return CandidateSet(self.load_world(seed, price), specs)

            return studies.study_phase_diagram(load_candidates)
        world = self.load_world(seed)
        return {
            "learnable": studies.study_learnability,
            "noise": studies.study_label_noise,
            "choice": studies.study_signal_choice,
        }[name](world)

    def load_or_compute(self, seed: int, kind: str, name: str) -> dict[str, Any]:
        """Load one result, or compute and store it."""
        result_path = self._result_path(seed, kind, name)
        if not result_path.is_file():
            text = json.dumps(to_jsonable(self.compute(seed, kind, name)))
            with atomic_write(result_path) as partial_path:
                partial_path.write_text(text, "utf-8")
        return dict(json.loads(result_path.read_text("utf-8")))

    def load_stored(self, kind: str, name: str) -> dict[int, dict[str, Any]]:
        """Stored results by seed; seeds without one are left out."""
        paths = {seed: self._result_path(seed, kind, name) for seed in self.seeds}
        return {seed: json.loads(path.read_text("utf-8")) for seed, path in paths.items() if path.is_file()}

    def _result_path(self, seed: int, kind: str, name: str) -> Path:
        return self.result_folder / f"seed{seed}" / kind / f"{name}.json"

    def list_missing(self) -> Iterator[tuple[int, str, str]]:
        """Results that are not stored yet, those of the first stages first."""
        for stage in STAGES:
            for seed in self.seeds:
                for kind, name in stage:
                    is_planned = name != "phase" or seed in self.seeds[: len(PHASE_SEEDS)]
                    if is_planned and not self._result_path(seed, kind, name).is_file():
                        yield seed, kind, name

    def compute_missing(self, seconds: float, log_line: Callable[[str], None]) -> int:
        """Compute missing results until all exist or `seconds` of CPU are used; returns how many are left."""
        deadline = time.process_time() + seconds
        for seed, kind, name in self.list_missing():
            if time.process_time() > deadline:
                break
            started = time.process_time()
            self.load_or_compute(seed, kind, name)
            log_line(f"seed {seed} {kind} {name}: {time.process_time() - started:.1f} s")
        return len(set(self.list_missing()))
