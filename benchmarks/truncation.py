"""Share of the policy's responses that a token limit cuts, on the test prompts of the sample log.

Samples one response of up to --tokens tokens to each of --prompts test prompts with vLLM and the settings of a run, so
that the effect of a temperature, of model.examples or of a limit is seen before a run. The last line is JSON.
Usage: python benchmarks/truncation.py [--prompts N] [--tokens N] [--show N] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys

import numpy as np

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, render_prompt, resolve_policy
from rluf.simulate.prompts import load_prompts

LIMITS = (32, 48, 64, 96, 128)


def measure_truncation(settings: Settings, prompt_count: int, token_count: int, shown_count: int) -> dict[str, object]:
    """Share of responses cut at each limit, and quantiles of the length in tokens."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    model = resolve_policy(settings)
    tokenizer = load_tokenizer(model)
    prompts = [prompt for prompt in load_prompts() if prompt.split == "test"]
    random.Random(settings.seed).shuffle(prompts)
    prompts = prompts[:prompt_count]
    llm = LLM(
        model=str(model), dtype=settings.policy_dtype, enforce_eager=True, distributed_executor_backend="uni",
        max_model_len=settings.rollout.max_prompt_tokens + token_count + 1, max_num_seqs=settings.rollout.concurrency,
        kv_cache_memory_bytes=2**30, enable_chunked_prefill=False, max_num_batched_tokens=1024, disable_log_stats=True,
    )  # fmt: skip
    outputs = llm.generate(
        [tokens_input(list(render_prompt(tokenizer, prompt.messages))) for prompt in prompts],
        [
            SamplingParams(max_tokens=token_count, temperature=settings.rollout.temperature, seed=index)
            for index in range(len(prompts))
        ],
        use_tqdm=False,
    )
    for prompt, output in list(zip(prompts, outputs, strict=True))[:shown_count]:
        sys.stderr.write(f"{prompt.messages[-1]['content']} -> {output.outputs[0].text!r}\n")
    lengths = np.array([len(output.outputs[0].token_ids) for output in outputs])
    is_finished = np.array([output.outputs[0].finish_reason == "stop" for output in outputs])
    return {
        "benchmark": "truncation",
        "prompts": len(prompts),
        "temperature": settings.rollout.temperature,
        "cut": {
            str(limit): round(float(((lengths > limit) | ((lengths == limit) & ~is_finished)).mean()), 3)
            for limit in LIMITS
            if limit <= token_count
        },
        "mean_tokens": round(float(lengths.mean()), 1),
        "p50_p80_p95_tokens": [float(value) for value in np.quantile(lengths, (0.5, 0.8, 0.95))],
    }


def main() -> None:
    """Read the arguments, sample, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=109)
    parser.add_argument("--tokens", type=int, default=128, help="longest response")
    parser.add_argument("--show", type=int, default=0, help="responses to write to stderr")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    from rluf.backends.vllm.engine import set_vllm_environment

    settings = load_settings(None, options.overrides).settings
    set_vllm_environment(settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    result = measure_truncation(settings, options.prompts, options.tokens, options.show)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
