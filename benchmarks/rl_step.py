"""Throughput of one complete GRPO step, compared with TRL's GRPOTrainer on the same machine.

Both use SmolLM2-135M-Instruct in the same dtype (bfloat16 with float32 master weights, or float32), the same prompts,
samples and response tokens (8 x 4 x 64 by default), KL 0.02 to a frozen reference, the same rule judge as the reward,
and AdamW. They run in turn, each in a separate process, on an idle machine; the fastest step after a warm-up counts.
Then the parts: our rollout against bare LLM.generate on the same prompts, our learner against a bare torch loop of the
same dtype on rows of equal length (without padding), the weight sync against a copy of the same bytes in memory. The
last line is JSON.

Usage: python benchmarks/rl_step.py [--steps N] [--dtype bfloat16|float32] [--prompt TOKENS --samples N --tokens N
--prompts N]. `--prompt 512 --samples 8` is the workload of feedback: chats with a history of about 512 tokens and short
responses. Without --prompt the prompts are single questions of about 47 tokens. Without --dtype it is bfloat16 if the
processor has instructions for it, else float32. (TRL comes with the dev extra.)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import psutil

os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers run at a lower priority by default, TRL does not

from rluf.config.cpu_dtype import detect_cpu_dtype
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.objectives.judges import load_judge
from rluf.types import Message, Prompt
from rluf.utils.paths import resolve_cache_folder

JUDGE_NAME = "repetition"
TRL_BATCH_TOKENS = 4608
"""Tokens that TRL reads at once; more needs over 16 GiB with long prompts."""
PROMPT_TEXTS = (
    "Tell me about the sea and why it is salty, please, in a few words.",
    "I feel lonely tonight. What should I do? My friends are far away now.",
    "Write a short poem about a red bicycle in the rain and a child who waits.",
    "How do I sort a list of numbers in Python without using the sort function?",
    "What should I cook tonight with rice, two eggs and a tin of tomatoes?",
    "Explain to a child of seven why the moon changes its shape over a month.",
    "My cat hides under the bed since we moved. How can I help her feel safe?",
    "Give me three reasons to learn a musical instrument as a grown-up person.",
)


class Workload(NamedTuple):
    """What both sides compute in a step."""

    model: Path
    dtype: str
    prompt: int
    """Tokens of history in front of each question; 0 for single questions."""
    prompts: int
    samples: int
    tokens: int
    """Most tokens of a response."""

    @property
    def max_prompt_tokens(self) -> int:
        """Limit that every prompt fits: the last message of a history may exceed its tokens."""
        return self.prompt + 96

    @property
    def trl_batch_rows(self) -> int:
        """Samples that TRL reads at once: a power of two that divides all samples, 8 for short prompts."""
        rows = 8
        while rows * (self.prompt + self.tokens) > TRL_BATCH_TOKENS or self.prompts * self.samples % rows:
            rows //= 2
        return rows


def build_settings(workload: Workload, steps: int) -> Settings:
    """Settings of the benchmark: one engine, one learner rank, one rule judge."""
    judge = {"source": "judge", "path": JUDGE_NAME}
    return Settings.model_validate(
        {
            "name": "rl-step",
            "model": {"dtype": workload.dtype},
            "rollout": {
                "max_prompt_tokens": workload.max_prompt_tokens,
                "max_response_tokens": workload.tokens,
                "temperature": 1.0,
            },
            "algorithm": {
                "steps": steps,
                "prompts_per_step": workload.prompts,
                "micro_batch_tokens": max(1024, workload.max_prompt_tokens + workload.samples * workload.tokens),
                "samples_per_prompt": workload.samples,
                "topic_weights": {},
                "demonstrations": 0,
            },
            "learner": {"learning_rate": 1e-6, "warmup_steps": 0},
            "objectives": {
                "love": {"weight": 1.0, **judge},
                "helpfulness": {"weight": 0.0, **judge},
                "safety": {"weight": 0.0, **judge},
            },
            "aggregation": {"topic_objectives": {}},
        }
    )


def build_messages(workload: Workload) -> list[tuple[Message, ...]]:
    """Chats that end in a question; each begins with another one, so that no two share a history."""
    tokenizer, chats = load_tokenizer(workload.model), []
    for number in range(workload.prompts):
        texts = itertools.cycle(PROMPT_TEXTS[number % len(PROMPT_TEXTS) :] + PROMPT_TEXTS[: number % len(PROMPT_TEXTS)])
        messages = [Message(role="user", content=f"{number + 1}. {next(texts)}" if workload.prompt else next(texts))]
        while len(render_prompt(tokenizer, tuple(messages))) < workload.prompt:
            messages += [Message(role="assistant", content=next(texts)), Message(role="user", content=next(texts))]
        chats.append(tuple(messages))
    return chats


def build_prompts(workload: Workload) -> list[Prompt]:
    """The prompts as token ids."""
    tokenizer = load_tokenizer(workload.model)
    return [
        Prompt(str(index), messages, render_prompt(tokenizer, messages), "bench", "train")
        for index, messages in enumerate(build_messages(workload))
    ]


def cpu_seconds() -> float:
    """CPU seconds of this process and its descendants, which other programs do not affect."""
    this_process, total = psutil.Process(), 0.0
    for process in (this_process, *this_process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu_times = process.cpu_times()
            total += cpu_times.user + cpu_times.system
    return total


def run_rluf_steps(workload: Workload, steps: int) -> dict[str, Any]:
    """Metrics of our steps, with the real actors, controller and weight sync."""
    import ray

    from rluf.train.actor_supervisor import ActorSupervisor
    from rluf.train.controller import TrainController

    settings = build_settings(workload, steps)

    async def run_steps() -> list[dict[str, float]]:
        async with ActorSupervisor(settings, workload.model, {"love": None}, with_learners=True) as supervisor:
            controller, metric_rows = TrainController(settings, supervisor, build_prompts(workload)), []
            for step in range(1, steps + 1):
                cpu_before = cpu_seconds()
                step_metrics = await supervisor.run_monitored(controller.run_step(step))
                metric_rows.append({**step_metrics, "cpu_s": cpu_seconds() - cpu_before})
            return metric_rows

    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        return {"steps": asyncio.run(run_steps())}
    finally:
        ray.shutdown()


def run_trl_steps(workload: Workload, steps: int) -> dict[str, Any]:
    """Seconds of TRL's steps: GRPOTrainer (bfloat16 by autocast) on the CPU, with its own generation."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    judge, step_seconds, step_cpu_seconds, response_tokens = load_judge(JUDGE_NAME), [], [], []

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        """Times each optimizer step, including generation."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter(), cpu_seconds()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_seconds.append(time.perf_counter() - self.started[0])
            step_cpu_seconds.append(cpu_seconds() - self.started[1])

    def judge_reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        response_tokens.append(sum(map(len, completion_ids)))
        return [float(judge((), completion[0]["content"])) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=workload.dtype == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=workload.trl_batch_rows,
            gradient_accumulation_steps=workload.prompts * workload.samples // workload.trl_batch_rows,
            num_generations=workload.samples,
            max_completion_length=workload.tokens,
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
        prompt_rows = [{"prompt": [dict(message) for message in messages]} for messages in build_messages(workload)]
        dataset = Dataset.from_list(prompt_rows * steps)
        GRPOTrainer(
            str(workload.model), judge_reward, args=config, train_dataset=dataset, callbacks=[StepTimer()]
        ).train()
    return {"seconds": step_seconds, "cpu": step_cpu_seconds, "tokens": response_tokens}


def run_bare_llm(workload: Workload, round_count: int) -> dict[str, Any]:
    """Response tokens per second of vLLM's offline LLM on the same prompts, seeded, with logprobs."""
    from rluf.backends.vllm.engine import set_vllm_environment

    settings = build_settings(workload, 1)
    set_vllm_environment(settings)
    # In this process, so that the measurement has no transfer between processes.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    llm = LLM(
        model=str(workload.model),
        dtype=workload.dtype,
        enforce_eager=True,
        max_model_len=(max_model_tokens := settings.rollout.max_prompt_tokens + workload.tokens + 1),
        max_num_seqs=settings.rollout.concurrency,
        kv_cache_memory_bytes=int(settings.rollout.kv_cache_gib * 2**30),
        distributed_executor_backend="uni",
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(1024, max_model_tokens),
        disable_log_stats=True,
    )
    token_prompts = [
        tokens_input(list(prompt.token_ids)) for prompt in build_prompts(workload) for _ in range(workload.samples)
    ]
    speeds = []
    for round_index in range(round_count + 1):
        params = [
            SamplingParams(max_tokens=workload.tokens, logprobs=0, seed=round_index * len(token_prompts) + index)
            for index in range(len(token_prompts))
        ]
        started = time.perf_counter()
        outputs = llm.generate(token_prompts, params, use_tqdm=False)
        speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started))
    return {"tokens_per_s": speeds[1:]}


