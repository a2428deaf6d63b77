"""What an engine reads of a model folder before vLLM does: whether it can run at all, and how its turns end."""

from __future__ import annotations

import json
from pathlib import Path

from rluf.errors import ModelError


def check_model(folder: Path) -> None:
    """Raise ModelError for a folder that holds no causal language model, before vLLM's slow import."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model {folder} has no readable config.json: {error}; give a Hugging Face folder") from error
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in architectures):
        raise ModelError(
            f"model {folder} is {', '.join(architectures) or 'of no named architecture'}; the policy must be a causal "
            "language model (model.path)"
        )


def stop_ids(folder: Path, eos: int | None) -> list[int]:
    """Token ids that end a turn: the tokenizer's end of sequence and those of the model's generation settings."""
    ids = set() if eos is None else {int(eos)}
    file = folder / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text()).get("eos_token_id")
        ids.update(int(i) for i in (named if isinstance(named, list) else [named]) if i is not None)
    if not ids:
        raise ModelError(f"model {folder} names no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return sorted(ids)
