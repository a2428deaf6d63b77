"""The part of --check that starts an engine and the learners, with stand-ins for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.models.hub import resolve_model
from rluf.train import startup_check
from rluf.train.actor_calls import ActorGroups, ActorRef

COLOCATED = ("cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc")


class StandInHandle:
    """An actor whose calls are recorded by name."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        async def answer(*_: object) -> tuple[None, None]:
            self._calls.append(name)
            return None, None

        answer.remote = answer  # type: ignore[attr-defined]
        return answer


def make_supervisor_class(calls: list[str]) -> Callable[..., Any]:
    class StandInSupervisor:
        def __init__(self, settings: Any, *_: object, **__: object) -> None:
            # As a real supervisor leaves them: where they share GPUs, the engines sleep while the learners start.
            self.actor_groups = ActorGroups(
                rollout_actors=[ActorRef("rollout", 0, StandInHandle(calls))],  # type: ignore[arg-type]
                learner_actors=[ActorRef("learner", 0, StandInHandle(calls))],  # type: ignore[arg-type]
                phase="learn" if settings.is_colocated else "generate",
            )

        async def __aenter__(self) -> StandInSupervisor:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

    return StandInSupervisor


class StandInSync:
    def __init__(self, *_: object) -> None:
        pass

    async def prepare_probe(self, _: object) -> None:
        pass

    def get_state(self) -> dict[str, float]:
        return {"worst_gap": 0.01}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), ["generate_group"] * 2), (COLOCATED, ["offload", "wake", *["generate_group"] * 2])],
    ids=["own devices", "shared GPU"],
)
async def test_the_engine_is_awake_when_it_is_compared(
    overrides: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(startup_check, "ActorSupervisor", make_supervisor_class(calls))
    monkeypatch.setattr(startup_check, "WeightSync", StandInSync)
    monkeypatch.setattr(startup_check, "put_object", lambda group: group)
    settings = load_settings(None, ["model.path=tiny", *overrides]).settings
    gaps = await startup_check.compare_engine_and_learner(settings, resolve_model("tiny", tmp_path))
    assert (calls, gaps) == (expected, [0.01, 0.01])
