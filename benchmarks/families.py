"""Write docs/supported_models.md: how rluf trains a tiny random model of each family.

    python benchmarks/families.py

Each family is checked as at the start of a run: does a micro-batch give the log-probabilities and gradients of one
sample at a time, and does the learner send the tensors of the checkpoint under their names and shapes.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rluf.algorithms.batch_layout import TRIAL_WINDOW, compare_layouts
from rluf.backends.vllm.architectures import find_engine_problems
from rluf.config.settings import Settings
from rluf.errors import RlufError
from rluf.train.startup_check import check_weight_names

logger = logging.getLogger("benchmarks.families")

PAGE = Path(__file__).parent.parent / "docs" / "supported_models.md"
MAX_ROW_TOKENS = 240
COMMON = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
LINEAR = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS),
    "Qwen3-Next": ("Qwen3NextConfig", {**EXPERTS, **LINEAR}),
    "Qwen3.5": ("Qwen3_5TextConfig", LINEAR),
    "Mistral": ("MistralConfig", {}),
    "Mistral, window of 128": ("MistralConfig", {"sliding_window": 128}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma": ("GemmaConfig", {"head_dim": 16}),
    "Gemma 2": ("Gemma2Config", {"head_dim": 16}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 16}),
    "Phi": ("PhiConfig", {}),
    "Phi 3": ("Phi3Config", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", {}),
    "OLMoE": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteConfig", {}),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "StableLM": ("StableLmConfig", {}),
    "Starcoder 2": ("Starcoder2Config", {}),
    "GLM 4": ("Glm4Config", {"head_dim": 16}),
    "OPT": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek V3": ("DeepseekV3Config", LATENT),
    "Falcon-H1": ("FalconH1Config", MAMBA),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "GPT-2": ("GPT2Config", {}),
    "GPT-2, head of its own": ("GPT2Config", {"tie_word_embeddings": False}),
    "GPT-BigCode": ("GPTBigCodeConfig", {}),
    "GPT-J": ("GPTJConfig", {"rotary_dim": 8}),
    "GPT-Neo": ("GPTNeoConfig", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "BLOOM": ("BloomConfig", {}),
    "Falcon": ("FalconConfig", {"alibi": False}),
    "Falcon, head of its own": ("FalconConfig", {"alibi": False, "tie_word_embeddings": False}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "GPT-NeoX, tied head": ("GPTNeoXConfig", {"tie_word_embeddings": True}),
    "MPT": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}),
    "Mamba": ("MambaConfig", {}),
    "Mamba 2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
}
HEADER = """# Supported models

Written by `python benchmarks/families.py` from tiny random models; `tests/train/test_families.py` checks each row.

- packed: all samples of a micro-batch form one sequence, and a prompt is read once for its group.
- rows: one sample per row, where packing would be wrong; slower, and a prompt is read once per sample. Lower
  `algorithm.micro_batch_tokens` if memory is short. PPO's critic needs packing.
- error: mean difference from one sample at a time, in nats per token (float32); cosine: of the gradients.
- refused: `python -m rluf.train` stops before it builds data and reward models, with the reason.
- An output head that is tied to the embedding is sent to the engines as a weight of its own, whatever the embedding is
  called; a checkpoint contains it once.

What the engine adds (vLLM 0.32):

- Mixtures of experts, Qwen3-Next too, are refused at the start on CPU engines (`cluster.gpus_per_engine: 0`), which
  cannot load new weights of experts. On GPUs they pass the check, but no engine has run them; `learner.lora_rank`
  above 0 is refused.
- Recurrent layers (Qwen3-Next, Qwen3.5, Falcon-H1, LFM2, Mamba): the learner reads rows. CPU engines get no prefix
  cache: vLLM caches a state in chunks only, which are off there, and would refuse the model. vLLM imports its Qwen3.5
  only where `torchvision` is installed; without it a run on CPUs is refused at the start.
- A sliding window counts only if `rollout.max_prompt_tokens` + `rollout.max_response_tokens` is longer than it (240
  here): then the learner reads rows, else it packs. Engines apply the window in both cases.
- MPT and GPT-Neo have no model in vLLM, and it cannot run those of transformers.
- GPT-BigCode, BLOOM, GPT-NeoX with a tied head, and Mamba 1 on CPUs start in vLLM and then end or compute wrongly, so
  they are refused at the start. vLLM reads LFM2 only with `conv_dim` in its config.

`python -m rluf.train --check` compares a real engine with the learner. `pytest -m nightly
tests/backends/test_engine_families.py` does so for 10 families, before and after a weight sync (all agree to 0.01).

| family | trained | error | cosine | reason |
|---|---|---|---|---|
"""


def describe_family(family: str) -> str:
    """The family's row of the page."""
    import transformers
    from transformers import AutoModelForCausalLM

    config_name, values = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**COMMON, **values})
    if _find_engine_problems()[_get_architecture(family)] == "missing":
        return f"| {family} | refused | | | the installed vLLM cannot run it |"
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            check_weight_names(Settings(), Path(folder))
        trial = compare_layouts(config, MAX_ROW_TOKENS)
    except RlufError as error:
        reason = str(error).partition(" cannot be trained: ")[2] or str(error)
        return f"| {family} | refused | | | {reason.partition('; ')[0]} |"
    cosine = f"{trial.gradient_cosine:.6f}"
    reason = trial.reason.partition(";")[0].replace(f" of {TRIAL_WINDOW} tokens", "").partition(", but")[0]
    return f"| {family} | {trial.layout} | {_format_error(trial.logprob_error)} | {cosine} | {reason} |"


def _get_architecture(family: str) -> str:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[getattr(transformers, FAMILIES[family][0]).model_type])


@functools.cache
def _find_engine_problems() -> dict[str, str | None]:
    return find_engine_problems(sorted({_get_architecture(family) for family in FAMILIES}))


def _format_error(error: float) -> str:
    return "below 1e-5" if error < 1e-5 else f"{error:.1g}"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)  # tiny models: threads would only wait for each other
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for family in FAMILIES:
        start_time = time.monotonic()
        rows.append(describe_family(family))
        logger.info("%s %.1f s", rows[-1], time.monotonic() - start_time)
    PAGE.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
