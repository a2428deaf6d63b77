"""How many samples a second does one whole GRPO step give, against TRL's GRPOTrainer on the same machine?

Both take SmolLM2-135M-Instruct in the same dtype (bfloat16 with float32 master weights, or float32), the same 8 prompts
x 4 samples x 64 tokens, KL 0.02 to a frozen reference, the same rule judge as the reward, AdamW. One after the other,
each in a process of its own, on an idle machine; the fastest step after a warm-up counts for each. Then the parts: our
rollout against bare LLM.generate on the same prompts, our learner against a bare torch loop of the same dtype on rows
of equal length (so without padding), the publish against a copy of the same bytes in memory. The last line is JSON.

Usage: python benchmarks/rl_step.py [--steps N] [--dtype bfloat16|float32]. Without --dtype it is bfloat16 where the
processor multiplies it, else float32. (TRL comes with the dev extra.)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers give way to others; the peer does not

from rluf.config.cpu_dtype import cpu_dtype
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.objectives.judges import find_judge
from rluf.types import Message, Prompt
from rluf.utils.paths import cache_dir

PROMPTS, SAMPLES, TOKENS, JUDGE = 8, 4, 64, "repetition"
TEXTS = (
    "Tell me about the sea and why it is salty, please, in a few words.",
    "I feel lonely tonight. What should I do? My friends are far away now.",
    "Write a short poem about a red bicycle in the rain and a child who waits.",
    "How do I sort a list of numbers in Python without using the sort function?",
    "What should I cook tonight with rice, two eggs and a tin of tomatoes?",
    "Explain to a child of seven why the moon changes its shape over a month.",
    "My cat hides under the bed since we moved. How can I help her feel safe?",
    "Give me three reasons to learn a musical instrument as a grown-up person.",
)


def settings_of(steps: int, dtype: str) -> Settings:
    """One engine, one learner rank, one rule judge: the sizes of this benchmark."""
    judge = {"source": "judge", "judge": JUDGE}
    return Settings.model_validate(
        {
            "name": "rl-step",
            "model": {"dtype": dtype},
            "rollout": {"max_prompt_tokens": 96, "max_response_tokens": TOKENS},
            "algorithm": {
                "steps": steps,
                "prompts_per_step": PROMPTS,
                "samples_per_prompt": SAMPLES,
                "mix": [],
                "demonstrations": 0,
            },
            "learner": {"learning_rate": 1e-6, "warmup_steps": 0},
            "objectives": {
                "love": {"weight": 1.0, **judge},
                "helpfulness": {"weight": 0.0, **judge},
                "safety": {"weight": 0.0, **judge},
                "alone": [],
            },
        }
    )


def prompts(model: Path) -> list[Prompt]:
    """The prompts as token ids."""
    tokenizer = load_tokenizer(model)
    messages = [(Message(role="user", content=text),) for text in TEXTS]
    return [Prompt(str(n), m, render_prompt(tokenizer, m), "bench", "train") for n, m in enumerate(messages)]


def cpu_seconds() -> float:
    """CPU seconds that this process and all below it have used; what other programs do to the clock leaves it alone."""
    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def ours(model: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Rows of metrics of our steps: the real actors, pumps and publish."""
    import ray

    from rluf.train.actor_groups import Supervisor
    from rluf.train.controller import Pipeline

    settings = settings_of(steps, dtype)

    async def run() -> list[dict[str, float]]:
        async with Supervisor(settings, model, {"love": None}, learners=True) as supervisor:
            pipeline, rows = Pipeline(settings, supervisor.crew, prompts(model)), []
            for number in range(1, steps + 1):
                begun = cpu_seconds()
                row = await supervisor.run(pipeline.step(number))
                rows.append({**row, "cpu_s": cpu_seconds() - begun})
            return rows

    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        return {"steps": asyncio.run(run())}
    finally:
        ray.shutdown()


