"""Whether the installed vLLM can run an architecture, found out without an engine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

LIST_ARCHITECTURES = "import json, vllm; print(json.dumps(sorted(vllm.ModelRegistry.get_supported_archs())))"
LIST_TIMEOUT_S = 300


def can_run_architecture(architecture: str) -> bool | None:
    """Whether vLLM has a model for `architecture` or can run that of transformers; None where it cannot be told.

    It cannot for code of the model's own, nor where vLLM is not installed.
    """
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return None
    # vLLM falls back to these models of transformers; asking it takes seconds, as it has to be imported.
    if model_class.is_backend_compatible() or model_class._can_set_attn_implementation():
        return True
    architectures = list_engine_architectures()
    return architecture in architectures if architectures else None


@functools.cache
def list_engine_architectures() -> frozenset[str]:
    """Architectures that the installed vLLM has a model for; empty where vLLM cannot be imported."""
    # In a process of its own: vLLM sets up logging and threads of the process that imports it.
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
    try:
        result = subprocess.run(
            [sys.executable, "-c", LIST_ARCHITECTURES],
            capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=True, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(json.loads(result.stdout.splitlines()[-1]))
