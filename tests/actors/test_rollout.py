"""The rollout actor on real vLLM, as a Ray actor: sampling, log-probabilities, weight updates, no orphan processes.

One engine serves the whole module; the last test kills it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.rollout import RolloutActor
from rluf.backends.weight_transfer.shm import ShmSender
from rluf.config.settings import Settings
from rluf.errors import DataError, DeadlineError, WeightSyncError
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.types import Group, Message, Prompt
from rluf.utils.paths import resolve_cache_folder

pytestmark = pytest.mark.slow

SETTINGS = Settings.model_validate(
    {
        "name": "test",
        "cluster": {"threads_per_actor": 1},
        "rollout": {
            "concurrency": 16,
            "kv_cache_gib": 0.05,
            "max_prompt_tokens": 128,
            "max_response_tokens": 48,
            "temperature": 1.0,
        },
        "timeouts": {"call_s": 6},
    }
)


@dataclass
class RunningEngine:
    """The actor, its start report, and transformers' copy of its model (same bf16 weights, computed in float32)."""

    actor: Any
    start_report: dict[str, Any]
    reference_model: Any
    prompts: list[Prompt]

    def call(self, method: str, *args: object) -> Any:
        return ray.get(getattr(self.actor, method).remote(*args), timeout=120)

    def start_group(self, prompt: Prompt, sample_count: int, seed: int) -> Any:
        """References to a group and its small numbers."""
        return self.actor.generate_group.options(num_returns=2).remote(prompt, sample_count, seed)

    def sample_groups(self, prompt_count: int, seed: int, sample_count: int = 4) -> list[Group]:
        calls = [self.start_group(prompt, sample_count, seed) for prompt in self.prompts[:prompt_count]]
        return ray.get([group_ref for group_ref, _ in calls], timeout=120)

    def reference_logprobs(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> list[float]:
        input_ids = torch.tensor([[*prompt_ids, *response_ids]])
        with torch.no_grad():
            logits = self.reference_model(input_ids).logits[0, len(prompt_ids) - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response_ids)[:, None])
        return [float(logprob) for logprob in logprobs[:, 0]]

    def sync_weights(self, weights: dict[str, torch.Tensor], version: int) -> None:
        sender = ShmSender()
        try:
            self.call("begin_weight_update", sender.begin(version))
            named_tensors = list(weights.items())
            for start in range(0, len(named_tensors), 5):
                self.call("load_weight_bucket", sender.send_bucket(named_tensors[start : start + 5]))
            self.call("finish_weight_update", version)
            sender.end()
        finally:
            sender.close()


