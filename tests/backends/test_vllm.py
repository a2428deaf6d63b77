"""Rollout engine before vLLM is imported: seeds, environment, and refused models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from rluf.backends.vllm import engine as vllm_engine
from rluf.backends.vllm.engine import RolloutEngine, derive_sample_seed, set_vllm_environment
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ModelError, ResourceError, RlufError
from rluf.models.hub import resolve_model
from rluf.utils.paths import resolve_cache_folder

COLOCATED = ["cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc"]


def start_and_catch_error(settings: Settings, model_folder: Path) -> RlufError:
    with pytest.raises(RlufError) as error_info:
        asyncio.run(RolloutEngine("rollout 0", 0, settings, model_folder).start())
    return error_info.value


def test_seeds_differ_between_runs_prompts_and_samples() -> None:
    seeds = {
        derive_sample_seed(seed, prompt, index) for seed in range(5) for prompt in ("a", "b", "c") for index in range(4)
    }
    assert len(seeds) == 60
    assert derive_sample_seed(1, "a", 2) == derive_sample_seed(1, "a", 2)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_environment_keeps_set_variables_and_removes_the_kv_cache_space(monkeypatch: pytest.MonkeyPatch) -> None:
    from os import environ

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DO_NOT_TRACK", "VLLM_PLUGINS", "VLLM_ENGINE_READY_TIMEOUT_S", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, environ.get(name, ""))
    set_vllm_environment(Settings.model_validate({"cluster": {"threads_per_actor": 2}}))
    assert environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environ["OMP_NUM_THREADS"] == "2"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environ["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    error = start_and_catch_error(Settings(), tmp_path)
    assert isinstance(error, ModelError) and "config.json" in str(error)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    error = start_and_catch_error(Settings(), tmp_path)
    assert isinstance(error, ModelError) and "BertModel" in str(error) and "model.path" in str(error)


def test_too_little_memory_is_an_error_with_the_setting_to_lower() -> None:
    settings = Settings.model_validate({"rollout": {"kv_cache_gib": 1e6}})
    error = start_and_catch_error(settings, resolve_model("tiny", resolve_cache_folder(settings)))
    assert isinstance(error, ResourceError)
    assert "rollout.kv_cache_gib=1e+06" in str(error) and "GiB are free" in str(error)


@pytest.mark.parametrize(
    ("overrides", "is_eager", "executor"),
    [
        ([], True, "RlufUniProcExecutor"),
        (["cluster.gpus_per_engine=1"], False, "RlufUniProcExecutor"),
        (["cluster.gpus_per_engine=1", "rollout.eager=true"], True, "RlufUniProcExecutor"),
        (["cluster.gpus_per_engine=4"], False, "RlufMultiprocExecutor"),
        (["rollout.eager=false"], True, "RlufUniProcExecutor"),
    ],
)
def test_gpu_engines_decode_with_cuda_graphs_by_default(overrides: list[str], is_eager: bool, executor: str) -> None:
    settings = load_settings(None, overrides).settings
    model_folder = resolve_model("tiny", resolve_cache_folder(settings))
    arguments = RolloutEngine("rollout 0", 0, settings, model_folder)._build_engine_args()
    assert arguments.enforce_eager is is_eager
    assert arguments.distributed_executor_backend.__name__ == executor  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("architecture", "overrides", "caches_prefixes"),
    [
        ("LlamaForCausalLM", [], True),
        ("Mamba2ForCausalLM", [], False),
        ("FalconH1ForCausalLM", [], False),
        ("Lfm2ForCausalLM", [], False),
        ("Mamba2ForCausalLM", ["cluster.gpus_per_engine=1"], True),
        ("LlamaForCausalLM", ["run.deterministic=true"], False),
    ],
)
def test_cpu_engines_do_not_cache_the_prefixes_of_recurrent_layers(
    architecture: str, overrides: list[str], caches_prefixes: bool, tmp_path: Path
) -> None:
    """vLLM's CPU build refused these models: it caches a state in chunks only, which are off there."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    settings = load_settings(None, overrides).settings
    arguments = RolloutEngine("rollout 0", 0, settings, tmp_path)._build_engine_args()
    assert arguments.enable_prefix_caching is caches_prefixes


@pytest.mark.parametrize(
    ("overrides", "failures", "starts"),
    [
        (COLOCATED, 0, True), (COLOCATED, 2, True), (COLOCATED, 3, False), (["cluster.gpus_per_engine=1"], 1, False),
        ([], 1, False),
    ],
)  # fmt: skip
async def test_an_engine_waits_for_the_memory_of_a_learner_that_is_ending(
    overrides: list[str], failures: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    errors = [ValueError("Free memory on device is less than desired GPU memory utilization")] * failures

    def start_core(*_: object, **__: object) -> str:
        if errors:
            raise errors.pop()
        return "core"

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", start_core)
    monkeypatch.setattr(vllm_engine, "START_RETRY_S", 0.0)
    engine = RolloutEngine("rollout 0", 0, load_settings(None, overrides).settings, Path("model"))
    if starts:
        assert cast(Any, await engine._start_core_process(None)) == "core"
        return
    with pytest.raises(ResourceError, match=r"rollout 0: vLLM's core process did not start .*Free memory on device"):
        await engine._start_core_process(None)
