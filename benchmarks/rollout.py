"""How many tokens a second does a rollout actor give, against bare LLM.generate with the same settings?

Both run SmolLM2-135M (or the model named by the first argument) at 64 samples in flight, 48 tokens each, one after the
other on the same machine. The last line is JSON. Usage: python benchmarks/rollout.py [model] [threads]
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
from rluf.utils.paths import cache_dir

SAMPLES, GROUPS, ROUNDS = 4, 16, 3
TEXTS = (
    "Tell me about the sea and why it is salty, please, in a few words.",
    "I feel lonely tonight. What should I do? My friends are far away now.",
    "Write a short poem about a red bicycle in the rain and a child who waits.",
    "How do I sort a list of numbers in Python without using the sort function?",
)


def prompts(model: Path) -> list[Prompt]:
    """One distinct prompt of about 50 tokens for each group."""
    tokenizer = load_tokenizer(model)
    made = []
    for number in range(GROUPS):
        messages = (Message(role="user", content=f"{TEXTS[number % len(TEXTS)]} ({number})"),)
        made.append(Prompt(str(number), messages, render_prompt(tokenizer, messages), "bench", "train"))
    return made


def through_actor(settings: Settings, model: Path) -> dict[str, float]:
    """Tokens a second through a Ray actor, best and median round, with its start-up time in seconds."""
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
        began = time.perf_counter()
        actor: Any = ray.remote(RolloutActor).options(num_cpus=1).remote(0, settings.model_dump_json(), str(model))
        ray.get(actor.ready.remote())
        started = time.perf_counter() - began
        batch, speeds = prompts(model), []
        for seed in range(ROUNDS + 1):
            began = time.perf_counter()
            calls = [actor.generate.options(num_returns=2).remote(prompt, SAMPLES, seed) for prompt in batch]
            tokens = sum(sum(info.response_tokens) for info in ray.get([info for _, info in calls]))
            speeds.append(tokens / (time.perf_counter() - began))
        ray.get(actor.shutdown.remote())
    finally:
        ray.shutdown()
    return _summary(speeds[1:]) | {"start_s": round(started, 1)}


def through_bare_llm(settings: Settings, model: Path) -> dict[str, float]:
    """The same prompts through vLLM's offline LLM in this process, seeded alike, logprobs of sampled tokens too."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    rollout = settings.rollout
    began = time.perf_counter()
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens + 1,
        max_num_seqs=rollout.concurrency,
        kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30),
        distributed_executor_backend="uni",
        enable_chunked_prefill=False,
        max_num_batched_tokens=1024,
        disable_log_stats=True,
    )
    started = time.perf_counter() - began
    batch = [tokens_input(list(prompt.token_ids)) for prompt in prompts(model) for _ in range(SAMPLES)]
    speeds = []
    for seed in range(ROUNDS + 1):
        params = [
            SamplingParams(max_tokens=rollout.max_response_tokens, logprobs=0, seed=seed * len(batch) + i)
            for i in range(len(batch))
        ]
        began = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        speeds.append(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - began))
    return _summary(speeds[1:]) | {"start_s": round(started, 1)}


def _summary(speeds: list[float]) -> dict[str, float]:
    ranked = sorted(speeds)
    return {"tokens_per_s": round(ranked[len(ranked) // 2], 1), "best_tokens_per_s": round(ranked[-1], 1)}


def main() -> None:
    """Run both, the bare one in a process of its own."""
    bare = "--bare" in sys.argv
    words = [word for word in sys.argv[1:] if word != "--bare"]
    threads = int(words[1]) if len(words) > 1 else (os.cpu_count() or 1)
    settings = Settings.model_validate({"name": "bench", "cluster": {"threads": threads}})
    model = resolve_model(words[0] if words else settings.model.path, cache_dir(settings))
    if bare:
        from rluf.backends.vllm.engine import set_environment

        set_environment(settings)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        sys.stdout.write(json.dumps(through_bare_llm(settings, model)) + "\n")
        return
    ours = through_actor(settings, model)
    command = [sys.executable, __file__, str(model), str(threads), "--bare"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    result = {
        "benchmark": "rollout",
        "model": model.name,
        "threads": threads,
        "load_1m": round(os.getloadavg()[0], 1),
        "actor": ours,
        "bare_llm": theirs,
        "ratio": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
