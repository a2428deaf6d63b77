"""Real learner actors over Ray, gloo and DeepSpeed, on a tiny random model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import ray
import torch

from actors.learner import LearnerActor
from rluf.algorithms.advantages import Outcomes
from rluf.algorithms.packing import plan_micro_batches
from rluf.algorithms.registry import make_lesson
from rluf.backends.weight_transfer.base import read_segment
from rluf.config.policy import AlgorithmSettings, LearnerSettings, ModelSettings, RolloutSettings
from rluf.config.run import RunSettings
from rluf.config.settings import Settings
from rluf.errors import ResourceError, RlufError
from rluf.models.hub import resolve_model
from rluf.train import replay
from rluf.types import Group, Prompt, Sample

pytestmark = pytest.mark.usefixtures("local_ray")
WANTED = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


def settings_of(*, ranks: int = 1, rate: float = 1e-3, dtype: str = "bfloat16", kl_coef: float = 0.0) -> Settings:
    return Settings(
        model=ModelSettings(dtype=dtype),  # type: ignore[arg-type]
        learner=LearnerSettings(ranks=ranks, learning_rate=rate, warmup_steps=0, deadline_s=60.0),
        algorithm=AlgorithmSettings(kl_coef=kl_coef, micro_batch_tokens=64),
        rollout=RolloutSettings(max_prompt_tokens=16, max_response_tokens=16),
    )


def actor_class() -> Any:
    """LearnerActor with two windows for tests; made here so that Ray ships it by value."""

    class Watched(LearnerActor):
        def digest(self) -> str:
            held = hashlib.sha256()
            for name, parameter in self.engine.module.named_parameters():
                held.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
            return held.hexdigest()

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def sample(self, prompts: list[list[int]], length: int) -> tuple[list[list[int]], list[list[float]]]:
            """Responses and logprobs of the current policy to prompts of one length."""
            tokens = torch.tensor(prompts)
            found = []
            for _ in range(length):
                rows = torch.arange(tokens.numel()).view_as(tokens)
                logits = self.engine.module(
                    input_ids=tokens.view(1, -1),
                    position_ids=torch.arange(tokens.shape[1]).repeat(len(prompts))[None],
                    logits_to_keep=rows[:, -1],
                    use_cache=False,
                    rows=rows,
                    places=rows.view(-1),
                ).logits[0]
                logprobs = logits.float().log_softmax(-1)
                chosen = torch.multinomial(logprobs.exp(), 1)
                found.append(logprobs.gather(-1, chosen))
                tokens = torch.cat([tokens, chosen], dim=1)
            return tokens[:, len(prompts[0]) :].tolist(), torch.cat(found, dim=1).tolist()

    return ray.remote(num_cpus=0.5, concurrency_groups={"health": 1})(Watched)


@contextmanager
def learners(settings: Settings, folder: Path) -> Iterator[list[Any]]:
    """All ranks, set up; ended afterwards."""
    blob, world = settings.model_dump_json(), settings.learner.ranks
    threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    remote = actor_class().options(runtime_env=threads)
    ranks = [remote.remote(rank, world, blob, str(folder)) for rank in range(world)]
    try:
        host, port = ray.get(ranks[0].address.remote(), timeout=60)
        ray.get([rank.setup.remote(host, port) for rank in ranks], timeout=120)
        yield ranks
        ray.get([rank.shutdown.remote() for rank in ranks], timeout=30)
    finally:
        for rank in ranks:
            ray.kill(rank)


def random_groups(seed: int, logprob: float = -5.5) -> list[Group]:
    draw = random.Random(seed)
    groups = []
    for index in range(5):
        ids = tuple(draw.randrange(3, 250) for _ in range(draw.randrange(4, 12)))
        lengths = [draw.randrange(1, 12) for _ in range(4)]
        samples = tuple(
            Sample(
                str(index), ids, tuple(draw.randrange(3, 250) for _ in range(n)), (logprob,) * n, ((0, 0),), "stop", ""
            )
            for n in lengths
        )
        groups.append(Group(Prompt(str(index), (), ids, "", "train"), samples, 0))
    return groups


def learn(
    ranks: Sequence[Any],
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
    kl_coef: float = 0.0,
    advantages: list[list[float]] | None = None,
) -> list[dict[str, float]]:
    plan = plan_micro_batches(
        [len(g.prompt.token_ids) for g in groups],
        [[len(s.response_ids) for s in g.samples] for g in groups],
        ranks=len(ranks),
        token_budget=64,
    )
    refs = [ray.put(group) for group in groups]
    outcomes = Outcomes(rewards, lengths=[[len(s.response_ids) for s in g.samples] for g in groups])
    lesson = make_lesson(AlgorithmSettings(), outcomes, longest=16, kl_coef=kl_coef)
    lesson = lesson if advantages is None else dataclasses.replace(lesson, advantages=advantages)
    calls = [rank.step.remote(refs, lesson, plan[index], 1) for index, rank in enumerate(ranks)]
    found: list[dict[str, float]] = ray.get(calls, timeout=120)
    return found


REWARDS = [[0.1, 0.9, 0.4, 0.2], [1.0, 0.0, 0.5, 0.5], [0.0] * 4, [3.0, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 1.0]]


def test_two_ranks_learn_alike_and_as_one_rank_does_then_publish_and_save(folder: Path, tmp_path: Path) -> None:
    groups, probe = random_groups(1), ([5, 6, 7], [[8, 9, 10]])
    with learners(settings_of(dtype="float32"), folder) as (alone,):
        lone = learn([alone], groups, REWARDS)[0]
        expected = ray.get(alone.logprobs.remote(*probe))[0]
    with learners(settings_of(ranks=2, dtype="float32"), folder) as ranks:
        before = ray.get([rank.digest.remote() for rank in ranks])
        first, second = learn(ranks, groups, REWARDS)
        after = ray.get([rank.digest.remote() for rank in ranks])
        assert before[0] == before[1] and after[0] == after[1] and before[0] != after[0]
        timings = {name for name in first if name.endswith("_s")}
        assert {k: v for k, v in first.items() if k not in timings} == {
            k: v for k, v in second.items() if k not in timings
        }
        for name in ("loss", "grad_norm", "entropy", "ratio_mean", "effective_sample_size"):
            assert first[name] == pytest.approx(lone[name], rel=1e-4), name
        found = [rows[0] for rows in ray.get([rank.logprobs.remote(*probe) for rank in ranks])]
        assert found[0] == pytest.approx(found[1], abs=1e-6)
        assert found[0] == pytest.approx(expected, abs=1e-3)
        target = tmp_path / "policy"
        ray.get([rank.save.remote(str(target)) for rank in ranks])
        check_saved(target, folder, probe, found[0])
        check_published(ranks, target)


def check_saved(target: Path, base: Path, probe: tuple[list[int], list[list[int]]], expected: list[float]) -> None:
    """Plain transformers reads the folder, tokenizer and template too, and computes the learner's logprobs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [p.name for p in target.parent.iterdir()] == [target.name]
    model = AutoModelForCausalLM.from_pretrained(target)
    prompt, (response,) = probe
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    found = logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    chat = [{"role": "user", "content": "hi"}]
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (target, base))
    assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)


