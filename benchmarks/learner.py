"""Time of one quickstart step on a learner rank, compared with a bare torch loop of the same dtype.

The bare loop does not use rluf: plain transformers, one padded batch row per sample, the same loss, and the same
float32 master weights under torch's AdamW. Tokens are counted identically for both: each sample's prompt and response.
Run: python benchmarks/learner.py [model] [micro_batch_tokens]; the last line is JSON.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: idle OpenMP threads must not spin on the cores that Ray's processes need.
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
import torch

from actors.learner import LearnerActor
from cluster.placement import actor_options
from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import build_learner_inputs
from rluf.config.policy import AlgorithmSettings, ModelSettings
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample
from rluf.utils.paths import resolve_cache_folder

logger = logging.getLogger("benchmarks.learner")

GROUP_COUNT, SAMPLES_PER_GROUP, PROMPT_TOKENS, RESPONSE_TOKENS, REPEATS = 12, 4, 45, 35, 3
TOKENS_PER_STEP = GROUP_COUNT * SAMPLES_PER_GROUP * (PROMPT_TOKENS + RESPONSE_TOKENS)


def random_groups(
    vocabulary_size: int,
    group_count: int = GROUP_COUNT,
    sample_count: int = SAMPLES_PER_GROUP,
    prompt_tokens: int = PROMPT_TOKENS,
    response_tokens: int = RESPONSE_TOKENS,
    seed: int = 0,
) -> list[Group]:
    """Groups of random tokens, by default with the lengths of the quickstart."""
    rng = random.Random(seed)

    def random_tokens(token_count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary_size) for _ in range(token_count))

    groups = []
    for index in range(group_count):
        prompt_ids = random_tokens(prompt_tokens)
        samples = tuple(
            Sample(
                str(index), prompt_ids, random_tokens(response_tokens), (-9.0,) * response_tokens, ((0, 0),), "stop", ""
            )
            for _ in range(sample_count)
        )
        groups.append(Group(Prompt(str(index), (), prompt_ids, "", "train"), samples, 0))
    return groups


def time_fastest(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of REPEATS runs after a warm-up, and its result."""
    best: tuple[float, Any] = (float("inf"), None)
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - started
        if repeat and seconds < best[0]:
            best = seconds, result
    return best


def time_learner_step(settings: Settings, folder: Path, groups: list[Group]) -> tuple[float, dict[str, float]]:
    """Seconds of a step of a real learner actor, and its metrics."""
    actor = (
        ray.remote(LearnerActor)
        .options(**actor_options(settings, "learner"))
        .remote(0, 1, settings.model_dump_json(), str(folder))
    )
    ray.get(actor.setup.remote(*ray.get(actor.find_rendezvous_address.remote())))
    plan = plan_micro_batches(
        [PROMPT_TOKENS] * GROUP_COUNT,
        [[RESPONSE_TOKENS] * SAMPLES_PER_GROUP] * GROUP_COUNT,
        world_size=1,
        token_budget=settings.algorithm.micro_batch_tokens,
    )
    group_refs = [ray.put(group) for group in groups]
    advantage_inputs = AdvantageInputs(
        [[1.0, -1.0, 0.5, -0.5]] * GROUP_COUNT, [[RESPONSE_TOKENS] * SAMPLES_PER_GROUP] * GROUP_COUNT
    )
    learner_inputs = build_learner_inputs(
        settings.algorithm, advantage_inputs, max_response_tokens=RESPONSE_TOKENS, kl_coef=settings.algorithm.kl_coef
    )
    seconds, metrics = time_fastest(lambda: ray.get(actor.train_step.remote(group_refs, learner_inputs, plan[0], 0)))
    metrics["peak_bytes"] = ray.get(actor.get_health.remote())["peak_bytes"]
    ray.get(actor.shutdown.remote())
    ray.kill(actor)
    return seconds, metrics


def time_bare_step(folder: Path, groups: list[Group], dtype: torch.dtype, batch_rows: int) -> float:
    """Seconds of a step of a bare torch loop over micro-batches of `batch_rows` samples of equal length, unpadded."""
    from transformers import AutoModelForCausalLM

    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
    weights = list(model.parameters())
    master_weights = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(master_weights, lr=1e-5, weight_decay=0.0)
    token_ids = torch.tensor(
        [[*sample.prompt_ids, *sample.response_ids] for group in groups for sample in group.samples]
    )
    prompt_tokens, response_tokens = len(groups[0].prompt.token_ids), len(groups[0].samples[0].response_ids)

    def response_logprobs(network: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=batch, logits_to_keep=response_tokens + 1, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits.float(), -1).gather(-1, batch[:, prompt_tokens:, None])

    def run_step() -> None:
        for batch in token_ids.split(batch_rows):
            with torch.no_grad():
                reference_logprobs = response_logprobs(reference, batch)
            policy_logprobs = response_logprobs(model, batch)
            log_ratio = policy_logprobs - reference_logprobs
            loss = -torch.exp(policy_logprobs - policy_logprobs.detach()) + 0.02 * (torch.expm1(-log_ratio) + log_ratio)
            (loss.mean() * len(batch) / len(token_ids)).backward()
        for master_weight, weight in zip(master_weights, weights, strict=True):
            master_weight.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master_weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master_weight, weight in zip(master_weights, weights, strict=True):
                weight.copy_(master_weight)

    return time_fastest(run_step)[0]


def main() -> None:
    """Measure both and write the JSON line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model_name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    token_budget = int(sys.argv[2]) if len(sys.argv) > 2 else AlgorithmSettings().micro_batch_tokens
    settings = Settings(
        model=ModelSettings(path=model_name), algorithm=AlgorithmSettings(micro_batch_tokens=token_budget)
    )
    folder = resolve_model(model_name, resolve_cache_folder(settings))
    groups = random_groups(json.loads((folder / "config.json").read_text())["vocab_size"])
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    seconds, metrics = time_learner_step(settings, folder, groups)
    ray.shutdown()
    bare_seconds = time_bare_step(
        folder,
        groups,
        getattr(torch, settings.policy_dtype),
        batch_rows=max(1, token_budget // (PROMPT_TOKENS + RESPONSE_TOKENS)),
    )
    result = {
        "benchmark": "learner",
        "model": model_name,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": token_budget,
        "tokens": TOKENS_PER_STEP,
        "step_s": round(seconds, 3),
        "tokens_per_s": round(TOKENS_PER_STEP / seconds, 1),
        "bare_step_s": round(bare_seconds, 3),
        "bare_tokens_per_s": round(TOKENS_PER_STEP / bare_seconds, 1),
        "speedup": round(bare_seconds / seconds, 2),
        **{key: round(metrics[key], 3) for key in ("reference_s", "backward_s", "optimizer_s")},
        "learner_peak_gib": round(metrics["peak_bytes"] / 2**30, 2),
        "bare_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