def trl(model: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Seconds of TRL's steps: GRPOTrainer (bfloat16 by autocast) on the CPU, its own generation."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    judge, seconds, cpu, lengths = find_judge(JUDGE), [], [], []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times each optimiser step, its generation included."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter(), cpu_seconds()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begun[0])
            cpu.append(cpu_seconds() - self.begun[1])

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [float(judge((), completion[0]["content"])) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=PROMPTS * SAMPLES // 8,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            beta=0.02,
            learning_rate=1e-6,
            loss_type="grpo",
            optim="adamw_torch",
            max_steps=steps,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
        )
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS]
        data = Dataset.from_list(rows * steps)
        GRPOTrainer(str(model), reward, args=config, train_dataset=data, callbacks=[Clock()]).train()
    return {"seconds": seconds, "cpu": cpu, "tokens": lengths}


def bare_llm(model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Response tokens a second of vLLM's offline LLM on the same prompts, seeded, with logprobs; best of `rounds`."""
    from rluf.backends.vllm.engine import set_environment

    settings = settings_of(1, dtype)
    set_environment(settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    llm = LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=settings.rollout.max_prompt_tokens + TOKENS + 1,
        max_num_seqs=settings.rollout.concurrency,
        kv_cache_memory_bytes=int(settings.rollout.kv_cache_gib * 2**30),
        distributed_executor_backend="uni",
        enable_chunked_prefill=False,
        max_num_batched_tokens=1024,
        disable_log_stats=True,
    )
    batch = [tokens_input(list(prompt.token_ids)) for prompt in prompts(model) for _ in range(SAMPLES)]
    speeds = []
    for number in range(rounds + 1):
        params = [
            SamplingParams(max_tokens=TOKENS, logprobs=0, seed=number * len(batch) + index)
            for index in range(len(batch))
        ]
        begun = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        speeds.append(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - begun))
    return {"tokens_per_s": speeds[1:]}


