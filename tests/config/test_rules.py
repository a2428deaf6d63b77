import pytest

from rluf.config.load import load_settings
from rluf.errors import SettingsError

HALVES = ["cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5"]


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
        (["reward.helpfulness.loss=focal"], ["reward.helpfulness.loss=bradley_terry"]),
        (["reward.helpfulness.calibration=isotonic"], ["isotonic", "reward.helpfulness.calibration=platt"]),
        (["reward.safety.epochs=0"], ["reward.safety.epochs=0", "reward.safety.probe=true"]),
        (["reward.love={lora_rank: 4, frozen_share: 1}"], ["reward.love.lora_rank=4", "reward.love.frozen_share=1"]),
        (["reward.love.layers=['minilm:response']"], ["'minilm:response'", "minilm:6:response"]),
        (
            ["reward.love={backbone: tiny, layers: ['minilm:4', 2]}"],
            ["reward.love.layers=['minilm:4', 2]", "reward.love.backbone=tiny"],
        ),
        (
            ["reward={heads: [love, safety], love: {layers: [6, 'tiny:2']}}"],
            ["reward.heads=['love', 'safety']", "reward.love.layers=[6, 'tiny:2']"],
        ),
        (
            ["reward.love={fuse: true, probe: true, epochs: 0}"],
            ["reward.love.fuse=true", "reward.love.layers=[]", "reward.love.fuse=false"],
        ),
        (
            ["reward.love={fuse: true, probe: true, layers: [2, 4]}"],
            ["reward.love.fuse=true", "reward.love.epochs=2", "probe=true"],
        ),
        (
            ["reward.love={fuse: true, probe: true, epochs: 0, layers: [2, 4]}", "objectives.pessimism=1"],
            ["objectives.pessimism=1", "reward.love.fuse=true"],
        ),
        (["reward.safety.debias=[propensity]"], ["reward.safety.debias=['propensity']", "reward.safety.loss=bce"]),
        (["reward.heads=[love]"], ["reward.heads=['love']", "two heads"]),
        (
            ["reward={only: [love], heads: [love, continued]}"],
            ["reward.only=['love']", "reward.heads=['love', 'continued']", "set reward.only=[]"],
        ),
        (["reward.workers=[3, 2]"], ["reward.workers=[3, 2]"]),
        (["reward={workers: [1, 2], zero_stage: 2}"], ["reward.workers=[1, 2]", "reward.zero_stage=2"]),
        (["rollout.tensor_parallel=2"], ["rollout.tensor_parallel=2", "cluster.gpus_per_engine=2 (now 0)"]),
        (["cluster.gpus_per_engine=4"], ["rollout.tensor_parallel=1"]),
        (["cluster.gpus_per_learner=2"], ["cluster.gpus_per_learner=2", "learner.ranks"]),
        (["cluster.gpus_per_reward=2"], ["cluster.gpus_per_reward=2", "replicas"]),
        (["publish.engine=nccl"], ["publish.engine=nccl", "cluster.gpus_per_engine=0", "publish.engine=shm"]),
        (["publish.engine=ipc"], ["publish.engine=ipc", "cluster.gpus_per_engine=0", "publish.engine=shm"]),
        (
            ["publish.engine=ipc", *HALVES, "learner.ranks=2"],
            ["learner.ranks=2", "rollout.engines=1", "publish.engine=nccl"],
        ),
        (
            ["publish.engine=ipc", *HALVES, "algorithm.staleness=1"],
            ["algorithm.staleness=1", "publish.engine=ipc", "algorithm.staleness=0"],
        ),
        (["publish.engine=ipc", *HALVES, "learner.zero_stage=3"], ["learner.zero_stage=3", "learner.zero_stage=2"]),
        (HALVES, ["cluster.gpus_per_learner=0.5", "learner.ranks"]),
        (["publish.engine=adapter"], ["publish.engine=adapter", "learner.lora_rank=0", "publish.engine=shm"]),
        (["learner.offload_optimizer=true"], ["cluster.gpus_per_learner=0", "learner.offload_optimizer=false"]),
        (
            ["rollout.max_prompt_tokens=4096"],
            ["algorithm.micro_batch_tokens=1024", "algorithm.micro_batch_tokens=4144"],
        ),
        (["learner.ranks=49"], ["learner.ranks=49", "48 samples"]),
        (["objectives.alone=[risky:safe]"], ["objectives.alone", "risky:safe", "safety"]),
        (["algorithm.mix=[risky]"], ["algorithm.mix", "'risky'", "topic:times"]),
        (["objectives.alone=[a:love, a:safety]"], ["objectives.alone", "twice"]),
        (["objectives.floors=[kindness:0]"], ["objectives.floors", "'kindness:0'", "love, helpfulness, safety"]),
        (
            ["objectives.combine=constrained", "objectives.floors=[safety:low]"],
            ["objectives.floors", "'safety:low'", "objective:number"],
        ),
        (
            ["objectives.combine=constrained", "objectives.floors=[safety:0, safety:1]"],
            ["objectives.floors", "twice"],
        ),
        (["objectives.floors=[safety:0]"], ["objectives.combine=linear", "['safety:0']"]),
        (["objectives.combine=constrained"], ["objectives.combine=constrained", "objectives.floors=[]"]),
        (
            ["objectives.combine=gdpo", "algorithm.name=rloo"],
            ["objectives.combine=gdpo", "algorithm.name=rloo", "algorithm.name=grpo"],
        ),
        (
            ["algorithm.name=crpg"],
            ["algorithm.name=crpg", "objectives.combine=linear", "objectives.combine=calibrated"],
        ),
        (
            ["algorithm.kl_target=0.1", "algorithm.kl_coef=0"],
            ["algorithm.kl_target=0.1", "algorithm.kl_coef=0", "reference"],
        ),
        (
            ["algorithm.kl_in=reward", "algorithm.kl_coef=0"],
            ["algorithm.kl_in=reward", "algorithm.kl_coef=0", "reference"],
        ),
        (
            ["algorithm.kl_in=reward", "algorithm.name=codpo", "objectives.combine=calibrated"],
            ["algorithm.kl_in=reward", "algorithm.name=codpo", "algorithm.kl_in=loss"],
        ),
        (["learner.critic_rate=1e-5"], ["learner.critic_rate=1e-05", "algorithm.name=grpo", "algorithm.name=ppo"]),
        (
            ["algorithm.dual_clip=3", "algorithm.name=rloo"],
            ["algorithm.dual_clip=3", "algorithm.loss=reinforce", "algorithm.dual_clip=null"],
        ),
        (
            ["algorithm.importance=mask", "algorithm.staleness=1"],
            ["algorithm.importance=mask", "algorithm.staleness=1", "algorithm.loss=ppo"],
        ),
        (["rollout.concurrency=2"], ["rollout.concurrency=2", "algorithm.samples_per_prompt=4"]),
        (["objectives.love.source=serve"], ["objectives.love.source=serve", "objectives.love.path=None", "URL"]),
        (["objectives.love.path=http://host:8000"], ["objectives.love.source=model", "http://host:8000"]),
        (["serve.min_replicas=3"], ["serve.min_replicas=3", "serve.max_replicas=1"]),
        (["serve.canary_share=0.1"], ["serve.canary_share=0.1", "serve.candidate"]),
        (["serve.policies=[base]"], ["serve.policies", "'base'", "name:path"]),
        (["serve.policies=['a:tiny', 'a:minilm']"], ["serve.policies", "twice"]),
        (["prepare.dev_share=0.5", "prepare.test_share=0.5"], ["prepare.dev_share=0.5", "prepare.test_share=0.5"]),
    ],
)
def test_pairs_that_do_not_go_together_name_both_sides(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, overrides)
    message = str(caught.value)
    assert [part for part in told if part not in message] == []
    assert any(word in message for word in ("set ", "must stay", "lower", "raise", "change", "give"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["objectives.safety={source: judge, judge: refusal}"],
        ["cluster.gpus_per_engine=0.5"],
        ["reward.safety={epochs: 0, probe: true, layers: [3, 6]}"],
        ["reward={heads: [love, safety], love: {layers: [4, 6]}, helpfulness: {layers: [6, 'tiny:2']}}"],
        ["reward={heads: [love, continued, safety], workers: [1, 4]}", "reward.love.debias=[sign_offs, users, length]"],
        ["reward={heads: [love, safety], safety: {probe: true, epochs: 0, debias: [length]}}"],
        ["reward.love={probe: true, epochs: 0, debias: [sign_offs, length, users], layers: [6, 'minilm:4']}"],
        ["reward={only: [love, safety], heads: [love, safety]}"],
        ["reward={only: [helpfulness], heads: [love, continued]}"],
        ["reward.love={loss: nnpu, positive_rate: 0.3, calibration: isotonic}"],
        ["rollout.tensor_parallel=4", "cluster.gpus_per_engine=4"],
        ["publish.engine=nccl", "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1"],
        ["publish.engine=ipc", *HALVES, "learner.ranks=4", "rollout.engines=4"],
        ["publish.engine=adapter", "learner.lora_rank=8"],
        ["learner.ranks=48"],
        ["objectives.love={source: serve, path: 'http://host:8000'}"],
        ["serve.policies=['base:tiny', 'candidate:runs/x:y/policy']"],
        ["objectives.combine=constrained", "objectives.floors=[safety:0, helpfulness:-0.1]"],
        ["objectives.combine=calibrated", "algorithm.name=crraft", "objectives.judges=[repetition]"],
        ["algorithm.name=rloo", "algorithm.kl_in=reward", "algorithm.importance=sequence", "algorithm.staleness=1"],
        ["algorithm.name=dapo", "algorithm.clip_high=0.28", "algorithm.kl_coef=0", "algorithm.dual_clip=3"],
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


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm.name=grop", "algorithm.name"),
        ("algorithm.critic=gae", "algorithm.critic"),
        ("objectives.kindness.weight=0.3", "objectives.kindness"),
    ],
)
def test_what_does_not_exist_is_told_in_one_message(override: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told.replace(".", r"\.")):
        load_settings(None, [override])
