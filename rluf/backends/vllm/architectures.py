"""Whether the installed vLLM can run an architecture, found out without an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORT_MODELS = """
import json, sys, vllm
problems = {}
for name in sys.argv[1:]:
    model = vllm.ModelRegistry.models.get(name)
    try:
        problems[name] = "" if model is None else str(model.load_model_cls() and "")
    except ImportError as error:
        problems[name] = f"{type(error).__name__}: {error}"
print(json.dumps([sorted(vllm.ModelRegistry.models), problems]))
"""
IMPORT_TIMEOUT_S = 300
ENGINE_FAULTS: Mapping[str, str] = {
    "BloomForCausalLM": "it refuses the output head of a weight update",
    "GPTBigCodeForCausalLM": "its core process ends at the first request",
}
"""Architectures that start in vLLM and then fail (tests/backends/test_engine_families.py)."""
CPU_ENGINE_FAULTS: Mapping[str, str] = {"MambaForCausalLM": "vLLM's CPU build has no selective scan"}


def find_engine_problems(architectures: Sequence[str]) -> dict[str, str | None]:
    """Why the installed vLLM cannot run each architecture: "missing", or the error of the import of its model.

    "" where it can, None where that is not known: for code of the model's own, and where vLLM is not installed here.
    """
    import transformers

    classes = {name: getattr(transformers, name, None) for name in architectures}
    model_classes: dict[str, Any] = {
        name: model if hasattr(model, "is_backend_compatible") else None for name, model in classes.items()
    }
    # vLLM can run these models of transformers. Asking it about others takes seconds, as it has to be imported.
    other_names = [name for name, model in model_classes.items() if model and not model.is_backend_compatible()]
    registered_names, import_problems = _import_models(other_names) if other_names else ([], {})
    problems: dict[str, str | None] = {name: None if model is None else "" for name, model in model_classes.items()}
    for name in other_names:
        is_missing = name not in registered_names and not model_classes[name]._can_set_attn_implementation()
        problems[name] = None if not registered_names else "missing" if is_missing else import_problems[name]
    return problems


def find_engine_fault(architecture: str, *, on_gpu: bool, has_tied_head: bool) -> str | None:
    """Why vLLM's model of an architecture would fail or compute wrongly after its start; None if no fault is known."""
    if architecture == "GPTNeoXForCausalLM" and has_tied_head:
        return "its log-probabilities are not those of the learner where the output head is tied to the embedding"
    return ENGINE_FAULTS.get(architecture) or (None if on_gpu else CPU_ENGINE_FAULTS.get(architecture))


def _import_models(architectures: Sequence[str]) -> tuple[Sequence[str], Mapping[str, str]]:
    """All architectures that vLLM has a model for, and the error of the import of each of `architectures`."""
    # In a process of its own: vLLM sets up logging and threads of the process that imports it.
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
    try:
        result = subprocess.run(
            [sys.executable, "-c", IMPORT_MODELS, *architectures],
            capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=True, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return [], {}
    answer: Any = json.loads(result.stdout.splitlines()[-1])
    return answer[0], answer[1]


def has_recurrent_layers(model_folder: Path) -> bool:
    """Whether vLLM's model has layers with a state (Mamba, linear attention, short convolutions).

    Inspects the model's class in this process: by default vLLM starts a process only for that (so as not to touch CUDA
    here), which costs 5 to 15 s on the first run on a machine. An architecture that vLLM does not know is left to
    vLLM's own error.
    """
    from vllm.model_executor.models.interfaces import has_inner_state, is_hybrid
    from vllm.model_executor.models.registry import ModelRegistry

    is_recurrent = False
    for architecture in json.loads((model_folder / "config.json").read_text()).get("architectures") or []:
        registered_model = ModelRegistry.models.get(architecture)
        if registered_model is not None:
            model_class = registered_model.load_model_cls()
            ModelRegistry.register_model(architecture, model_class)
            is_recurrent |= has_inner_state(model_class) or is_hybrid(model_class)
    return is_recurrent
