"""The rollout actor on real vLLM, as a Ray actor: sampling, logprobs, new weights while it runs, and no orphans.

One engine serves the whole module; the last test kills it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.rollout import RolloutActor
from rluf.backends.weight_transfer.base import ShmSender
from rluf.config.settings import Settings
from rluf.errors import DataError, StallError, SyncError
from rluf.models.hub import load_tokenizer, render_prompt, resolve_model
from rluf.types import Group, Message, Prompt
from rluf.utils.paths import cache_dir

pytestmark = pytest.mark.slow

SETTINGS = Settings.model_validate(
    {
        "name": "test",
        "cluster": {"threads": 1},
        "rollout": {
            "concurrency": 16,
            "kv_cache_gib": 0.05,
            "max_prompt_tokens": 128,
            "max_response_tokens": 48,
            "deadline_s": 6,
        },
    }
)
ROOT = Path(__file__).parents[2]


@dataclass
class Engine:
    """The actor, what it started, and transformers' copy of its model (same bf16 weights, computed in float32)."""

    actor: Any
    started: dict[str, Any]
    truth: Any
    prompts: list[Prompt]

    def call(self, method: str, *args: object) -> Any:
        return ray.get(getattr(self.actor, method).remote(*args), timeout=120)

    def groups(self, count: int, seed: int, samples: int = 4) -> list[Group]:
        calls = [self.actor.generate.options(num_returns=2).remote(p, samples, seed) for p in self.prompts[:count]]
        return ray.get([group for group, _ in calls], timeout=120)

    def true_logprobs(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = self.truth(ids).logits[0, len(prompt) - 1 : -1].float()
        picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        return [float(x) for x in picked[:, 0]]

    def publish(self, weights: dict[str, torch.Tensor], version: int) -> None:
        sender = ShmSender()
        try:
            self.call("begin_update", sender.offer(version))
            items = list(weights.items())
            for start in range(0, len(items), 5):
                self.call("update", sender.send(items[start : start + 5]))
            self.call("finish_update", version)
            sender.finish()
        finally:
            sender.close()


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor by its checkpoint name, the tied head included."""
    named = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    return named | {"lm_head.weight": model.get_output_embeddings().weight.detach().bfloat16()}


def _nudge(model: Any, seed: int) -> None:
    """Move the weights as far as a long training would, staying on bf16 values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16().float())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    folder = resolve_model("tiny", cache_dir(SETTINGS))
    tokenizer = load_tokenizer(folder)
    prompts = []
    for number, text in enumerate(("hello", "who are you?", "a red fox", "tell me more", "good night", "why")):
        messages = (Message(role="user", content=text),)
        prompts.append(Prompt(f"p{number}", messages, render_prompt(tokenizer, messages), "chat", "train"))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        actor = ray.remote(RolloutActor).options(num_cpus=1).remote(0, SETTINGS.model_dump_json(), str(folder))
        started = ray.get(actor.ready.remote(), timeout=180)
        truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        yield Engine(actor, started, truth, prompts)
    finally:
        ray.shutdown()


def test_samples_are_whole_and_their_logprobs_are_those_of_transformers(engine: Engine) -> None:
    group, info = ray.get(engine.actor.generate.options(num_returns=2).remote(engine.prompts[0], 6, 3), timeout=120)
    assert (info.prompt_id, info.topic, info.version, group.version) == ("p0", "chat", 0, 0)
    assert info.response_tokens == tuple(len(s.response_ids) for s in group.samples)
    assert len({s.response_ids for s in group.samples}) == 6
    for sample, finished in zip(group.samples, info.finished, strict=True):
        assert sample.finish_reason == ("stop" if finished else "length")
        assert (sample.response_ids[-1] == 2) == finished and 2 not in sample.response_ids[:-1]
        assert len(sample.response_ids) <= 48 and (finished or len(sample.response_ids) == 48)
        assert len(sample.rollout_logprobs) == len(sample.response_ids)
        assert sample.version_spans == ((0, 0),)
        truth = engine.true_logprobs(sample.prompt_ids, sample.response_ids)
        assert fmean(abs(a - b) for a, b in zip(truth, sample.rollout_logprobs, strict=True)) < 0.02
        measured = engine.call("logprobs", list(sample.prompt_ids), list(sample.response_ids))
        assert fmean(abs(a - b) for a, b in zip(truth, measured, strict=True)) < 0.02


def test_the_same_seed_gives_the_same_sample(engine: Engine) -> None:
    first, again, other = (engine.groups(1, seed)[0].samples for seed in (5, 5, 6))
    assert [s.response_ids for s in first] == [s.response_ids for s in again]
    assert [s.response_ids for s in first] != [s.response_ids for s in other]


