"""Real learner actors over Ray, gloo and DeepSpeed, on a tiny random model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import ray
import torch

from actors.learner import LearnerActor
from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.packing import MicroBatch, plan_micro_batches
from rluf.algorithms.registry import build_learner_inputs, scale_mini_batch_weights, split_mini_batches
from rluf.backends.weight_transfer.shm import read_segment
from rluf.checkpoint.format import ControllerState, RunState, write_run_state
from rluf.config.policy import AlgorithmSettings, LearnerSettings, ModelSettings, RolloutSettings
from rluf.config.run import TimeoutSettings
from rluf.config.settings import Settings
from rluf.errors import ResourceError, RlufError
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample
from tests.actors.random_groups import make_random_groups

pytestmark = pytest.mark.usefixtures("local_ray")
REWARDED_TOKEN = 101


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


def make_settings(
    *,
    workers: int = 1,
    learning_rate: float = 1e-3,
    dtype: str = "bfloat16",
    kl_coef: float = 0.0,
    lora_rank: int = 0,
    epochs: int = 1,
) -> Settings:
    return Settings(
        model=ModelSettings(dtype=dtype),  # type: ignore[arg-type]
        learner=LearnerSettings(workers=workers, learning_rate=learning_rate, warmup_steps=0, lora_rank=lora_rank),
        timeouts=TimeoutSettings(call_s=60.0),
        algorithm=AlgorithmSettings(kl_coef=kl_coef, micro_batch_tokens=64, epochs=epochs),
        rollout=RolloutSettings(max_prompt_tokens=16, max_response_tokens=16, temperature=1.0),
    )


def make_actor_class() -> Any:
    """LearnerActor with methods for tests; defined in a function so that Ray pickles it by value."""

    class InspectableLearner(LearnerActor):
        def reset(self, *arguments: Any) -> None:
            """Make this process another learner, as a new process is: its imports take longer than most tests."""
            torch.manual_seed(0)
            self.__init__(*arguments)  # type: ignore[misc]

        def hash_weights(self) -> str:
            digest = hashlib.sha256()
            for name, parameter in self.engine.module.named_parameters():
                digest.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()

        def count_optimizer_steps(self) -> int:
            return int(self.engine.lr_scheduler.last_epoch)

        def has_reference_copy(self) -> bool:
            return self._reference_model is not None

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def sample(self, prompts: list[list[int]], length: int) -> tuple[list[list[int]], list[list[float]]]:
            """Responses and log-probabilities of the current policy to prompts of equal length."""
            tokens = torch.tensor(prompts)
            chosen_logprobs = []
            for _ in range(length):
                token_index = torch.arange(tokens.numel()).view_as(tokens)
                logits = self.engine.module(
                    input_ids=tokens.view(1, -1),
                    position_ids=torch.arange(tokens.shape[1]).repeat(len(prompts))[None],
                    logits_to_keep=token_index[:, -1],
                    use_cache=False,
                    sequence_token_index=token_index,
                    token_output_index=token_index.view(-1),
                ).logits[0]
                logprobs = logits.float().log_softmax(-1)
                next_tokens = torch.multinomial(logprobs.exp(), 1)
                chosen_logprobs.append(logprobs.gather(-1, next_tokens))
                tokens = torch.cat([tokens, next_tokens], dim=1)
            return tokens[:, len(prompts[0]) :].tolist(), torch.cat(chosen_logprobs, dim=1).tolist()

    remote_class = ray.remote(num_cpus=0.5, concurrency_groups={"health": 1})(InspectableLearner)
    return remote_class.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})


@pytest.fixture(scope="module")
def processes(local_ray: None) -> list[Any]:
    """Two learner processes, for `start_learners`."""
    actor_class = make_actor_class()
    return [actor_class.remote(rank, 1, Settings().model_dump_json(), "") for rank in range(2)]


@contextmanager
def start_learners(
    processes: Sequence[Any], settings: Settings, model_path: Path, checkpoint: Path | None = None
) -> Iterator[list[Any]]:
    """All ranks, set up in the first of these processes; shut down afterwards."""
    settings_json, world_size = settings.model_dump_json(), settings.learner.workers
    folder = None if checkpoint is None else str(checkpoint)
    ranks = list(processes[:world_size])
    for rank, process in enumerate(ranks):
        process.reset.remote(rank, world_size, settings_json, str(model_path), folder)
    try:
        host, port = ray.get(ranks[0].find_rendezvous_address.remote(), timeout=60)
        ray.get([rank.setup.remote(host, port) for rank in ranks], timeout=120)
        yield ranks
    finally:
        ray.get([rank.shutdown.remote() for rank in ranks], timeout=30)


def run_train_step(
    ranks: Sequence[Any],
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
    kl_coef: float = 0.0,
    advantages: list[list[float]] | None = None,
    mini_batch_count: int = 1,
    step: int = 1,
) -> list[dict[str, float]]:
    response_lengths = [[len(sample.response_ids) for sample in group.samples] for group in groups]
    mini_batches = split_mini_batches(len(groups), mini_batch_count)
    micro_batches: list[list[MicroBatch]] = [[] for _ in ranks]
    sizes = []
    for indices in mini_batches:
        plans = plan_micro_batches(
            [len(groups[index].prompt.token_ids) for index in indices],
            [response_lengths[index] for index in indices],
            world_size=len(ranks),
            token_budget=64,
        )
        sizes.append(len(plans[0]))
        for rank_plan, plan in zip(micro_batches, plans, strict=True):
            rank_plan += [[(indices[group], sample) for group, sample in micro_batch] for micro_batch in plan]
    group_refs = [ray.put(group) for group in groups]
    advantage_inputs = AdvantageInputs(rewards, response_lengths=response_lengths)
    learner_inputs = build_learner_inputs(
        AlgorithmSettings(), advantage_inputs, max_response_tokens=16, kl_coef=kl_coef
    )
    if advantages is not None:
        learner_inputs = dataclasses.replace(learner_inputs, advantages=advantages)
    learner_inputs = scale_mini_batch_weights(learner_inputs, response_lengths, mini_batches)
    calls = [
        rank.train_step.remote(group_refs, learner_inputs, micro_batches[index], step, mini_batch_sizes=sizes)
        for index, rank in enumerate(ranks)
    ]
    metrics: list[dict[str, float]] = ray.get(calls, timeout=120)
    return metrics


REWARDS = [[0.1, 0.9, 0.4, 0.2], [1.0, 0.0, 0.5, 0.5], [0.0] * 4, [3.0, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 1.0]]


def test_two_ranks_learn_identically_and_like_one_rank_then_sync_and_save(
    processes: list[Any], model_path: Path, tmp_path: Path
) -> None:
    groups, probe = make_random_groups(1), ([5, 6, 7], [[8, 9, 10]])
    with start_learners(processes, make_settings(dtype="float32"), model_path) as (single,):
        single_metrics = run_train_step([single], groups, REWARDS)[0]
        expected = ray.get(single.probe_logprobs.remote(*probe))[0]
    with start_learners(processes, make_settings(workers=2, dtype="float32"), model_path) as ranks:
        before = ray.get([rank.hash_weights.remote() for rank in ranks])
        first, second = run_train_step(ranks, groups, REWARDS)
        after = ray.get([rank.hash_weights.remote() for rank in ranks])
        assert before[0] == before[1] and after[0] == after[1] and before[0] != after[0]
        assert {key: value for key, value in first.items() if not key.endswith("_s")} == {
            key: value for key, value in second.items() if not key.endswith("_s")
        }
        for name in ("loss", "grad_norm", "entropy", "ratio_mean", "effective_sample_size"):
            assert first[name] == pytest.approx(single_metrics[name], rel=1e-4), name
        logprobs = [rows[0] for rows in ray.get([rank.probe_logprobs.remote(*probe) for rank in ranks])]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-6)
        assert logprobs[0] == pytest.approx(expected, abs=1e-3)
        policy_path = tmp_path / "policy"
        ray.get([rank.save_policy.remote(str(policy_path)) for rank in ranks])
        check_saved_policy(policy_path, model_path, probe, logprobs[0])
        check_synced_weights(ranks, policy_path)


def test_mini_batches_and_epochs_are_as_many_updates_on_any_number_of_ranks(
    processes: list[Any], model_path: Path
) -> None:
    groups, probe = make_random_groups(1), ([5, 6, 7], [[8, 9, 10]])
    logprobs_by_ranks = {}
    for workers in (1, 2):
        with start_learners(processes, make_settings(workers=workers, dtype="float32", epochs=2), model_path) as ranks:
            metrics = run_train_step(ranks, groups, REWARDS, mini_batch_count=3)
            assert "kl" not in metrics[0], "kl_coef 0 needs no reference policy"
            assert metrics[0]["loss"] == pytest.approx(metrics[-1]["loss"])
            logprobs_by_ranks[workers] = ray.get(ranks[0].probe_logprobs.remote(*probe))[0]
            if workers == 1:
                optimizer_steps = ray.get(ranks[0].count_optimizer_steps.remote())
    assert optimizer_steps == 6
    assert logprobs_by_ranks[1] == pytest.approx(logprobs_by_ranks[2], abs=2e-3)


def test_with_lora_the_policy_without_its_adapters_is_the_reference(processes: list[Any], model_path: Path) -> None:
    settings, groups = (
        make_settings(learning_rate=0.05, kl_coef=0.02, lora_rank=4, dtype="float32"),
        make_random_groups(1),
    )
    with start_learners(processes, settings, model_path) as (actor,):
        metrics = [run_train_step([actor], groups, REWARDS, 0.02)[0] for _ in range(2)]
        assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-9) and metrics[1]["kl"] > 1e-4
        assert not ray.get(actor.has_reference_copy.remote())


@pytest.mark.slow
def test_resumed_averages_references_and_schedules_repeat_every_bit(
    processes: list[Any], model_path: Path, tmp_path: Path
) -> None:
    """Four steps equal two and two, with all that a step changes: mini-batches, decay, average, refreshed reference."""
    settings = make_settings(dtype="float32", kl_coef=0.02, epochs=2).model_dump()
    settings["learner"] |= {"ema_decay": 0.9, "learning_rate_decay": "linear"}
    settings["algorithm"] |= {"steps": 4, "mini_batches": 2, "reference_refresh_steps": 2}
    settings, groups = Settings.model_validate(settings), make_random_groups(1)
    probe, checkpoint = ([5, 6, 7], [[8, 9, 10]]), tmp_path / "step-2"

    def run_steps(rank: Any, count: int) -> list[tuple[float, float]]:
        rows = [run_train_step([rank], groups, REWARDS, 0.02, mini_batch_count=2, step=s)[0] for s in steps[:count]]
        del steps[:count]
        return [(row["loss"], row["kl"]) for row in rows]

    steps = [1, 2, 3, 4]
    with start_learners(processes, settings, model_path) as (rank,):
        expected = run_steps(rank, 4)
        ray.get(rank.apply_policy_average.remote())
        expected_logprobs = ray.get(rank.probe_logprobs.remote(*probe))
    assert expected[2][1] < expected[1][1], "the KL starts from 0 at the refreshed reference"
    steps = [1, 2, 3, 4]
    with start_learners(processes, settings, model_path) as (rank,):
        rows = run_steps(rank, 2)
        checkpoint.mkdir()
        ray.get(rank.save_policy.remote(str(checkpoint / "policy")))
        schedule = ray.get(rank.save_optimizer_state.remote(str(checkpoint)))
        write_run_state(checkpoint, RunState(2, 1, {}, "", ControllerState({}, {}, {}, {}), [schedule]))
    # A new process, as a resumed run has, with nothing of the first half in its memory.
    new_process = make_actor_class().remote(0, 1, settings.model_dump_json(), str(model_path))
    with start_learners([new_process], settings, model_path, checkpoint) as (rank,):
        rows += run_steps(rank, 2)
        ray.get(rank.apply_policy_average.remote())
        assert (rows, ray.get(rank.probe_logprobs.remote(*probe))) == (expected, expected_logprobs)


def check_saved_policy(
    policy_path: Path, base_path: Path, probe: tuple[list[int], list[list[int]]], expected: list[float]
) -> None:
    """Plain transformers loads the folder, tokenizer and template included, and computes the learner's values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [path.name for path in policy_path.parent.iterdir()] == [policy_path.name]
    model = AutoModelForCausalLM.from_pretrained(policy_path)
    prompt, (response,) = probe
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    conversation = [{"role": "user", "content": "hi"}]
    tokenizer, base_tokenizer = (AutoTokenizer.from_pretrained(path) for path in (policy_path, base_path))
    assert tokenizer.apply_chat_template(conversation) == base_tokenizer.apply_chat_template(conversation)


