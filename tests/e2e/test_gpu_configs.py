"""Rehearsal of the GPU configurations on the CPU: tiny random models of the same family stand in for the real ones.

Everything else is theirs but for what a CPU cannot do: shared GPUs, NCCL, tensor parallelism, and the sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from rluf.config.load import load_settings
from rluf.models.hub import load_tokenizer, resolve_model

ROOT = Path(__file__).parents[2]
ON_CPU = [
    "cluster.gpus_per_engine=0", "cluster.gpus_per_learner=0", "cluster.gpus_per_reward=0",
    "cluster.gpus_per_reward_worker=0", "cluster.threads_per_actor=1",
    "weight_sync.transport=shm", "rollout.engines=1", "rollout.kv_cache_gib=0.25", "rollout.concurrency=16",
]  # fmt: skip
SMALL = [
    "prepare.max_rows=200", "rollout.max_prompt_tokens=768", "rollout.max_response_tokens=16", "algorithm.steps=2",
    "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=2", "evaluate.prompts=6",
    "evaluate.samples_per_prompt=2", "learner.checkpoint_every_steps=1", "tracking.wandb=off",
]  # fmt: skip
OBJECTIVES = ("love", "helpfulness", "safety")
# Forward and backward of 1,000 rows of 512 tokens take half a minute of a core; what a row contains shows nothing here.
DECODERS = ["reward.workers=2", *(f"objectives.{name}.replicas=1" for name in OBJECTIVES),
            *(f"reward.{name}.max_tokens=192" for name in OBJECTIVES)]  # fmt: skip
ENCODERS = [f"reward.{name}.backbone=tiny-encoder" for name in OBJECTIVES]
REHEARSALS = {
    "qwen-0.5b-1gpu": ("Qwen2", ["learner.workers=2", "reward.workers=1", *ENCODERS]),
    "llama3-8b-8gpu": ("Llama", ["learner.workers=2", *DECODERS]),
    "llama3-70b-64gpu": ("Llama", ["learner.workers=4", *DECODERS]),
}


def write_tiny_model(folder: Path, family: str) -> Path:
    """A model of the family with random weights over bytes."""
    import torch
    import transformers

    tokenizer = load_tokenizer(resolve_model("tiny", folder.parent / "cache"))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=family == "Qwen2",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def list_overrides(name: str, model_folder: Path, base: Path) -> list[str]:
    """Settings that a rehearsal changes."""
    simulated = [f"model.path={model_folder}", f"run.root={base / 'runs'}", f"run.cache={base / 'cache'}"]
    return [*simulated, *ON_CPU, *SMALL, *REHEARSALS[name][1]]


@pytest.mark.parametrize("name", REHEARSALS)
def test_a_rehearsal_keeps_the_settings_that_a_cpu_can_follow(name: str, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{name}.yaml"
    original = load_settings(config).settings
    rehearsed = load_settings(config, list_overrides(name, tmp_path, tmp_path)).settings
    for key in ("zero_stage", "gradient_checkpointing", "learning_rate", "lora_rank"):
        assert getattr(rehearsed.learner, key) == getattr(original.learner, key)
    assert rehearsed.algorithm.max_staleness == original.algorithm.max_staleness
    assert rehearsed.algorithm.micro_batch_tokens == original.algorithm.micro_batch_tokens
    assert rehearsed.reward.love.lora_rank == original.reward.love.lora_rank


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", REHEARSALS)
def test_a_gpu_configuration_runs_end_to_end_on_the_cpu(name: str, tmp_path: Path) -> None:
    family, _ = REHEARSALS[name]
    model_folder = write_tiny_model(tmp_path / "model", family)
    arguments = ["--config", f"configs/{name}.yaml", *list_overrides(name, model_folder, tmp_path)]
    # A head with more CPUs than this machine may have, since each of up to four learners reserves half of one.
    with chaos.ray_head() as head:
        env = {**chaos.build_environment(), "RAY_ADDRESS": head.address, "RLUF_REWARD_BACKBONE": str(model_folder)}
        run_train(["--check", *arguments], env)
        run_train(arguments, env)
    run_folder = tmp_path / "runs" / name / "latest"
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if "grad_norm" in row]
    assert [row["step"] for row in steps] == [1, 2] and all(row["grad_norm"] > 0 for row in steps)
    tolerance = load_settings(ROOT / "configs" / f"{name}.yaml").settings.weight_sync.logprob_tolerance
    assert all(row["sync_logprob_gap"] < tolerance for row in steps)
    config: dict[str, Any] = json.loads((run_folder / "policy" / "config.json").read_text())
    assert config["architectures"] == [f"{family}ForCausalLM"]
    assert (run_folder / "report.html").is_file()


def run_train(arguments: list[str], env: dict[str, str]) -> None:
    """Run the command; a failure shows the end of its output."""
    command = [sys.executable, "-m", "rluf.train", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
