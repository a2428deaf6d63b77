import pytest

from rluf.config.load import load_settings
from rluf.config.policy import RENAMED_TRANSPORTS
from rluf.errors import SettingsError

COLOCATED = ["cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc"]


@pytest.mark.parametrize(
    ("overrides", "expected_words"),
    [
        (["objectives.safety.source=judge"], ["objectives.safety.path", "none"]),
        ([f"objectives.{n}.weight=0" for n in ("love", "helpfulness", "safety")], ["all 0"]),
        (["reward.love.loss=bradley_terry"], ["reward.love.loss=bce"]),
        (["reward.helpfulness.loss=focal"], ["reward.helpfulness.loss=bradley_terry"]),
        (["reward.safety.epochs=0"], ["reward.safety.epochs=0", "reward.safety.linear_probe=true"]),
        (["reward.love={lora_rank: 4, frozen_share: 1}"], ["reward.love.lora_rank=4", "reward.love.frozen_share=1"]),
        (
            ["reward.love={backbone: tiny, ensemble: {members: [{backbone: minilm, layers: 4}, {layers: 2}]}}"],
            ["reward.love.ensemble.members", "minilm", "reward.love.backbone=tiny"],
        ),
        (
            [
                "reward={shared_backbone_heads: [love, safety], "
                "love: {ensemble: {members: [{layers: 6}, {backbone: tiny, layers: 2}]}}}"
            ],
            ["reward.shared_backbone_heads=['love', 'safety']", "reward.love.ensemble.members", "tiny (2 layers)"],
        ),
        (
            ["reward.love={ensemble: {shared_head: true}, linear_probe: true, epochs: 0}"],
            [
                "reward.love.ensemble.shared_head=true",
                ".ensemble.members has 1",
                "reward.love.ensemble.shared_head=false",
            ],
        ),
        (
            ["reward.love={linear_probe: true, ensemble: {shared_head: true, members: [{layers: 2}, {layers: 4}]}}"],
            ["reward.love.ensemble.shared_head=true", "reward.love.epochs=2", "probe=true"],
        ),
        (
            [
                "reward.love={linear_probe: true, epochs: 0, "
                "ensemble: {shared_head: true, members: [{layers: 2}, {layers: 4}]}}",
                "aggregation.uncertainty_penalty=1",
            ],
            ["aggregation.uncertainty_penalty=1", "reward.love.ensemble.shared_head=true"],
        ),
        (["reward.safety.debias=[context]"], ["reward.safety.debias=['context']", "reward.safety.loss=bce"]),
        (["reward.love.debias=[context]"], ["reward.love.debias=['context']", "epochs=0", "linear_probe=true"]),
        (["reward.safety.debias=[propensity]"], ["reward.safety.debias=['propensity']", "reward.safety.loss=bce"]),
        (["reward.shared_backbone_heads=[love]"], ["reward.shared_backbone_heads=['love']", "two heads"]),
        (
            ["reward={objectives: [love], shared_backbone_heads: [love, continued]}"],
            ["reward.objectives=['love']", "heads=['love', 'continued']", "set reward.objectives=[]"],
        ),
        (["algorithm={name: rloo, mini_batches: 2}"], ["algorithm.mini_batches=2", "algorithm.loss=ppo"]),
        (["algorithm={name: dpo, epochs: 2}"], ["algorithm.epochs=2", "algorithm.name=dpo"]),
        (
            ["learner={zero_stage: 3, ema_decay: 0.9}"],
            ["learner.zero_stage=3", "learner.ema_decay=0.9", "learner.zero_stage=2"],
        ),
        (
            ["learner.lora_rank=4", "algorithm.reference_refresh_steps=5"],
            ["algorithm.reference_refresh_steps=5", "learner.lora_rank=4"],
        ),
        (["reward.workers=[3, 2]"], ["reward.workers=[3, 2]"]),
        (["reward={workers: [1, 2], zero_stage: 2}"], ["reward.workers=[1, 2]", "reward.zero_stage=2"]),
        (["cluster.gpus_per_engine=1.5"], ["cluster.gpus_per_engine=1.5", "cluster.gpus_per_engine=2"]),
        (
            ["cluster.gpus_per_engine=0.5", "rollout.engines=2"],
            ["cluster.gpus_per_engine=0.5", "2 engines on one GPU", "rollout.gpu_memory_share=0.5 or less"],
        ),
        (
            ["cluster.gpus_per_engine=0.3", "rollout.engines=9", "rollout.gpu_memory_share=0.34"],
            ["3 engines on one GPU", "rollout.gpu_memory_share=0.33 or less"],
        ),
        (
            [
                "cluster.gpus_per_engine=0.2",
                "cluster.gpus_per_learner=0.3",
                "weight_sync.transport=cuda_ipc",
                "learner.workers=2",
                "rollout.engines=2",
                "learner.zero_stage=2",
            ],
            ["cluster.gpus_per_engine=0.2", "cluster.gpus_per_learner=0.3", "two of each"],
        ),
        (["cluster.gpus_per_learner=2"], ["cluster.gpus_per_learner=2", "learner.workers"]),
        (["cluster.gpus_per_reward=2"], ["cluster.gpus_per_reward=2", "replicas"]),
        (["cluster.gpus_per_reward_worker=2"], ["cluster.gpus_per_reward_worker=2", "1 or 0"]),
        (["cluster.gpus_per_reward_worker=0.5", "reward.workers=2"], ["cluster.gpus_per_reward_worker=0.5"]),
        (["cluster.gpus_per_reward=0.25", "reward.workers=[1, 4]"], ["gpus_per_reward_worker=0.25", "4 reward"]),
        (["cluster.gpus_per_engine=0.5", "cluster.gpus_per_reward=0.5"], ["cluster.gpus_per_reward=0.5", "engine"]),
        (
            [
                *COLOCATED[:1],
                "cluster.gpus_per_engine=0.4",
                "cluster.gpus_per_learner=0.4",
                "weight_sync.transport=cuda_ipc",
                "learner.zero_stage=2",
                "cluster.gpus_per_reward=0.2",
            ],
            ["cluster.gpus_per_reward=0.2", "cluster.gpus_per_engine=0.4"],
        ),
        (
            ["weight_sync.transport=nccl"],
            ["weight_sync.transport=nccl", "cluster.gpus_per_engine=0", "weight_sync.transport=shm"],
        ),
        (
            ["weight_sync.transport=cuda_ipc"],
            ["weight_sync.transport=cuda_ipc", "cluster.gpus_per_engine=0", "weight_sync.transport=shm"],
        ),
        ([*COLOCATED, "learner.workers=2"], ["learner.workers=2", "rollout.engines=1", "weight_sync.transport=nccl"]),
        (
            [*COLOCATED, "algorithm.max_staleness=1"],
            ["algorithm.max_staleness=1", "weight_sync.transport=cuda_ipc", "algorithm.max_staleness=0"],
        ),
        ([*COLOCATED, "learner.zero_stage=3"], ["learner.zero_stage=3", "learner.zero_stage=2"]),
        (COLOCATED[:2], ["cluster.gpus_per_learner=0.5", "learner.workers"]),
        (
            ["weight_sync.transport=lora"],
            ["weight_sync.transport=lora", "learner.lora_rank=0", "weight_sync.transport=shm"],
        ),
        (
            [*COLOCATED, "cluster.node_labels={rollout: {pool: a}, learner: {pool: b}}"],
            ["cluster.node_labels", "{'pool': 'a'} of rollout", "{'pool': 'b'} of learner", "same labels"],
        ),
        (
            ["learner.offload_optimizer=true", "cluster.gpus_per_learner=1", "learner.zero_stage=0"],
            ["learner.offload_optimizer=true", "learner.zero_stage=0", "learner.zero_stage=1"],
        ),
        (["learner.offload_optimizer=true"], ["cluster.gpus_per_learner=0", "learner.offload_optimizer=false"]),
        (
            ["rollout.max_prompt_tokens=4096"],
            ["algorithm.micro_batch_tokens=1024", "algorithm.micro_batch_tokens=4160"],
        ),
        (["learner.workers=49"], ["learner.workers=49", "48 samples"]),
        (
            ["aggregation.topic_objectives={risky: safe}"],
            ["aggregation.topic_objectives", "'risky'", "'safe'", "love, helpfulness, safety"],
        ),
        (
            ["aggregation={method: constrained, floors: {kindness: 0}}"],
            ["aggregation.floors", "'kindness'", "love, helpfulness, safety"],
        ),
        (["aggregation.floors={safety: 0}"], ["aggregation.method=linear", "{'safety': 0.0}"]),
        (["aggregation.method=constrained"], ["aggregation.method=constrained", "aggregation.floors={}"]),
        (
            ["aggregation.method=gdpo", "algorithm.name=rloo"],
            ["aggregation.method=gdpo", "algorithm.name=rloo", "algorithm.name=grpo"],
        ),
        (
            ["algorithm.name=crpg"],
            ["algorithm.name=crpg", "aggregation.method=linear", "aggregation.method=calibrated"],
        ),
        (
            ["algorithm.kl_target=0.1", "algorithm.kl_coef=0"],
            ["algorithm.kl_target=0.1", "algorithm.kl_coef=0", "reference"],
        ),
        (
            ["algorithm.kl_penalty=reward", "algorithm.kl_coef=0"],
            ["algorithm.kl_penalty=reward", "algorithm.kl_coef=0", "reference"],
        ),
        (
            ["algorithm.kl_penalty=reward", "algorithm.name=codpo", "aggregation.method=calibrated"],
            ["algorithm.kl_penalty=reward", "algorithm.name=codpo", "algorithm.kl_penalty=k3"],
        ),
        (
            ["learner.critic_learning_rate=1e-5"],
            ["learner.critic_learning_rate=1e-05", "algorithm.name=grpo", "algorithm.name=ppo"],
        ),
        (
            ["algorithm={loss: gspo, old_policy: engine, clip: [0.0003, 0.0004]}"],
            ["algorithm.clip=0.0003", "algorithm.loss=gspo", "algorithm.old_policy=learner"],
        ),
        (["algorithm={max_staleness: 2, clip: [0.2, 0.01]}"], ["algorithm.clip=0.01", "algorithm.max_staleness=2"]),
        (
            ["algorithm={loss: cispo, max_staleness: 1, clip: 0.001}"],
            ["algorithm.clip=0.001", "algorithm.loss=cispo", "0.05 or more"],
        ),
        (
            ["algorithm={importance_correction: mask, importance_correction_cap: 1}"],
            ["algorithm.importance_correction_cap=1", "mask", "1.05 or more"],
        ),
        (
            ["algorithm={importance_correction: sequence_mask, importance_correction_cap: 1.01}"],
            ["algorithm.importance_correction_cap=1.01", "sequence_mask"],
        ),
        (["algorithm={name: dpo, loss: gspo}"], ["algorithm.loss=gspo", "algorithm.name=dpo", "algorithm.loss=null"]),
        (["algorithm={name: kto, loss: ppo, epochs: 2}"], ["algorithm.loss=ppo", "algorithm.name=kto"]),
        (["algorithm={name: sft, entropy_coef: 0.1}"], ["algorithm.entropy_coef=0.1", "algorithm.name=sft"]),
        (["algorithm={name: dpo, max_staleness: 2}"], ["algorithm.max_staleness=2", "algorithm.name=dpo"]),
        (
            ["algorithm={name: kto, importance_correction: geometric}"],
            [
                "algorithm.importance_correction=geometric",
                "algorithm.name=kto",
                "algorithm.importance_correction=token",
            ],
        ),
        (
            ["algorithm={name: codpo, loss: gspo}", "aggregation.method=calibrated"],
            ["algorithm.loss=gspo", "algorithm.name=codpo", "algorithm.loss=null"],
        ),
        (["algorithm.min_reward_spread=0.5"], ["algorithm.min_reward_spread=0.5", "algorithm.name=grpo"]),
        (["algorithm.kl_horizon=100"], ["algorithm.kl_horizon=100", "algorithm.kl_target=null"]),
        (["reward.safety.loss=nnpu"], ["reward.safety.loss=nnpu", "raters", "reward.safety.loss=bce"]),
        (
            ["reward.love.loss=nnpu", "reward.shared_backbone_heads=[love, thumbs]"],
            ["reward.love.loss=nnpu", "thumbs", "reward.love.loss=bce"],
        ),
        (
            ["algorithm.importance_correction=mask", "algorithm.max_staleness=1"],
            ["algorithm.importance_correction=mask", "algorithm.max_staleness=1", "algorithm.loss=ppo"],
        ),
        (
            ["algorithm.name=sft", "algorithm.kl_target=0.1"],
            ["algorithm.kl_target=0.1", "algorithm.name=sft", "algorithm.kl_target=null"],
        ),
        (
            ["algorithm.name=dpo", "algorithm.kl_budget=0.1"],
            ["algorithm.kl_budget=0.1", "algorithm.name=dpo", "algorithm.kl_budget=null"],
        ),
        (
            ["algorithm.reference_refresh_steps=2", "algorithm.kl_coef=0"],
            ["algorithm.reference_refresh_steps=2", "algorithm.kl_coef=0"],
        ),
        (
            ["algorithm.reference_refresh_steps=2", "algorithm.name=sft"],
            ["algorithm.reference_refresh_steps=2", "algorithm.name=sft"],
        ),
        (["aggregation.uncertainty_penalty=0.5"], ["aggregation.uncertainty_penalty=0.5", "ensemble.members"]),
        (
            [
                "aggregation.uncertainty_penalty=1",
                "objectives={love: {source: judge, path: length}, helpfulness: {source: judge, path: repetition}}",
            ],
            ["aggregation.uncertainty_penalty=1", "ensemble.members"],
        ),
        (["algorithm.mini_batches=13"], ["algorithm.mini_batches=13", "algorithm.prompts_per_step=12"]),
        (["algorithm.overlong_buffer=65"], ["algorithm.overlong_buffer=65", "rollout.max_response_tokens=64"]),
        (
            ["aggregation={method: constrained, floors: {safety: 0, love: -12}}"],
            ["aggregation.floors", "love", "+-10"],
        ),
        (["rollout.concurrency=2"], ["rollout.concurrency=2", "algorithm.samples_per_prompt=4"]),
        (["objectives.love.source=serve"], ["objectives.love.source=serve", "objectives.love.path=None", "URL"]),
        (["objectives.love.path=http://host:8000"], ["objectives.love.source=model", "http://host:8000"]),
        (["run.checkpoint_upload_url=folder"], ["run.checkpoint_upload_url=folder", "not a URL"]),
        (["serve.replicas=[3, 1]"], ["serve.replicas=[3, 1]", "minimum"]),
        (["serve.canary_share=0.1"], ["serve.canary_share=0.1", "serve.candidate"]),
        (["prepare.dev_share=0.5", "prepare.test_share=0.5"], ["prepare.dev_share=0.5", "prepare.test_share=0.5"]),
        (
            ["reward.love.backbone=smollm2-135m-instruct"],
            ["reward.love", "smollm2-135m-instruct", "evaluate.simulated_users=0", "minilm"],
        ),
        (
            ["reward.safety.ensemble.members=[{layers: 6}, {backbone: smollm2-135m-instruct, layers: 6}]"],
            ["reward.safety", "evaluate.simulated_users=10000"],
        ),
    ],
)
def test_conflicting_settings_are_refused_with_both_keys(overrides: list[str], expected_words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(None, overrides)
    message = str(raised.value)
    assert [word for word in expected_words if word not in message] == []
    assert any(word in message for word in ("set ", "must stay", "lower", "raise", "change", "add", "remove"))


@pytest.mark.parametrize(
    ("override", "replacement"),
    [
        ("algorithm.topic_weights=['risky:3', 'a:b:2']", "{risky: 3}"),
        ("aggregation.topic_objectives=['risky:safety']", "{risky: safety}"),
        ("aggregation.floors=['safety:0', 'helpfulness:-0.1']", "{safety: 0}"),
        (
            "cluster.node_labels=['learner:pool=gpu', 'learner:zone=a', 'rollout:ray.io/accelerator-type=H100']",
            "{learner: {pool: gpu}}",
        ),
        ("serve.policies=['base:tiny', 'candidate:runs/x:y/policy']", "{base: smollm2-135m-instruct}"),
        ("data.feedback=['openai:logs/']", "{reader: openai, path: logs/}"),
        (
            "reward.love.ensemble.members=[12, 'minilm:6', 'minilm:6:response']",
            "[{layers: 12}, {backbone: minilm, layers: 6, input: response}]",
        ),
        *((f"weight_sync.transport={old}", new) for old, new in RENAMED_TRANSPORTS.items()),
        ("weight_sync.transport=tcp", "disk"),
    ],
)
def test_old_value_formats_are_refused_with_the_new_format(override: str, replacement: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(None, [override])
    assert replacement in str(raised.value)
    assert override.partition("=")[0] in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objectives.safety={source: judge, path: refusal}"],
        ["cluster.gpus_per_engine=0.5"],
        ["reward.safety={epochs: 0, linear_probe: true, ensemble: {members: [{layers: 3}, {layers: 6}]}}"],
        [
            "reward={shared_backbone_heads: [love, safety], love: {ensemble: {members: [{layers: 4}, {layers: 6}]}}, "
            "helpfulness: {ensemble: {members: [{layers: 6}, {backbone: tiny, layers: 2}]}}}"
        ],
        [
            "reward={shared_backbone_heads: [love, continued, safety], workers: [1, 4]}",
            "reward.love.debias=[sign_offs, users, length]",
        ],
        ["reward={shared_backbone_heads: [love, safety], safety: {linear_probe: true, epochs: 0, debias: [length]}}"],
        [
            "reward.love={linear_probe: true, epochs: 0, debias: [sign_offs, length, users], "
            "ensemble: {members: [{layers: 6}, {backbone: minilm, layers: 4}]}}"
        ],
        ["reward={shared_backbone_heads: [love, dislike], love: {linear_probe: true, epochs: 0, debias: [context]}}"],
        ["reward={objectives: [love, safety], shared_backbone_heads: [love, safety]}"],
        ["reward={objectives: [helpfulness], shared_backbone_heads: [love, continued]}"],
        ["reward.love.loss=nnpu"],
        ["cluster.gpus_per_engine=4"],
        ["weight_sync.transport=nccl", "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1"],
        [*COLOCATED, "learner.workers=4", "rollout.engines=4"],
        ["weight_sync.transport=lora", "learner.lora_rank=8"],
        ["learner.workers=48"],
        ["objectives.love={source: serve, path: 'http://host:8000'}"],
        ["serve.policies={base: tiny, candidate: 'runs/x:y/policy'}"],
        ["data.feedback={reader: openai, path: logs/}"],
        ["data.feedback=[sample:feedback, 's3://bucket/a.jsonl', 'C:\\log.jsonl', ./a:b.jsonl]"],
        ["aggregation={method: constrained, floors: {safety: 0, helpfulness: -0.1}}"],
        ["aggregation.method=calibrated", "algorithm.name=crraft", "aggregation.gate_judges=[repetition]"],
        [
            "algorithm={name: rloo, kl_penalty: reward, importance_correction: sequence}",
            "algorithm.max_staleness=1",
        ],
        ["algorithm.name=dapo", "algorithm.clip=[0.2, 0.28]", "algorithm.kl_coef=0"],
        ["algorithm.name=my_package.algorithms:find"],
        ["algorithm={kl_coef: 0, kl_budget: 0.5, reference_refresh_steps: 5}", "algorithm.overlong_buffer=64"],
        ["algorithm={name: dpo, reference_refresh_steps: 5}", "algorithm.mini_batches=1"],
        ["aggregation.uncertainty_penalty=1", "reward.safety.ensemble.members=[{layers: 3}, {layers: 6}]"],
        ["aggregation.uncertainty_penalty=1", "objectives.safety={source: serve, path: 'http://host:8000'}"],
        ["aggregation.uncertainty_penalty=1", "objectives.safety.path=my/reward-model"],
        ["reward.love.backbone=smollm2-135m-instruct", "evaluate.simulated_users=0"],
    ],
)
def test_compatible_settings_are_accepted(overrides: list[str]) -> None:
    assert "override" in load_settings(None, overrides).sources.values()