def check_published(ranks: Sequence[Any], saved: Path) -> None:
    """Another process reads from shared memory the weights that were saved, the tied head among them."""
    from transformers import AutoModelForCausalLM

    offers = ray.get([rank.begin_publish.remote({"engine": "shm", "version": 3}) for rank in ranks])
    assert offers[0]["version"] == 3
    received: dict[str, torch.Tensor] = {}
    while (buckets := ray.get([rank.next_bucket.remote() for rank in ranks]))[0] is not None:
        received.update(read_segment(**buckets[0]))
    ray.get([rank.end_publish.remote() for rank in ranks])
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in expected.items())


def test_learning_rate_zero_keeps_weights_and_bad_gradients_stop_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it stopped at is kept, and doing it again names the micro-batches that are to blame, and no others."""
    settings = settings_of(rate=0.0).model_copy(update={"name": "bad", "run": RunSettings(cache=str(tmp_path))})
    with learners(settings, folder) as (actor,):
        before = ray.get(actor.digest.remote())
        found = learn([actor], random_groups(2), REWARDS)[0]
        assert found["skipped"] == 0.0 and found["grad_norm"] > 0.0 and found["kl"] == pytest.approx(0.0, abs=1e-6)
        broken = [[0.1] * 4, [math.inf] * 4, *[[0.1] * 4] * 3]
        for count in (1.0, 2.0):
            assert learn([actor], random_groups(3), REWARDS, advantages=broken)[0]["skipped"] == count
        with pytest.raises(RlufError, match="3 steps in a row"):
            learn([actor], random_groups(3), REWARDS, advantages=broken)
        assert ray.get(actor.digest.remote()) == before
        assert ray.get(actor.health.remote())["skipped"] == 3.0
    assert replay.main([str(tmp_path / "dumps" / "bad-step-1")]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(findings) > 2 and any(not finding["not_finite"] for finding in findings)
    assert all(bool(finding["not_finite"]) == ("1" in finding["prompts"]) for finding in findings)
    assert all(f["not_finite"][:2] == ["advantages", "loss"] for f in findings if f["not_finite"])
    assert replay.main([str(tmp_path)]) != 0 and "holds no step" in capsys.readouterr().err


def test_missing_rank_is_named(folder: Path) -> None:
    settings = settings_of(ranks=2).model_copy(update={"learner": LearnerSettings(ranks=2, deadline_s=2.0)})
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"start_deadline_s": 2.0})})
    actor = actor_class().remote(0, 2, settings.model_dump_json(), str(folder))
    host, port = ray.get(actor.address.remote(), timeout=60)
    with pytest.raises(ResourceError, match="rank 0 of 2"):
        ray.get(actor.setup.remote(host, port), timeout=60)
    ray.kill(actor)


def test_policy_learns_to_say_a_token(folder: Path) -> None:
    """Reward: how often byte WANTED occurs in 8 tokens; by chance 1 in 260."""
    prompts = [[1, 60 + index, 70, 2] for index in range(4)]
    copies = [prompt for prompt in prompts for _ in range(8)]
    shares = []
    with learners(settings_of(rate=3e-3, kl_coef=0.001), folder) as (actor,):
        for _ in range(12):
            responses, logprobs = ray.get(actor.sample.remote(copies, 8))
            rewards = [float(response.count(WANTED)) for response in responses]
            groups = []
            for start in range(0, len(copies), 8):
                ids = tuple(copies[start])
                samples = tuple(
                    Sample("", ids, tuple(responses[i]), tuple(logprobs[i]), ((0, 0),), "length", "")
                    for i in range(start, start + 8)
                )
                groups.append(Group(Prompt("", (), ids, "", "train"), samples, 0))
            found = learn([actor], groups, [rewards[i : i + 8] for i in range(0, len(rewards), 8)], 0.001)[0]
            assert found["ratio_max"] == pytest.approx(1.0, abs=0.2)
            shares.append(fmean(rewards) / 8)
    assert fmean(shares[:2]) < 0.1 and fmean(shares[-3:]) > 0.6, shares
