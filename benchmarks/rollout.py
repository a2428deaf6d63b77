"""Tokens per second of a rollout actor, compared with bare LLM.generate with the same settings.

Both run SmolLM2-135M (or the model named by the first argument) with 64 samples in flight, 48 tokens each, in turn on
the same machine. The last line is JSON. Usage: python benchmarks/rollout.py [model] [threads]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.types import Message, Prompt
from rluf.utils.paths import resolve_cache_folder

SAMPLES_PER_PROMPT, GROUP_COUNT, ROUND_COUNT = 4, 16, 3
PROMPT_TEXTS = (
    "Tell me about the sea and why it is salty, please, in a few words.",
    "I feel lonely tonight. What should I do? My friends are far away now.",
    "Write a short poem about a red bicycle in the rain and a child who waits.",
    "How do I sort a list of numbers in Python without using the sort function?",
)


def build_prompts(model: Path) -> list[Prompt]:
    """One distinct prompt of about 50 tokens for each group."""
    tokenizer = load_tokenizer(model)
    prompts = []
    for index in range(GROUP_COUNT):
        messages = (Message(role="user", content=f"{PROMPT_TEXTS[index % len(PROMPT_TEXTS)]} ({index})"),)
        prompts.append(Prompt(str(index), messages, render_prompt(tokenizer, messages), "bench", "train"))
    return prompts


def measure_actor(settings: Settings, model: Path) -> dict[str, float]:
    """Tokens per second through a Ray actor, best and median round, and its start-up time in seconds."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    from actors.rollout import RolloutActor

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    try:
        started = time.perf_counter()
        actor: Any = ray.remote(RolloutActor).options(num_cpus=1).remote(0, settings.model_dump_json(), str(model))
        ray.get(actor.start.remote())
        startup_s = time.perf_counter() - started
        prompts, speeds = build_prompts(model), []
        for seed in range(ROUND_COUNT + 1):
            started = time.perf_counter()
            call_refs = [
                actor.generate_group.options(num_returns=2).remote(prompt, SAMPLES_PER_PROMPT, seed)
                for prompt in prompts
            ]
            tokens = sum(sum(info.response_tokens) for info in ray.get([info for _, info in call_refs]))
            speeds.append(tokens / (time.perf_counter() - started))
        ray.get(actor.shutdown.remote())
    finally:
        ray.shutdown()
    return _summarize_speeds(speeds[1:]) | {"start_s": round(startup_s, 1)}


def measure_bare_llm(settings: Settings, model: Path) -> dict[str, float]:
    """The same prompts through vLLM's offline LLM in this process, with the same seeds and logprobs."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    rollout_settings = settings.rollout
    started = time.perf_counter()
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=rollout_settings.max_prompt_tokens + rollout_settings.max_response_tokens + 1,
        max_num_seqs=rollout_settings.concurrency,
        kv_cache_memory_bytes=int(rollout_settings.kv_cache_gib * 2**30),
        distributed_executor_backend="uni",
        enable_chunked_prefill=False,
        max_num_batched_tokens=1024,
        disable_log_stats=True,
    )
    startup_s = time.perf_counter() - started
    token_prompts = [
        tokens_input(list(prompt.token_ids)) for prompt in build_prompts(model) for _ in range(SAMPLES_PER_PROMPT)
    ]
    speeds = []
    for seed in range(ROUND_COUNT + 1):
        params = [
            SamplingParams(
                max_tokens=rollout_settings.max_response_tokens, logprobs=0, seed=seed * len(token_prompts) + index
            )
            for index in range(len(token_prompts))
        ]
        started = time.perf_counter()
        outputs = llm.generate(token_prompts, params, use_tqdm=False)
        speeds.append(sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started))
    return _summarize_speeds(speeds[1:]) | {"start_s": round(startup_s, 1)}


def _summarize_speeds(speeds: list[float]) -> dict[str, float]:
    ranked = sorted(speeds)
    return {"tokens_per_s": round(ranked[len(ranked) // 2], 1), "best_tokens_per_s": round(ranked[-1], 1)}


def main() -> None:
    """Run both, the bare LLM in a separate process."""
    is_bare_run = "--bare" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--bare"]
    threads = int(arguments[1]) if len(arguments) > 1 else (os.cpu_count() or 1)
    settings = Settings.model_validate(
        {
            "name": "bench",
            "cluster": {"threads_per_actor": threads},
            "rollout": {"temperature": 1.0, "max_response_tokens": 48},
        }
    )
    model = resolve_model(arguments[0] if arguments else settings.model.path, resolve_cache_folder(settings))
    if is_bare_run:
        from rluf.backends.vllm.engine import set_vllm_environment

        set_vllm_environment(settings)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        sys.stdout.write(json.dumps(measure_bare_llm(settings, model)) + "\n")
        return
    actor_speed = measure_actor(settings, model)
    command = [sys.executable, __file__, str(model), str(threads), "--bare"]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    bare_speed = json.loads(completed.stdout.splitlines()[-1])
    result = {
        "benchmark": "rollout",
        "model": model.name,
        "threads": threads,
        "load_1m": round(os.getloadavg()[0], 1),
        "actor": actor_speed,
        "bare_llm": bare_speed,
        "ratio": round(actor_speed["tokens_per_s"] / bare_speed["tokens_per_s"], 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