def test_a_topic_with_its_own_objective_ignores_the_weights() -> None:
    settings = load_settings(None, ["objectives.love.weight=0.3"]).settings
    weights = settings.aggregation.get_topic_weights(settings.objectives, "risky")
    assert weights == {"love": 0.0, "helpfulness": 0.0, "safety": 1.0}
    assert settings.aggregation.get_topic_weights(settings.objectives, "casual")["love"] == 0.3


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("algorithm.name=grop", "algorithm.name"),
        ("algorithm.loss=pop", "algorithm.loss"),
        ("algorithm.critic=gae", "algorithm.critic"),
        ("objectives.kindness.weight=0.3", "objectives.kindness"),
    ],
)
def test_unknown_names_are_refused(override: str, key: str) -> None:
    with pytest.raises(SettingsError, match=key.replace(".", r"\.")):
        load_settings(None, [override])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "override",
    [
        "rollout.temperature={}", "algorithm.kl_coef={}", "algorithm.clip=[0.2, {}]", "objectives.love.weight={}",
        "aggregation.floors={{safety: {}}}", "learner.learning_rate={}", "weight_sync.logprob_tolerance={}",
        "aggregation.multipliers.window_steps={}", "timeouts.call_s={}", "rollout.kv_cache_gib={}",
    ],
)  # fmt: skip
def test_no_setting_is_infinite_or_not_a_number(override: str, value: str) -> None:
    with pytest.raises(SettingsError, match=override.partition("=")[0].replace(".", r"\.")):
        load_settings(
            None, ["aggregation.method=constrained", "aggregation.floors={safety: 0}", override.format(value)]
        )