def test_a_prompt_that_is_too_long_is_refused_by_name_of_the_setting(engine: Engine) -> None:
    long = Prompt("long", (), tuple([5] * 200), "chat", "train")
    with pytest.raises(DataError, match=r"200 tokens, rollout\.max_prompt_tokens is 128"):
        ray.get(engine.actor.generate.options(num_returns=2).remote(long, 1, 1)[1], timeout=60)


def test_published_weights_are_the_ones_it_samples_with(engine: Engine) -> None:
    sample = engine.groups(1, 1)[0].samples[0]
    before = engine.true_logprobs(sample.prompt_ids, sample.response_ids)
    _nudge(engine.truth, seed=1)
    after = engine.true_logprobs(sample.prompt_ids, sample.response_ids)
    assert fmean(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    engine.publish(_weights(engine.truth), version=1)
    measured = engine.call("logprobs", list(sample.prompt_ids), list(sample.response_ids))
    assert fmean(abs(a - b) for a, b in zip(after, measured, strict=True)) < 0.02
    new = engine.groups(1, 2)[0]
    assert new.version == 1 == engine.call("version")
    assert all(s.version_spans == ((0, 1),) for s in new.samples)
    truth = engine.true_logprobs(new.samples[0].prompt_ids, new.samples[0].response_ids)
    assert fmean(abs(a - b) for a, b in zip(truth, new.samples[0].rollout_logprobs, strict=True)) < 0.02


def test_samples_that_straddle_a_publish_say_so_and_lose_nothing(engine: Engine) -> None:
    old = _weights(engine.truth)
    old = {name: tensor.clone() for name, tensor in old.items()}
    _nudge(engine.truth, seed=2)
    straddling: list[Any] = []
    for attempt in range(5):
        version = 2 + attempt
        calls = [engine.actor.generate.options(num_returns=2).remote(p, 8, 100 + attempt)[0] for p in engine.prompts]
        time.sleep(0.05)
        engine.publish(_weights(engine.truth), version)
        samples = [s for group in ray.get(calls, timeout=120) for s in group.samples]
        assert len(samples) == 48 and all(s.finish_reason in ("stop", "length") for s in samples)
        straddling = [s for s in samples if len(s.version_spans) == 2]
        if straddling:
            break
    assert straddling
    for sample in straddling:
        (start, first), (turn, second) = sample.version_spans
        assert start == 0 and second == first + 1 == version and 0 < turn < len(sample.response_ids)
        truth = engine.true_logprobs(sample.prompt_ids, sample.response_ids)[turn:]
        assert fmean(abs(a - b) for a, b in zip(truth, sample.rollout_logprobs[turn:], strict=True)) < 0.02


def test_a_partial_or_wrong_update_is_refused_and_the_next_whole_one_repairs(engine: Engine) -> None:
    version = engine.call("version")
    weights = _weights(engine.truth)
    headless = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(SyncError, match=r"rollout 0 refused weights: 1 of \d+ tensors were not sent: lm_head\.weight"):
        engine.publish(headless, version + 1)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(SyncError, match=r"the learner sent model\.layers\.0\.mlp\.up_proj\.weight as \(128, 256\)"):
        engine.publish(weights | {name: weights[name].t().contiguous()}, version + 1)
    with pytest.raises(SyncError, match=r"the learner sent model\.extra\.weight, which"):
        engine.publish({"model.extra.weight": torch.zeros(3)} | weights, version + 1)
    assert engine.call("version") == version
    engine.publish(weights, version + 1)
    sample = engine.groups(1, 9)[0].samples[0]
    truth = engine.true_logprobs(sample.prompt_ids, sample.response_ids)
    assert fmean(abs(a - b) for a, b in zip(truth, sample.rollout_logprobs, strict=True)) < 0.02
    assert engine.call("health") == {"engine": "rollout 0", "version": version + 1, "running": 0, "alive": True}


def test_a_stalled_engine_is_named_and_an_unfinished_update_can_be_begun_again(engine: Engine) -> None:
    version = engine.call("version")
    sender = ShmSender()
    engine.call("begin_update", sender.offer(version + 1))
    sender.close()
    with pytest.raises(StallError, match="rollout 0 took longer than 6 s to generate a group"):
        engine.groups(1, 1)
    engine.publish(_weights(engine.truth), version + 1)
    assert engine.groups(1, 1)[0].version == version + 1


def test_the_engine_core_does_not_outlive_its_killed_actor(engine: Engine) -> None:
    cores = engine.started["core_pids"]
    assert cores and all(Path(f"/proc/{pid}").exists() for pid in cores)
    os.kill(engine.started["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in cores) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in cores)


def _runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