def run_bare_learner(workload: Workload, round_count: int) -> dict[str, Any]:
    """Tokens per second of a bare torch loop (benchmarks/learner.py) on rows of equal length, and a memory copy."""
    import learner
    import torch

    vocabulary = json.loads((workload.model / "config.json").read_text())["vocab_size"]
    prompt_tokens = round(fmean(len(item.token_ids) for item in build_prompts(workload)))
    learner.REPEATS = round_count
    groups = learner.random_groups(vocabulary, workload.prompts, workload.samples, prompt_tokens, workload.tokens)
    seconds = learner.time_bare_step(
        workload.model, groups, getattr(torch, workload.dtype), batch_rows=workload.trl_batch_rows
    )
    stored_bytes = sum(weight_file.stat().st_size for weight_file in workload.model.glob("*.safetensors"))
    weights = torch.zeros(stored_bytes * (2 if workload.dtype == "float32" else 1), dtype=torch.uint8)
    copy_target = torch.zeros_like(weights)
    copy_seconds = []
    for _ in range(3):
        started = time.perf_counter()
        copy_target.copy_(weights)
        copy_seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_s": workload.prompts * workload.samples * (prompt_tokens + workload.tokens) / seconds,
        "memcpy_s": min(copy_seconds),
    }


def profile_arithmetic(workload: Workload, round_count: int) -> dict[str, Any]:
    """Breakdown of the learner's CPU time: one group forward and backward on one thread, by torch's profiler.

    `products` is the share of matrix products, `gflops` the throughput of a core over everything. `tflop` counts a
    complete step of ours (each prompt once per group) and with one padded row per sample; policy, backward, reference.
    """
    import learner
    import torch

    from rluf.algorithms.packing import pack_micro_batch
    from rluf.algorithms.policy_model import compute_response_logprobs, load_policy

    torch.set_num_threads(1)
    policy = load_policy(workload.model, dtype=getattr(torch, workload.dtype))
    config = json.loads((workload.model / "config.json").read_text())
    head_parameters = config["vocab_size"] * config["hidden_size"]
    body_parameters = sum(weight.numel() for weight in policy.parameters() if weight.dim() == 2) - head_parameters
    prompt_tokens = round(fmean(len(item.token_ids) for item in build_prompts(workload)))
    (group,) = learner.random_groups(config["vocab_size"], 1, workload.samples, prompt_tokens, workload.tokens)
    batch = pack_micro_batch(
        [(0, sample) for sample in range(workload.samples)], {0: group}, [[1.0] * workload.samples]
    )

    def run_step() -> None:
        compute_response_logprobs(policy, batch).sum().backward()

    run_step()
    cpu_started = time.process_time()
    for _ in range(round_count):
        run_step()
    cpu_seconds_used = time.process_time() - cpu_started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_step()
    seconds_by_operator = {row.key: row.self_cpu_time_total / 1e6 for row in profile.key_averages()}
    matmul_seconds = sum(seconds_by_operator.get(name, 0.0) for name in ("aten::mm", "aten::addmm", "aten::bmm"))
    flop_count = 2 * (body_parameters * batch.input_ids.numel() + head_parameters * batch.target_ids.numel())
    sample_count = workload.prompts * workload.samples
    response_tokens = sample_count * workload.tokens
    packed_tokens = workload.prompts * prompt_tokens + response_tokens
    padded_tokens = sample_count * prompt_tokens + response_tokens
    return {
        "products": round(matmul_seconds / sum(seconds_by_operator.values()), 3),
        "gflops": round(3 * flop_count * round_count / cpu_seconds_used / 1e9, 1),
        "tflop": [
            round(8 * (body_parameters * token_count + head_parameters * response_tokens) / 1e12, 2)
            for token_count in (packed_tokens, padded_tokens)
        ],
    }


