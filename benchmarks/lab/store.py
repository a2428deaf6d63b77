"""Results of the claims, computed once and stored as JSON by the world's fingerprint, so work can be interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.candidates import METHOD_VARIANTS, MITIGATIONS, RECIPE_VERSION, CandidateSet, measure_candidate
from lab.dataset import ReplyDataset
from lab.replies import GroundTruthCache
from lab.simulated_world import ClaimWorld
from lab.studies import STUDY_BY_NAME

from rluf.simulate.world import fingerprint_world
from rluf.utils.files import atomic_write, to_jsonable

CLAIM_SEEDS = (1, 2, 3)


class ResultStore:
    """Results of all seeds: `candidate/<name>` and `study/<name>`."""

    def __init__(self, root: Path, seeds: Sequence[int] = CLAIM_SEEDS) -> None:
        """Store results in <root>/<fingerprint>-<recipe version>; claims are evaluated on `seeds`."""
        self.seeds = tuple(seeds)
        self.result_folder, self.world_fingerprint = (
            root / f"{fingerprint_world()}-{RECIPE_VERSION}",
            fingerprint_world(),
        )
        self._dataset: ReplyDataset | None = None
        self._world_by_seed: dict[int, tuple[ClaimWorld, CandidateSet]] = {}

    def load_world(self, seed: int) -> tuple[ClaimWorld, CandidateSet]:
        """The world of a seed and its candidates."""
        if seed not in self._world_by_seed:
            self._dataset = self._dataset or ReplyDataset()
            world = ClaimWorld(self._dataset, GroundTruthCache(self._dataset), seed, self.result_folder / f"seed{seed}")
            self._world_by_seed[seed] = world, CandidateSet(world)
        return self._world_by_seed[seed]

    def load_or_compute(self, seed: int, kind: str, name: str) -> dict[str, Any]:
        """Load one result, or compute and store it."""
        result_path = self._result_path(seed, kind, name)
        if not result_path.is_file():
            world, candidates = self.load_world(seed)
            started = time.process_time()
            result = (
                measure_candidate(world, candidates.build_candidate(name))
                if kind == "candidate"
                else STUDY_BY_NAME[name](world, candidates)
            )
            text = json.dumps(to_jsonable({**result, "all_cpu_seconds": round(time.process_time() - started, 2)}))
            with atomic_write(result_path) as partial_path:
                partial_path.write_text(text, "utf-8")
        return dict(json.loads(result_path.read_text("utf-8")))

    def load_all(self, kind: str, names: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Results [seeds][names]."""
        return [[self.load_or_compute(seed, kind, name) for name in names] for seed in self.seeds]

    def _result_path(self, seed: int, kind: str, name: str) -> Path:
        return self.result_folder / f"seed{seed}" / kind / f"{name}.json"

    def missing_results(self) -> Iterator[tuple[int, str, str]]:
        """Results that are not stored yet, those used by most claims first."""
        stages = [
            [("study", "learnable"), *(("candidate", name) for name in (*CandidateSet.all_names()[:5], "judge"))],
            [("candidate", name) for name in (*CandidateSet.all_names(), *MITIGATIONS)],
            [
                ("study", "size"),
                *(("candidate", name) for name in METHOD_VARIANTS),
                *(("study", name) for name in STUDY_BY_NAME),
            ],
        ]
        for stage in stages:
            for seed in self.seeds:
                for kind, name in stage:
                    if not self._result_path(seed, kind, name).is_file():
                        yield seed, kind, name

    def compute_missing(self, seconds: float, log_line: Callable[[str], None]) -> int:
        """Compute missing results until all exist or `seconds` of CPU are used; returns how many are left."""
        deadline = time.process_time() + seconds
        for seed, kind, name in self.missing_results():
            if time.process_time() > deadline:
                break
            started = time.process_time()
            self.load_or_compute(seed, kind, name)
            log_line(f"seed {seed} {kind} {name}: {time.process_time() - started:.1f} s")
        return sum(1 for _ in self.missing_results())