def mean_gap(first: Sequence[float], second: Sequence[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(first, second, strict=True))


def get_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor by its checkpoint name, the tied head included."""
    tensors = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    return tensors | {"lm_head.weight": model.get_output_embeddings().weight.detach().bfloat16()}


def perturb_weights(model: Any, seed: int) -> None:
    """Move the weights as far as a long training would, rounded to bf16."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16().float())


@pytest.fixture(scope="module")
def engine(local_ray: None) -> Iterator[RunningEngine]:
    model_path = resolve_model("tiny", resolve_cache_folder(SETTINGS))
    tokenizer = load_tokenizer(model_path)
    prompts = []
    for index, text in enumerate(("hello", "who are you?", "a red fox", "tell me more", "good night", "why")):
        messages = (Message(role="user", content=text),)
        prompts.append(Prompt(f"p{index}", messages, render_prompt(tokenizer, messages), "chat", "train"))
    actor = ray.remote(RolloutActor).options(num_cpus=1).remote(0, SETTINGS.model_dump_json(), str(model_path))
    start_report = ray.get(actor.start.remote(), timeout=180)
    reference_model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    yield RunningEngine(actor, start_report, reference_model, prompts)


def test_samples_are_complete_and_their_logprobs_are_those_of_transformers(engine: RunningEngine) -> None:
    group, info = ray.get(engine.start_group(engine.prompts[0], 6, 3), timeout=120)
    assert (info.prompt_id, info.topic, info.weight_version, group.weight_version) == ("p0", "chat", 0, 0)
    assert info.response_token_counts == tuple(len(sample.response_ids) for sample in group.samples)
    assert len({sample.response_ids for sample in group.samples}) == 6
    for sample, finished in zip(group.samples, info.finished, strict=True):
        assert sample.finish_reason == ("stop" if finished else "length")
        assert (sample.response_ids[-1] == 2) == finished and 2 not in sample.response_ids[:-1]
        assert len(sample.response_ids) <= 48 and (finished or len(sample.response_ids) == 48)
        assert len(sample.rollout_logprobs) == len(sample.response_ids)
        assert sample.version_spans == ((0, 0),)
        expected = engine.reference_logprobs(sample.prompt_ids, sample.response_ids)
        assert mean_gap(expected, sample.rollout_logprobs) < 0.02
        measured = engine.call("probe_logprobs", list(sample.prompt_ids), list(sample.response_ids))
        assert mean_gap(expected, measured) < 0.02


def test_the_same_seed_gives_the_same_samples(engine: RunningEngine) -> None:
    first, second, other = (
        [sample.response_ids for sample in engine.sample_groups(1, seed)[0].samples] for seed in (5, 5, 6)
    )
    assert first == second
    assert first != other


def test_a_prompt_that_is_too_long_is_refused_with_the_name_of_the_setting(engine: RunningEngine) -> None:
    long_prompt = Prompt("long", (), tuple([5] * 200), "chat", "train")
    with pytest.raises(DataError, match=r"200 tokens, rollout\.max_prompt_tokens is 128"):
        ray.get(engine.start_group(long_prompt, 1, 1)[1], timeout=60)


def test_the_engine_samples_with_synced_weights(engine: RunningEngine) -> None:
    sample = engine.sample_groups(1, 1)[0].samples[0]
    before = engine.reference_logprobs(sample.prompt_ids, sample.response_ids)
    perturb_weights(engine.reference_model, seed=1)
    after = engine.reference_logprobs(sample.prompt_ids, sample.response_ids)
    assert mean_gap(before, after) > 0.1
    engine.sync_weights(get_weights(engine.reference_model), version=1)
    measured = engine.call("probe_logprobs", list(sample.prompt_ids), list(sample.response_ids))
    assert mean_gap(after, measured) < 0.02
    group = engine.sample_groups(1, 2)[0]
    assert group.weight_version == 1 == engine.call("get_weight_version")
    assert all(sample.version_spans == ((0, 1),) for sample in group.samples)
    sample = group.samples[0]
    assert mean_gap(engine.reference_logprobs(sample.prompt_ids, sample.response_ids), sample.rollout_logprobs) < 0.02


def test_samples_generated_during_a_sync_have_two_version_spans_and_lose_nothing(engine: RunningEngine) -> None:
    perturb_weights(engine.reference_model, seed=2)
    spanning_samples: list[Any] = []
    for attempt in range(5):
        version = 2 + attempt
        group_refs = [engine.start_group(prompt, 8, 100 + attempt)[0] for prompt in engine.prompts]
        time.sleep(0.05)
        engine.sync_weights(get_weights(engine.reference_model), version)
        samples = [sample for group in ray.get(group_refs, timeout=120) for sample in group.samples]
        assert len(samples) == 48 and all(sample.finish_reason in ("stop", "length") for sample in samples)
        spanning_samples = [sample for sample in samples if len(sample.version_spans) == 2]
        if spanning_samples:
            break
    assert spanning_samples
    for sample in spanning_samples:
        (first_token, first_version), (next_token, next_version) = sample.version_spans
        assert first_token == 0 and next_version == first_version + 1 == version
        assert 0 < next_token < len(sample.response_ids)
        expected = engine.reference_logprobs(sample.prompt_ids, sample.response_ids)
        assert mean_gap(expected[next_token:], sample.rollout_logprobs[next_token:]) < 0.02


def test_a_partial_or_wrong_update_is_refused_and_the_next_complete_one_repairs(engine: RunningEngine) -> None:
    version = engine.call("get_weight_version")
    weights = get_weights(engine.reference_model)
    without_head = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(
        WeightSyncError, match=r"rollout 0 refused weights: 1 of \d+ tensors were not sent: lm_head\.weight"
    ):
        engine.sync_weights(without_head, version + 1)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(
        WeightSyncError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: the engine expected shape .*, got \(128, 256\)"
    ):
        engine.sync_weights(weights | {name: weights[name].t().contiguous()}, version + 1)
    with pytest.raises(WeightSyncError, match=r"the learner sent model\.extra\.weight, which"):
        engine.sync_weights({"model.extra.weight": torch.zeros(3)} | weights, version + 1)
    assert engine.call("get_weight_version") == version
    engine.sync_weights(weights, version + 1)
    sample = engine.sample_groups(1, 9)[0].samples[0]
    assert mean_gap(engine.reference_logprobs(sample.prompt_ids, sample.response_ids), sample.rollout_logprobs) < 0.02
    assert engine.call("get_health") == {"engine": "rollout 0", "version": version + 1, "running": 0, "alive": True}


def test_a_stalled_engine_is_named_and_an_unfinished_update_can_be_begun_again(engine: RunningEngine) -> None:
    version = engine.call("get_weight_version")
    sender = ShmSender()
    engine.call("begin_weight_update", sender.begin(version + 1))
    sender.close()
    with pytest.raises(DeadlineError, match="rollout 0 took longer than 6 s to generate a group"):
        engine.sample_groups(1, 1)
    engine.sync_weights(get_weights(engine.reference_model), version + 1)
    assert engine.sample_groups(1, 1)[0].weight_version == version + 1


def test_the_engine_core_is_a_fork_without_the_sockets_of_its_actor(engine: RunningEngine) -> None:
    actor_pid, (core_pid,) = engine.start_report["pid"], engine.start_report["core_pids"]
    # A new program has other addresses in its auxiliary vector; the command line is no sign, as vLLM changes it.
    core_vector, actor_vector = (Path(f"/proc/{pid}/auxv").read_bytes() for pid in (core_pid, actor_pid))
    assert core_vector == actor_vector
    actor_sockets = list_sockets(actor_pid)
    assert actor_sockets and not actor_sockets & list_sockets(core_pid)


def list_sockets(pid: int) -> set[str]:
    links = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith("socket:")}


def test_the_engine_core_does_not_outlive_its_killed_actor(engine: RunningEngine) -> None:
    core_pids = engine.start_report["core_pids"]
    assert core_pids and all(Path(f"/proc/{pid}").exists() for pid in core_pids)
    os.kill(engine.start_report["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in core_pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in core_pids)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