PART_FUNCTIONS = {
    "ours": run_rluf_steps,
    "trl": run_trl_steps,
    "bare_llm": run_bare_llm,
    "bare_learner": run_bare_learner,
    "arithmetic": profile_arithmetic,
}


def run_part(name: str, workload: Workload, step_count: int) -> dict[str, Any]:
    """Run one part in a separate process and parse its last line."""
    options = {"part": name, "steps": step_count, **workload._asdict()}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run every part in turn and write the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=detect_cpu_dtype())
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a chat's history")
    parser.add_argument("--prompts", type=int, default=len(PROMPT_TEXTS))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--part", choices=PART_FUNCTIONS)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    model = args.model or resolve_model(Settings().model.path, resolve_cache_folder(Settings()))
    workload = Workload(model, args.dtype, args.prompt, args.prompts, args.samples, args.tokens)
    if args.part:
        sys.stdout.write(json.dumps(PART_FUNCTIONS[args.part](workload, args.steps)) + "\n")
        return
    results = {name: run_part(name, workload, args.steps + (name == "ours")) for name in PART_FUNCTIONS}
    step_rows = results["ours"]["steps"][1:]
    fastest = min(step_rows, key=lambda row: row["step_s"])
    token_count = fastest["prompt_tokens"] + fastest["response_tokens"]
    phase_seconds = {name: fastest[f"{name}_s"] for name in ("generate", "score", "learn", "weight_sync")}
    trl_seconds = min(results["trl"]["seconds"][1:])
    rollout_tokens_per_s = max(row["response_tokens"] / row["generate_s"] for row in step_rows)
    result = {
        "benchmark": "rl_step",
        "workload": {**workload._asdict(), "model": model.name},
        "prompt_tokens": fastest["prompt_tokens"],
        "threads": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 1),
        "step_s": round(fastest["step_s"], 2),
        "trl_step_s": round(trl_seconds, 2),
        "trl_steps_s": [round(seconds, 1) for seconds in results["trl"]["seconds"]],
        "response_tokens": fastest["response_tokens"],
        "trl_response_tokens": results["trl"]["tokens"],
        "samples_per_s": round(workload.prompts * workload.samples / fastest["step_s"], 2),
        "ratio_over_trl": round(trl_seconds / fastest["step_s"], 2),
        "cpu_s": round(min(row["cpu_s"] for row in step_rows), 1),
        "trl_cpu_s": round(min(results["trl"]["cpu"][1:]), 1),
        "cpu_ratio_over_trl": round(min(results["trl"]["cpu"][1:]) / min(row["cpu_s"] for row in step_rows), 2),
        "rollout_ratio": round(rollout_tokens_per_s / max(results["bare_llm"]["tokens_per_s"]), 3),
        "rollout_tokens_per_s": round(rollout_tokens_per_s, 1),
        "learner_ratio": round(
            max((row["prompt_tokens"] + row["response_tokens"]) / row["learn_s"] for row in step_rows)
            / results["bare_learner"]["tokens_per_s"],
            3,
        ),
        "learner_tokens_per_s": round(token_count / fastest["learn_s"], 1),
        "weight_sync_over_memcpy": round(fastest["weight_sync_s"] / results["bare_learner"]["memcpy_s"], 1),
        "sync_check_share": round(fastest["sync_check_s"] / fastest["step_s"], 4),
        "phases": {
            **{name: round(seconds, 3) for name, seconds in phase_seconds.items()},
            "idle": round(fastest["step_s"] - sum(phase_seconds.values()), 3),
        },
        "arithmetic": results["arithmetic"],
        "learner": {name: round(fastest[name], 3) for name in ("reference_s", "backward_s", "optimizer_s")},
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