def check_synced_weights(ranks: Sequence[Any], policy_path: Path) -> None:
    """Another process reads the saved weights from shared memory, the tied head included."""
    from transformers import AutoModelForCausalLM

    transfer_info = ray.get([rank.begin_weight_sync.remote(3, {"rollout 0": 0}) for rank in ranks])
    assert transfer_info[0]["weight_version"] == 3
    received: dict[str, torch.Tensor] = {}
    while (buckets := ray.get([rank.send_next_weight_bucket.remote() for rank in ranks]))[0] is not None:
        received.update(read_segment(**buckets[0]))
    ray.get([rank.end_weight_sync.remote() for rank in ranks])
    expected = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in expected.items())


def test_learning_rate_zero_keeps_weights_and_non_finite_gradients_stop_the_run(
    processes: list[Any], model_path: Path
) -> None:
    """The error names the prompt that caused it, and no others."""
    settings = make_settings(learning_rate=0.0, kl_coef=0.02)
    with start_learners(processes, settings, model_path) as (actor,):
        before = ray.get(actor.hash_weights.remote())
        metrics = run_train_step([actor], make_random_groups(2), REWARDS)[0]
        assert metrics["skipped"] == 0.0 and metrics["grad_norm"] > 0.0
        assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
        infinite_advantages = [[0.1] * 4, [math.inf] * 4, *[[0.1] * 4] * 3]
        groups = make_random_groups(3)
        for count in (1.0, 2.0):
            metrics = run_train_step([actor], groups, REWARDS, advantages=infinite_advantages)[0]
            assert metrics["skipped"] == count
        with pytest.raises(RlufError, match=r"gradient of prompt 1 was not finite in 3 steps in a row"):
            run_train_step([actor], groups, REWARDS, advantages=infinite_advantages)
        assert ray.get(actor.hash_weights.remote()) == before
        assert ray.get(actor.get_health.remote())["skipped"] == 3.0


