import pytest

from rluf.config.load import load_settings
from rluf.errors import SettingsError


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objectives.safety.source=judge"], ["objectives.safety.judge", "none"]),
        (["objectives.safety.judge=refusal"], ["objectives.safety.source=model", "objectives.safety.judge=refusal"]),
        (
            ["objectives.love={source: judge, judge: refusal, path: x}"],
            ["objectives.love.source=judge", "objectives.love.path=x"],
        ),
        ([f"objectives.{n}.weight=0" for n in ("love", "helpfulness", "safety")], ["all 0"]),
        (["reward.love.loss=bradley_terry"], ["reward.love.loss=bce"]),
        (["rollout.tensor_parallel=2"], ["rollout.tensor_parallel=2", "cluster.gpus_per_engine=2 (now 0)"]),
        (["cluster.gpus_per_engine=4"], ["rollout.tensor_parallel=1"]),
        (["cluster.gpus_per_learner=2"], ["cluster.gpus_per_learner=2", "learner.ranks"]),
        (["cluster.gpus_per_reward=2"], ["cluster.gpus_per_reward=2", "replicas"]),
        (["publish.engine=nccl"], ["publish.engine=nccl", "cluster.gpus_per_engine=0", "publish.engine=shm"]),
        (["learner.offload_optimizer=true"], ["cluster.gpus_per_learner=0", "learner.offload_optimizer=false"]),
        (
            ["rollout.max_prompt_tokens=4096"],
            ["algorithm.micro_batch_tokens=1024", "algorithm.micro_batch_tokens=4144"],
        ),
        (["learner.ranks=49"], ["learner.ranks=49", "48 samples"]),
        (["objectives.alone=[risky:safe]"], ["objectives.alone", "risky:safe", "safety"]),
        (["algorithm.mix=[risky]"], ["algorithm.mix", "'risky'", "topic:times"]),
        (["objectives.alone=[a:love, a:safety]"], ["objectives.alone", "twice"]),
        (["rollout.concurrency=2"], ["rollout.concurrency=2", "algorithm.samples_per_prompt=4"]),
        (["prepare.dev_share=0.5", "prepare.test_share=0.5"], ["prepare.dev_share=0.5", "prepare.test_share=0.5"]),
    ],
)
def test_pairs_that_do_not_go_together_name_both_sides(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, overrides)
    message = str(caught.value)
    assert [part for part in told if part not in message] == []
    assert "set " in message or "must stay" in message or "lower" in message or "raise" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["objectives.safety={source: judge, judge: refusal}"],
        ["cluster.gpus_per_engine=0.5"],
        ["rollout.tensor_parallel=4", "cluster.gpus_per_engine=4"],
        ["publish.engine=nccl", "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1"],
        ["learner.ranks=48"],
    ],
)
def test_pairs_that_do_go_together_pass(overrides: list[str]) -> None:
    assert "override" in load_settings(None, overrides).sources.values()


def test_an_objective_alone_on_a_topic_overrules_the_weights() -> None:
    objectives = load_settings(
        None, ["objectives.alone=[risky:safety]", "objectives.love.weight=0.3"]
    ).settings.objectives
    assert objectives.weights("risky") == {"love": 0.0, "helpfulness": 0.0, "safety": 1.0}
    assert objectives.weights("casual")["love"] == 0.3
