"""The probe of a weight sync: more tokens on GPUs, and a problem must be there in two readings."""

from __future__ import annotations

import pytest

from rluf.algorithms.sync_check import ProbeLogprobs
from rluf.config.load import load_settings
from rluf.errors import WeightSyncError
from rluf.train import weight_sync
from rluf.train.actor_calls import ActorGroups, ActorRef
from rluf.train.weight_sync import WeightSync, shorten_probe_prompt

LEARNER = (-1.0, -2.0)


class RecordedSync(WeightSync):
    """A weight sync whose probe readings are given: mean gaps in nats per token of one engine, in order."""

    def __init__(self, *gaps: float) -> None:
        actor_groups = ActorGroups(rollout_actors=[ActorRef("rollout", 0, None)])
        super().__init__(load_settings(None).settings, actor_groups)
        self.gaps = list(gaps)
        self._probe_logprobs, self._worst_gap = {"rollout 0": ProbeLogprobs(LEARNER, LEARNER)}, 0.01

    async def _read_probe_logprobs(self) -> dict[str, ProbeLogprobs]:
        gap = self.gaps.pop(0)
        return {"rollout 0": ProbeLogprobs((-1.1, -2.1), (-1.1 + gap, -2.1 - gap))}


@pytest.mark.parametrize(
    ("gaps", "reads", "is_wrong"),
    [
        ([0.01, 0.01], 1, False),
        ([0.5, 0.01], 2, False),  # a single outlier
        ([0.04, 0.02], 2, False),  # a jump that the second reading does not confirm
        ([float("nan"), 0.01], 2, False),
        ([0.5, 0.5], 2, True),
        ([0.04, 0.05], 2, True),
        ([float("nan"), float("nan")], 2, True),
    ],
)
async def test_a_problem_is_read_twice_before_it_stops_a_run(gaps: list[float], reads: int, is_wrong: bool) -> None:
    sync = RecordedSync(*gaps)
    if is_wrong:
        with pytest.raises(WeightSyncError, match=r"rollout 0 disagrees with the learner: .*, twice after sync 3"):
            await sync._verify_logprobs(3)
    else:
        assert await sync._verify_logprobs(3) == pytest.approx(gaps[reads - 1])
    assert len(gaps) - len(sync.gaps) == reads


@pytest.mark.parametrize(("overrides", "expected"), [([], 24), (["cluster.gpus_per_learner=1"], 256)])
async def test_the_probe_is_longer_on_gpus(overrides: list[str], expected: int) -> None:
    from rluf.types import Group, Prompt, Sample

    samples = tuple(Sample("", (1, 2), tuple(range(70)), (0.0,) * 70, (), "stop", "") for _ in range(8))
    sync = WeightSync(load_settings(None, overrides).settings, ActorGroups())
    group = Group(Prompt("", (), (1, 2), "", ""), samples, 0)

    async def fetch(_: object) -> Group:
        return group

    original, weight_sync.fetch_group = weight_sync.fetch_group, fetch  # type: ignore[assignment]
    try:
        await sync._prepare_probe_once(None)  # type: ignore[arg-type]
    finally:
        weight_sync.fetch_group = original
    assert sum(map(len, sync._probe_responses)) == expected


@pytest.mark.parametrize(
    ("gap", "is_wrong"), [(0.0, False), (0.14, False), (0.16, True), (1.88, True), (float("nan"), True)]
)
async def test_the_first_gap_is_judged_before_the_first_update(gap: float, is_wrong: bool) -> None:
    """Weights that a folder lacks are random on both sides: the first reading is wrong, and no later one jumps."""
    sync = RecordedSync(gap)
    sync._probe_responses, sync._probe_logprobs, sync._worst_gap = [[3]], {}, 0.0
    if is_wrong:
        with pytest.raises(WeightSyncError, match=r"rollout 0 and the learner read the same weights differently"):
            await sync._prepare_probe_once(None)  # type: ignore[arg-type]
        assert sync._probe_logprobs == {}
    else:
        await sync._prepare_probe_once(None)  # type: ignore[arg-type]
        assert sync._worst_gap == pytest.approx(gap)


@pytest.mark.parametrize(
    ("gap", "is_wrong"), [(0.0, False), (0.14, False), (0.16, True), (1.88, True), (float("nan"), True)]
)
async def test_an_engine_that_restarts_before_the_first_update_is_judged(
    gap: float, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = RecordedSync()
    sync._probe_responses = [[3]]
    engine = sync._actor_groups.rollout_actors[0]
    # The engine has a sync of its own.
    monkeypatch.setattr(WeightSync, "_read_probe_logprobs", lambda _: RecordedSync(gap)._read_probe_logprobs())
    if is_wrong:
        with pytest.raises(WeightSyncError, match=r"rollout 0 and the learner read the same weights differently"):
            await sync.sync_new_engine(engine, 0, needs_weights=False)
    else:
        await sync.sync_new_engine(engine, 0, needs_weights=False)


@pytest.mark.parametrize(("length", "expected"), [(5, 5), (128, 128), (129, 128), (4096, 128)])
def test_the_probe_reads_the_head_and_the_tail_of_a_long_prompt(length: int, expected: int) -> None:
    token_ids = list(range(length))
    shortened = shorten_probe_prompt(token_ids)
    assert len(shortened) == expected and shortened[:5] == token_ids[:5] and shortened[-5:] == token_ids[-5:]
