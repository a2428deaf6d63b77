"""How fast does a learner rank take one quickstart step, against a bare torch loop of the same dtype?

The bare loop is what one would write without rluf: plain transformers, one padded batch row a sample, the same loss,
the same float32 master weights under torch's AdamW. Tokens are counted alike for both: each sample's prompt and
response. Run: python benchmarks/learner.py [model] [micro_batch_tokens]; the last line is JSON.
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

os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
import torch

from actors.learner import LearnerActor
from cluster.placement import role_options
from rluf.algorithms.advantages import Outcomes
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import make_lesson
from rluf.config.policy import AlgorithmSettings, ModelSettings
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample
from rluf.utils.paths import cache_dir

logger = logging.getLogger("benchmarks.learner")

GROUPS, SAMPLES, PROMPT, RESPONSE, REPEATS = 12, 4, 45, 35, 3
TOKENS = GROUPS * SAMPLES * (PROMPT + RESPONSE)


def random_groups(
    vocabulary: int,
    count: int = GROUPS,
    samples: int = SAMPLES,
    prompt: int = PROMPT,
    response: int = RESPONSE,
    seed: int = 0,
) -> list[Group]:
    """Groups of random tokens, by default in the lengths of quickstart."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(count))

    groups = []
    for index in range(count):
        ids = tokens(prompt)
        drawn = tuple(
            Sample(str(index), ids, tokens(response), (-9.0,) * response, ((0, 0),), "stop", "") for _ in range(samples)
        )
        groups.append(Group(Prompt(str(index), (), ids, "", "train"), drawn, 0))
    return groups


def fastest(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of REPEATS runs after one to warm up, and its result."""
    best: tuple[float, Any] = (float("inf"), None)
    for number in range(REPEATS + 1):
        begun = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - begun
        if number and seconds < best[0]:
            best = seconds, result
    return best


def learner_step(settings: Settings, folder: Path, groups: list[Group]) -> tuple[float, dict[str, float]]:
    """Seconds of a step of a real learner actor, and the metrics it reports."""
    actor = (
        ray.remote(LearnerActor)
        .options(**role_options(settings, "learner"))
        .remote(0, 1, settings.model_dump_json(), str(folder))
    )
    ray.get(actor.setup.remote(*ray.get(actor.address.remote())))
    plan = plan_micro_batches(
        [PROMPT] * GROUPS,
        [[RESPONSE] * SAMPLES] * GROUPS,
        ranks=1,
        token_budget=settings.algorithm.micro_batch_tokens,
    )
    refs = [ray.put(group) for group in groups]
    outcomes = Outcomes([[1.0, -1.0, 0.5, -0.5]] * GROUPS, [[RESPONSE] * SAMPLES] * GROUPS)
    lesson = make_lesson(settings.algorithm, outcomes, longest=RESPONSE, kl_coef=settings.algorithm.kl_coef)
    seconds, metrics = fastest(lambda: ray.get(actor.step.remote(refs, lesson, plan[0], 0)))
    metrics["peak_bytes"] = ray.get(actor.health.remote())["peak_bytes"]
    ray.get(actor.shutdown.remote())
    ray.kill(actor)
    return seconds, metrics


def bare_step(folder: Path, groups: list[Group], dtype: torch.dtype, rows: int) -> float:
    """Seconds of a step of a bare torch loop over micro-batches of `rows` samples, all of one length: no padding."""
    from transformers import AutoModelForCausalLM

    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.0)
    ids = torch.tensor([[*s.prompt_ids, *s.response_ids] for g in groups for s in g.samples])
    prompt, response = len(groups[0].prompt.token_ids), len(groups[0].samples[0].response_ids)

    def logprobs(network: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=batch, logits_to_keep=response + 1, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits.float(), -1).gather(-1, batch[:, prompt:, None])

    def step() -> None:
        for batch in ids.split(rows):
            with torch.no_grad():
                base = logprobs(reference, batch)
            found = logprobs(model, batch)
            difference = found - base
            loss = -torch.exp(found - found.detach()) + 0.02 * (torch.expm1(-difference) + difference)
            (loss.mean() * len(batch) / len(ids)).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)

    return fastest(step)[0]


def main() -> None:
    """Measure both and write the JSON line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    budget = int(sys.argv[2]) if len(sys.argv) > 2 else AlgorithmSettings().micro_batch_tokens
    settings = Settings(model=ModelSettings(path=name), algorithm=AlgorithmSettings(micro_batch_tokens=budget))
    folder = resolve_model(name, cache_dir(settings))
    groups = random_groups(json.loads((folder / "config.json").read_text())["vocab_size"])
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    seconds, metrics = learner_step(settings, folder, groups)
    ray.shutdown()
    bare = bare_step(folder, groups, getattr(torch, settings.policy_dtype), rows=max(1, budget // (PROMPT + RESPONSE)))
    result = {
        "benchmark": "learner",
        "model": name,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": budget,
        "tokens": TOKENS,
        "step_s": round(seconds, 3),
        "tokens_per_s": round(TOKENS / seconds, 1),
        "bare_step_s": round(bare, 3),
        "bare_tokens_per_s": round(TOKENS / bare, 1),
        "speedup": round(bare / seconds, 2),
        **{key: round(metrics[key], 3) for key in ("reference_s", "backward_s", "optimizer_s")},
        "learner_peak_gib": round(metrics["peak_bytes"] / 2**30, 2),
        "bare_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
