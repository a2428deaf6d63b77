"""Throughput and model-FLOPs utilization of the learner on a GPU, with the actor's own code and without Ray.

Random-weight Llama shapes of 135M, 1B and 3B parameters in bfloat16: seconds per GRPO step, tokens per second (each
sample's prompt and response), model-FLOPs utilization (6 FLOPs per parameter and token for the update and 2 for the
reference, over the GPU's dense bfloat16 peak), bytes per second that a weight sync gathers and copies out, and a plain
transformers + DeepSpeed step on padded rows in the same run. On a CPU it runs only shapes named explicitly, without
utilization. Not run on a GPU yet. The last line is JSON.

Usage: torchrun --nproc-per-node 1 benchmarks/learner_gpu.py [shape ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learner as workload
import torch
from torch.nn import functional

from actors.learner import LearnerActor
from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import build_learner_inputs
from rluf.backends import deepspeed as ds
from rluf.backends.gpu_metrics import compute_mfu, count_flops_per_token
from rluf.config.settings import Settings
from rluf.types import Group

LLAMA_SHAPES = {
    "nano": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
KEY_VALUE_HEADS = {"nano": 2, "135M": 3, "1B": 8, "3B": 8}
GROUP_COUNT, SAMPLES_PER_GROUP, PROMPT_TOKENS, RESPONSE_TOKENS, VOCABULARY_SIZE = 16, 8, 128, 256, 32_000


def save_random_model(shape: str, folder: Path) -> Path:
    """Write a Hugging Face folder with random weights of a Llama shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=2048,
        num_key_value_heads=KEY_VALUE_HEADS[shape],
        tie_word_embeddings=True,
        **LLAMA_SHAPES[shape],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def time_fastest(action: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` runs after a warm-up."""
    fastest = float("inf")
    for repeat in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run asynchronously
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat:
            fastest = min(fastest, time.perf_counter() - started)
    return fastest


def build_plain_step(actor: LearnerActor, groups: list[Group], batch_rows: int) -> Callable[[], None]:
    """A step in plain transformers and DeepSpeed: padded rows, all logits of the responses at once."""
    engine, device = actor.engine, actor.device
    token_ids = torch.tensor(
        [[*sample.prompt_ids, *sample.response_ids] for group in groups for sample in group.samples], device=device
    )

    def response_logprobs(model: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch, logits_to_keep=RESPONSE_TOKENS + 1, use_cache=False).logits[:, :-1]
        negative_logprobs = functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, PROMPT_TOKENS:].flatten(), reduction="none"
        )
        return -negative_logprobs

    def run_step() -> None:
        batches = token_ids.split(batch_rows)
        for index, batch in enumerate(batches):
            with torch.no_grad():
                reference_logprobs = response_logprobs(actor._reference_model, batch)

            def forward(
                batch: torch.Tensor = batch, reference_logprobs: torch.Tensor = reference_logprobs
            ) -> tuple[torch.Tensor, None]:
                policy_logprobs = response_logprobs(engine, batch)
                log_ratio = policy_logprobs - reference_logprobs
                loss = -torch.exp(policy_logprobs - policy_logprobs.detach()) + 0.02 * (
                    torch.expm1(-log_ratio) + log_ratio
                )
                return loss.mean() / len(batches), None

            ds.accumulate_gradients(engine, forward, is_last=index == len(batches) - 1)
        ds.apply_optimizer_step(engine)

    return run_step


def measure_shape(shape: str, host: str, port: int) -> dict[str, Any]:
    """Figures of one shape on this rank's device."""
    on_gpu = torch.cuda.is_available()
    settings = Settings.model_validate(
        {
            "rollout": {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": RESPONSE_TOKENS},
            "algorithm": {"micro_batch_tokens": 8192},
            "learner": {"learning_rate": 1e-6, "warmup_steps": 0, "gradient_checkpointing": shape == "3B"},
            "cluster": {"gpus_per_learner": float(on_gpu)},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        actor = LearnerActor(0, 1, settings.model_dump_json(), str(save_random_model(shape, Path(folder))))
        parameters = actor.setup(host, port)["parameters"]
    groups = workload.random_groups(VOCABULARY_SIZE, GROUP_COUNT, SAMPLES_PER_GROUP, PROMPT_TOKENS, RESPONSE_TOKENS)
    response_lengths = [[RESPONSE_TOKENS] * SAMPLES_PER_GROUP] * GROUP_COUNT
    plan = plan_micro_batches([PROMPT_TOKENS] * GROUP_COUNT, response_lengths, world_size=1, token_budget=8192)[0]
    advantage_inputs = AdvantageInputs(
        [[1.0, -1.0, 0.5, -0.5] * (SAMPLES_PER_GROUP // 4)] * GROUP_COUNT, response_lengths
    )
    learner_inputs = build_learner_inputs(
        settings.algorithm, advantage_inputs, max_response_tokens=RESPONSE_TOKENS, kl_coef=0.02
    )
    step_seconds = time_fastest(lambda: actor.train_step(groups, learner_inputs, plan, 0))

    def sync_weights() -> None:
        actor.begin_weight_sync(1, {})
        while actor.send_next_weight_bucket() is not None:
            pass
        actor.end_weight_sync()

    sync_seconds = time_fastest(sync_weights)
    # The learner's packed attention needs the inputs of a packed batch; plain rows use the standard one.
    for module in filter(None, (actor.engine.module, actor._reference_model)):
        module.set_attn_implementation("sdpa")
    plain_seconds = time_fastest(build_plain_step(actor, groups, batch_rows=8192 // (PROMPT_TOKENS + RESPONSE_TOKENS)))
    tokens = GROUP_COUNT * SAMPLES_PER_GROUP * (PROMPT_TOKENS + RESPONSE_TOKENS)
    device_name = torch.cuda.get_device_name() if on_gpu else "cpu"
    flops_per_token = count_flops_per_token(parameters, has_reference=True, is_lora=False)
    mfu = compute_mfu(flops_per_token, tokens / step_seconds, 1, device_name)
    figures = {
        "device": device_name,
        "parameters": parameters,
        "step_s": round(step_seconds, 3),
        "tokens_per_s": round(tokens / step_seconds, 1),
        "plain_tokens_per_s": round(tokens / plain_seconds, 1),
        "ratio_over_plain": round(plain_seconds / step_seconds, 2),
        "mfu": None if mfu is None else round(mfu, 3),
        "weight_sync_gb_per_s": round(2 * parameters / sync_seconds / 1e9, 2),
        "peak_gib": round(
            (torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            / 2**30,
            2,
        ),
    }
    actor.shutdown()
    return figures


def main() -> None:
    """Measure every shape in turn and write the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"among {', '.join(LLAMA_SHAPES)}")
    requested = parser.parse_args().shapes
    unknown = sorted(set(requested) - set(LLAMA_SHAPES))
    if unknown:
        parser.error(f"unknown shape {unknown[0]}; choose among {', '.join(LLAMA_SHAPES)}")
    shapes_to_run = requested or (["135M", "1B", "3B"] if torch.cuda.is_available() else ["nano"])
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29511"))
    figures_by_shape = {
        shape: measure_shape(shape, host, port + 1 + index) for index, shape in enumerate(shapes_to_run)
    }
    sys.stdout.write(json.dumps({"benchmark": "learner_gpu", "shapes": figures_by_shape}) + "\n")


if __name__ == "__main__":
    main()
