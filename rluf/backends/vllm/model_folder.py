"""Checks of a model folder before vLLM's slow import: is it a causal language model, and which tokens end a turn."""

from __future__ import annotations

import json
from pathlib import Path

from rluf.errors import ModelError

CAUSAL_LM_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the architecture names of causal language models in config.json."""


def check_causal_lm(model_folder: Path) -> None:
    """Raise ModelError for a folder without a causal language model."""
    try:
        config = json.loads((model_folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {model_folder} has no readable config.json: {error}; give a Hugging Face folder"
        ) from error
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith(CAUSAL_LM_SUFFIXES) for name in architectures):
        raise ModelError(
            f"model {model_folder} has architecture {', '.join(architectures) or 'none'}; the policy must be a causal "
            "language model (model.path)"
        )


def read_stop_token_ids(model_folder: Path, eos_token_id: int | None) -> list[int]:
    """Token ids that end a turn: the tokenizer's end of sequence and those of the model's generation settings."""
    # Chat models often end a turn with another token than the tokenizer's eos_token; without it every response would
    # run into max_tokens.
    token_ids = set() if eos_token_id is None else {int(eos_token_id)}
    generation_file = model_folder / "generation_config.json"
    if generation_file.is_file():
        eos = json.loads(generation_file.read_text()).get("eos_token_id")
        token_ids.update(int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None)
    if not token_ids:
        raise ModelError(
            f"model {model_folder} defines no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    return sorted(token_ids)