def test_missing_rank_is_named(processes: list[Any], model_path: Path) -> None:
    settings = make_settings(workers=2).model_copy(update={"timeouts": TimeoutSettings(call_s=2.0, actor_start_s=2.0)})
    with (
        pytest.raises(ResourceError, match="rank 0 of 2"),
        start_learners(processes[:1], settings, model_path),
    ):
        pass


def test_policy_learns_to_produce_a_token(processes: list[Any], model_path: Path) -> None:
    """Reward: how often byte REWARDED_TOKEN occurs in 8 tokens; by chance 1 in 260."""
    prompts = [[1, 60 + index, 70, 2] for index in range(4)]
    repeated_prompts = [prompt for prompt in prompts for _ in range(8)]
    token_shares = []
    with start_learners(processes, make_settings(learning_rate=3e-3, kl_coef=0.001), model_path) as (actor,):
        for _ in range(12):
            responses, logprobs = ray.get(actor.sample.remote(repeated_prompts, 8))
            rewards = [float(response.count(REWARDED_TOKEN)) for response in responses]
            groups = []
            for start in range(0, len(repeated_prompts), 8):
                prompt_ids = tuple(repeated_prompts[start])
                samples = tuple(
                    Sample("", prompt_ids, tuple(responses[i]), tuple(logprobs[i]), ((0, 0),), "length", "")
                    for i in range(start, start + 8)
                )
                groups.append(Group(Prompt("", (), prompt_ids, "", "train"), samples, 0))
            rewards_by_group = [rewards[i : i + 8] for i in range(0, len(rewards), 8)]
            metrics = run_train_step([actor], groups, rewards_by_group, 0.001)[0]
            assert metrics["ratio_max"] == pytest.approx(1.0, abs=0.2)
            token_shares.append(fmean(rewards) / 8)
    assert fmean(token_shares[:2]) < 0.1 and fmean(token_shares[-3:]) > 0.6, token_shares
