"""How fast is the learner on a GPU, and which share of its arithmetic does it use? The actor's own code, without Ray.

Random-weight Llama shapes of 135M, 1B and 3B parameters in bfloat16: seconds of a GRPO step, tokens a second (each
sample's prompt and response), model-FLOPs utilisation (6 FLOPs a parameter and token for the update and 2 for the
reference, over the GPU's dense bfloat16 peak), bytes a second that a publish gathers and copies out, and a plain
transformers + DeepSpeed step on padded rows in the same run. On a CPU it runs shapes named by hand, without
utilisation. Not run on a GPU yet. The last line is JSON.

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
from rluf.algorithms.advantages import Outcomes
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import make_lesson
from rluf.backends import deepspeed as ds
from rluf.config.settings import Settings
from rluf.types import Group

SHAPES = {
    "nano": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
KEY_HEADS = {"nano": 2, "135M": 3, "1B": 8, "3B": 8}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOPs a second by GPU, from the vendor's data sheets."""
GROUPS, SAMPLES, PROMPT, RESPONSE, VOCABULARY = 16, 8, 128, 256, 32_000


def make_model(shape: str, folder: Path) -> Path:
    """A Hugging Face folder of random weights in a Llama shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        num_key_value_heads=KEY_HEADS[shape],
        tie_word_embeddings=True,
        **SHAPES[shape],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def timed(action: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` runs after one to warm up."""
    best = float("inf")
    for number in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - begun)
    return best


def plain_step(actor: LearnerActor, groups: list[Group], rows: int) -> Callable[[], None]:
    """The step one would write with transformers and DeepSpeed: padded rows, whole logits of the responses."""
    engine, device = actor.engine, actor.device
    ids = torch.tensor([[*s.prompt_ids, *s.response_ids] for g in groups for s in g.samples], device=device)

    def logprobs(model: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch, logits_to_keep=RESPONSE + 1, use_cache=False).logits[:, :-1]
        flat = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, PROMPT:].flatten(), reduction="none")
        return -flat

    def step() -> None:
        parts = ids.split(rows)
        for number, batch in enumerate(parts):
            with torch.no_grad():
                base = logprobs(actor._reference, batch)

            def forward(batch: torch.Tensor = batch, base: torch.Tensor = base) -> tuple[torch.Tensor, None]:
                found = logprobs(engine, batch)
                gap = found - base
                loss = -torch.exp(found - found.detach()) + 0.02 * (torch.expm1(-gap) + gap)
                return loss.mean() / len(parts), None

            ds.accumulate(engine, forward, last=number == len(parts) - 1)
        ds.apply_step(engine)

    return step


def measure(shape: str, host: str, port: int) -> dict[str, Any]:
    """The figures of one shape on this rank's device."""
    on_gpu = torch.cuda.is_available()
    settings = Settings.model_validate(
        {
            "rollout": {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
            "algorithm": {"micro_batch_tokens": 8192},
            "learner": {"learning_rate": 1e-6, "warmup_steps": 0, "gradient_checkpointing": shape == "3B"},
            "cluster": {"gpus_per_learner": float(on_gpu)},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        actor = LearnerActor(0, 1, settings.model_dump_json(), str(make_model(shape, Path(folder))))
        parameters = actor.setup(host, port)["parameters"]
    groups = workload.random_groups(VOCABULARY, GROUPS, SAMPLES, PROMPT, RESPONSE)
    lengths = [[RESPONSE] * SAMPLES] * GROUPS
    plan = plan_micro_batches([PROMPT] * GROUPS, lengths, ranks=1, token_budget=8192)[0]
    outcomes = Outcomes([[1.0, -1.0, 0.5, -0.5] * (SAMPLES // 4)] * GROUPS, lengths)
    lesson = make_lesson(settings.algorithm, outcomes, longest=RESPONSE, kl_coef=0.02)
    seconds = timed(lambda: actor.step(groups, lesson, plan, 0))

    def publish() -> None:
        actor.begin_publish({"engine": "shm", "version": 1})
        while actor.next_bucket() is not None:
            pass
        actor.end_publish()

    published = timed(publish)
    for module in filter(None, (actor.engine.module, actor._reference)):
        module.set_attn_implementation("sdpa")
    plain = timed(plain_step(actor, groups, rows=8192 // (PROMPT + RESPONSE)))
    tokens = GROUPS * SAMPLES * (PROMPT + RESPONSE)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = next((value for gpu, value in PEAK.items() if gpu in name), None)
    found = {
        "device": name,
        "parameters": parameters,
        "step_s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "plain_tokens_per_s": round(tokens / plain, 1),
        "ratio_over_plain": round(plain / seconds, 2),
        "mfu": None if peak is None else round(8 * parameters * tokens / seconds / peak, 3),
        "publish_gb_per_s": round(2 * parameters / published / 1e9, 2),
        "peak_gib": round(
            (torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            / 2**30,
            2,
        ),
    }
    actor.shutdown()
    return found


def main() -> None:
    """Measure every shape, one after the other, and write the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"among {', '.join(SHAPES)}")
    asked = parser.parse_args().shapes
    unknown = sorted(set(asked) - set(SHAPES))
    if unknown:
        parser.error(f"unknown shape {unknown[0]}; choose among {', '.join(SHAPES)}")
    wanted = asked or (["135M", "1B", "3B"] if torch.cuda.is_available() else ["nano"])
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29511"))
    shapes = {shape: measure(shape, host, port + 1 + number) for number, shape in enumerate(wanted)}
    sys.stdout.write(json.dumps({"benchmark": "learner_gpu", "shapes": shapes}) + "\n")


if __name__ == "__main__":
    main()
