"""What the installed vLLM can run is known before an engine starts.

The answer of the real one, which takes its import, is tested in tests/train/test_families.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import LlamaConfig, MptConfig, PretrainedConfig, Qwen3_5TextConfig, StableLmConfig

from rluf.backends.vllm import architectures
from rluf.backends.vllm.architectures import find_engine_fault, find_engine_problems
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.train.startup_check import check_engine_support

NO_TORCHVISION = "ModuleNotFoundError: No module named 'torchvision'"


@pytest.fixture
def asked_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A vLLM that has models for Qwen3.5, which it cannot import, and Falcon; the names that it was asked about."""
    asked_names: list[str] = []

    def import_models(names: Sequence[str]) -> tuple[Sequence[str], dict[str, str]]:
        asked_names.extend(names)
        registered_names = ["Qwen3_5ForCausalLM", "FalconForCausalLM"]
        return registered_names, {name: NO_TORCHVISION if name.startswith("Qwen") else "" for name in names}

    monkeypatch.setattr(architectures, "_import_models", import_models)
    return asked_names


def write_config(folder: Path, config: PretrainedConfig, architecture: str) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "problem", "is_asked"),
    [
        ("LlamaForCausalLM", "", False),
        ("FalconForCausalLM", "", True),
        ("StableLmForCausalLM", "", True),
        ("MptForCausalLM", "missing", True),
        ("Qwen3_5ForCausalLM", NO_TORCHVISION, True),
        ("OwnForCausalLM", None, False),
        ("AutoModelForCausalLM", None, False),
        ("", None, False),
    ],
)
def test_vllm_is_asked_about_models_that_it_cannot_take_from_transformers(
    architecture: str, problem: str | None, is_asked: bool, asked_names: list[str]
) -> None:
    assert find_engine_problems([architecture]) == {architecture: problem}
    assert asked_names == ([architecture] if is_asked else [])


def test_nothing_is_refused_where_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver need not have it."""
    monkeypatch.setattr(architectures, "IMPORT_MODELS", "import no_such_module")
    assert find_engine_problems(["MptForCausalLM"]) == {"MptForCausalLM": None}


@pytest.mark.usefixtures("asked_names")
def test_the_check_refuses_what_vllm_cannot_run_with_the_reason(tmp_path: Path) -> None:
    write_config(tmp_path, MptConfig(), "MptForCausalLM")
    with pytest.raises(ModelError, match=r"the installed vLLM has no model for MptForCausalLM.*use another model"):
        check_engine_support(Settings(), tmp_path)
    write_config(tmp_path, Qwen3_5TextConfig(), "Qwen3_5ForCausalLM")
    with pytest.raises(ModelError, match="No module named 'torchvision'; install what is missing"):
        check_engine_support(Settings(), tmp_path)
    # The engine's machine has GPUs, and this one need not have them.
    gpu_settings = Settings.model_validate({"cluster": {"gpus_per_engine": 1}})
    assert check_engine_support(gpu_settings, tmp_path) == "vLLM can run Qwen3_5ForCausalLM"
    write_config(tmp_path, StableLmConfig(), "StableLmForCausalLM")
    assert check_engine_support(Settings(), tmp_path) == "vLLM can run StableLmForCausalLM"
    write_config(tmp_path, LlamaConfig(), "OwnForCausalLM")
    assert check_engine_support(Settings(), tmp_path) == "not known whether vLLM can run OwnForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "on_gpu", "has_tied_head", "is_faulty"),
    [
        ("BloomForCausalLM", True, True, True), ("GPTBigCodeForCausalLM", False, True, True),
        ("GPTNeoXForCausalLM", False, True, True), ("GPTNeoXForCausalLM", False, False, False),
        ("MambaForCausalLM", False, True, True), ("MambaForCausalLM", True, True, False),
        ("Mamba2ForCausalLM", False, True, False), ("GPT2LMHeadModel", False, True, False),
    ],
)  # fmt: skip
def test_families_that_fail_after_the_start_of_an_engine_are_known(
    architecture: str, on_gpu: bool, has_tied_head: bool, is_faulty: bool
) -> None:
    fault = find_engine_fault(architecture, on_gpu=on_gpu, has_tied_head=has_tied_head)
    assert (fault is not None) is is_faulty


def test_a_family_that_fails_in_the_engine_is_refused_at_the_start(tmp_path: Path) -> None:
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": 2,
        "n_head": 4,
        "hidden_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="runs BloomForCausalLM, but it refuses the output head"):
        check_engine_support(Settings(), tmp_path)
