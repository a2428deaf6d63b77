"""What a rollout engine decides before vLLM is imported: seeds, environment, and clear refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from rluf.backends.vllm.engine import RolloutEngine, sample_seed, set_environment
from rluf.config.settings import Settings
from rluf.errors import ModelError, ResourceError, RlufError
from rluf.models.hub import resolve_model
from rluf.utils.paths import cache_dir


def _refusal(settings: Settings, model: Path) -> RlufError:
    with pytest.raises(RlufError) as caught:
        asyncio.run(RolloutEngine("rollout 0", 0, settings, model).start())
    return caught.value


def test_seeds_differ_between_runs_prompts_and_samples() -> None:
    seeds = {sample_seed(s, p, i) for s in range(5) for p in ("a", "b", "c") for i in range(4)}
    assert len(seeds) == 60
    assert sample_seed(1, "a", 2) == sample_seed(1, "a", 2)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_environment_keeps_what_is_set_and_drops_whole_gib_kv_space(monkeypatch: pytest.MonkeyPatch) -> None:
    from os import environ

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DO_NOT_TRACK", "VLLM_PLUGINS", "VLLM_ENGINE_READY_TIMEOUT_S", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, environ.get(name, ""))
    set_environment(Settings.model_validate({"cluster": {"threads": 2}}))
    assert environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environ["OMP_NUM_THREADS"] == "2"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environ["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environ


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    error = _refusal(Settings(), tmp_path)
    assert isinstance(error, ModelError) and "config.json" in str(error)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    error = _refusal(Settings(), tmp_path)
    assert isinstance(error, ModelError) and "BertModel" in str(error) and "model.path" in str(error)


def test_too_little_memory_is_refused_with_the_setting_to_lower() -> None:
    settings = Settings.model_validate({"rollout": {"kv_cache_gib": 1e6}})
    error = _refusal(settings, resolve_model("tiny", cache_dir(settings)))
    assert isinstance(error, ResourceError)
    assert "rollout.kv_cache_gib=1e+06" in str(error) and "GiB are free" in str(error)