def bare_learner(model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Tokens a second of a bare torch loop (benchmarks/learner.py) on rows of equal length, and of a memory copy."""
    import learner
    import torch

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    prompt = round(fmean(len(p.token_ids) for p in prompts(model)))
    learner.REPEATS = rounds
    groups = learner.random_groups(vocabulary, PROMPTS, SAMPLES, prompt, TOKENS)
    seconds = learner.bare_step(model, groups, getattr(torch, dtype), rows=8)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    weights = torch.zeros(stored * (2 if dtype == "float32" else 1), dtype=torch.uint8)
    target = torch.zeros_like(weights)
    copies = []
    for _ in range(3):
        begun = time.perf_counter()
        target.copy_(weights)
        copies.append(time.perf_counter() - begun)
    return {"tokens_per_s": PROMPTS * SAMPLES * (prompt + TOKENS) / seconds, "memcpy_s": min(copies)}


def arithmetic(model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """What the learner's CPU time is made of: one group forward and backward on one thread, by torch's profiler.

    `products` is the share of matrix products, `gflops` what a core gives over all; `tflop` counts a whole step of ours
    (each prompt once a group) and of one padded row a sample, with policy, backward and reference.
    """
    import learner
    import torch

    from rluf.algorithms.logprobs import response_logprobs
    from rluf.algorithms.packing import pack
    from rluf.algorithms.policy_io import load_policy

    torch.set_num_threads(1)
    policy = load_policy(model, dtype=getattr(torch, dtype))
    config = json.loads((model / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"]
    body = sum(weight.numel() for weight in policy.parameters() if weight.dim() == 2) - head
    prompt = round(fmean(len(p.token_ids) for p in prompts(model)))
    (group,) = learner.random_groups(config["vocab_size"], 1, SAMPLES, prompt, TOKENS)
    batch = pack([(0, sample) for sample in range(SAMPLES)], {0: group}, [[1.0] * SAMPLES])

    def step() -> None:
        response_logprobs(policy, batch).sum().backward()

    step()
    begun = time.process_time()
    for _ in range(rounds):
        step()
    seconds = time.process_time() - begun
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {row.key: row.self_cpu_time_total / 1e6 for row in profile.key_averages()}
    products = sum(times.get(name, 0.0) for name in ("aten::mm", "aten::addmm", "aten::bmm"))
    flop = 2 * (body * batch.input_ids.numel() + head * batch.targets.numel())
    responses = PROMPTS * SAMPLES * TOKENS
    packed, padded = PROMPTS * prompt + responses, PROMPTS * SAMPLES * prompt + responses
    return {
        "products": round(products / sum(times.values()), 3),
        "gflops": round(3 * flop * rounds / seconds / 1e9, 1),
        "tflop": [round(8 * (body * tokens + head * responses) / 1e12, 2) for tokens in (packed, padded)],
    }


PARTS = {"ours": ours, "trl": trl, "bare_llm": bare_llm, "bare_learner": bare_learner, "arithmetic": arithmetic}


def part(name: str, model: Path, count: int, dtype: str) -> dict[str, Any]:
    """Run one part in a process of its own and read its last line."""
    command = [sys.executable, __file__, "--part", name, "--model", str(model), "--steps", str(count), "--dtype", dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run every part, one after the other, and write the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=cpu_dtype())
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    if asked.part:
        sys.stdout.write(json.dumps(PARTS[asked.part](asked.model, asked.steps, asked.dtype)) + "\n")
        return
    settings = settings_of(1, asked.dtype)
    model = resolve_model(settings.model.path, cache_dir(settings))
    found = {name: part(name, model, asked.steps + (name == "ours"), asked.dtype) for name in PARTS}
    rows = found["ours"]["steps"][1:]
    best = min(rows, key=lambda row: row["step_s"])
    tokens = best["prompt_tokens"] + best["response_tokens"]
    phases = {name: best[f"{name}_s"] for name in ("generate", "score", "learn", "publish")}
    theirs = min(found["trl"]["seconds"][1:])
    speed = max(row["response_tokens"] / row["generate_s"] for row in rows)
    result = {
        "benchmark": "rl_step",
        "dtype": asked.dtype,
        "threads": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 1),
        "step_s": round(best["step_s"], 2),
        "trl_step_s": round(theirs, 2),
        "trl_steps_s": [round(s, 1) for s in found["trl"]["seconds"]],
        "response_tokens": best["response_tokens"],
        "trl_response_tokens": found["trl"]["tokens"],
        "samples_per_s": round(PROMPTS * SAMPLES / best["step_s"], 2),
        "ratio_over_trl": round(theirs / best["step_s"], 2),
        "cpu_s": round(min(row["cpu_s"] for row in rows), 1),
        "trl_cpu_s": round(min(found["trl"]["cpu"][1:]), 1),
        "cpu_ratio_over_trl": round(min(found["trl"]["cpu"][1:]) / min(row["cpu_s"] for row in rows), 2),
        "rollout_ratio": round(speed / max(found["bare_llm"]["tokens_per_s"]), 3),
        "rollout_tokens_per_s": round(speed, 1),
        "learner_ratio": round(
            max((row["prompt_tokens"] + row["response_tokens"]) / row["learn_s"] for row in rows)
            / found["bare_learner"]["tokens_per_s"],
            3,
        ),
        "learner_tokens_per_s": round(tokens / best["learn_s"], 1),
        "publish_over_memcpy": round(best["publish_s"] / found["bare_learner"]["memcpy_s"], 1),
        "probe_share": round(best["probe_s"] / best["step_s"], 4),
        "phases": {
            **{name: round(value, 3) for name, value in phases.items()},
            "idle": round(best["step_s"] - sum(phases.values()), 3),
        },
        "arithmetic": found["arithmetic"],
        "learner": {name: round(best[name], 3) for name in ("reference_s", "backward_s", "optimizer_s")},
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
