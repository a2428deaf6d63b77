"""Training loop with a plain torch engine: step plans, frozen layers, selection of the best epoch, resuming."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import DataError, DeadlineError, RlufError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import FrozenPrefix, build_text_encoder, freeze_lowest_layers, load_classifier
from rluf.reward.encoded_split import EncodedSplit, encode_split
from rluf.reward.text import TextEncoder
from rluf.reward.trainer import (
    FitResult,
    HeadTask,
    RewardModelTrainer,
    TrainPlan,
    TrainProgress,
    compute_dev_log_loss,
    gather_objects,
    plan_epoch_steps,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


NO_CALLBACKS: dict[str, Any] = {"on_best": lambda: None, "on_epoch": lambda *_: None}


class TorchEngine:
    """Training engine of plain AdamW."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        self.model = model
        trainable_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable_parameters, lr=learning_rate)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()


def build_records(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    records = []
    for number in range(count):
        label = rng.randrange(2)
        response = rng.choice(("!!!! wow love", "love !!!") if label else ("no. cold.", "stone. no"))
        records.append(
            {
                "id": f"{seed}-{number}",
                "messages": [{"role": "user", "content": "hi"}],
                "response": response,
                "label": label,
                "weight": 1.0,
                "user_id": f"u{number % 50}",
            }
        )
    return records


def build_split(encoder: TextEncoder, count: int, seed: int) -> EncodedSplit:
    return encode_split(build_records(count, seed), encoder, is_pairwise=False, source_name="here")


@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_plan_reads_every_row_in_the_given_number_of_steps(
    lengths: list[int], batch_rows: int, extra_steps: int, epoch: int
) -> None:
    step_count = -(-len(lengths) // batch_rows) + extra_steps
    plan = TrainPlan(epochs=1, batch_rows=batch_rows, batch_tokens=512, seed=1)
    steps = plan_epoch_steps(lengths, plan, step_count, epoch)
    assert len(steps) == step_count
    assert all(0 < len(step) <= batch_rows for step in steps)
    assert {row for step in steps for row in step} == set(range(len(lengths)))
    if extra_steps == 0:
        assert sum(map(len, steps)) == len(lengths)


def test_epochs_differ_and_seeds_repeat() -> None:
    plan = TrainPlan(epochs=2, batch_rows=4, batch_tokens=512, seed=1)
    lengths = list(range(40))
    assert plan_epoch_steps(lengths, plan, 10, 0) == plan_epoch_steps(lengths, plan, 10, 0)
    assert plan_epoch_steps(lengths, plan, 10, 0) != plan_epoch_steps(lengths, plan, 10, 1)


def test_loss_weights_preserve_the_class_balance_of_the_sample() -> None:
    labels, weights = np.asarray([1.0, 0, 0, 0]), np.asarray([1.0, 6, 6, 12])
    split = EncodedSplit(False, [], labels, weights, list("abcd"), np.ones(4))
    assert split.loss_weights.tolist() == [1.0, 0.75, 0.75, 1.5]
    assert split.row_keys.tolist() == [0, 1, 2, 3]  # by default the row indices


def test_training_learns_selects_the_best_epoch_and_reports(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, require_all_weights=False, dropout=0.0, seed=0)
    encoder = build_text_encoder(model, backbone, 64)
    train_split, dev_split = build_split(encoder, 200, 1), build_split(encoder, 60, 2)
    best_epochs: list[int] = []
    reports: list[dict[str, float]] = []
    plan = TrainPlan(epochs=3, batch_rows=16, batch_tokens=1024, seed=0)
    (result,) = RewardModelTrainer(model, encoder, plan).fit(
        TorchEngine(model, 3e-3),
        [HeadTask("love", train_split, dev_split)],
        TrainProgress([FitResult()]),
        on_best=lambda: best_epochs.append(len(reports)),
        on_epoch=lambda _, metrics: reports.append(metrics),
    )
    assert result.best_loss < 0.2
    assert best_epochs[-1] == result.best_epoch
    assert [report["epoch"] for report in reports] == [1.0, 2.0, 3.0]
    assert compute_dev_log_loss(result.dev_logits, dev_split, result.prior_shift) == result.best_loss
    assert result.token_count == 3 * train_split.token_count


def test_training_stops_early_when_dev_does_not_improve(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, require_all_weights=False, dropout=0.0, seed=0)
    encoder = build_text_encoder(model, backbone, 64)
    train_split = build_split(encoder, 60, 1)
    opposite_split = replace(train_split, labels=1 - train_split.labels)
    plan = TrainPlan(epochs=6, batch_rows=16, batch_tokens=1024, seed=0, patience=2)
    tasks = [HeadTask("love", train_split, opposite_split)]
    (result,) = RewardModelTrainer(model, encoder, plan).fit(
        TorchEngine(model, 3e-3), tasks, TrainProgress([FitResult()]), **NO_CALLBACKS
    )
    assert len(result.history) < 6
    assert len(result.history) - 1 - result.best_epoch == 2


def test_replayed_frozen_layers_give_the_same_logits_and_gradients(cache: Path) -> None:
    backbone = resolve_model("minilm", cache)
    model = load_classifier(backbone, require_all_weights=False, dropout=0.0, seed=0)
    encoder = build_text_encoder(model, backbone, 64)
    assert freeze_lowest_layers(model, 0.7) == 4
    assert model.num_parameters(only_trainable=True) < model.num_parameters() / 4
    split = build_split(encoder, 6, 3)
    inputs = encoder.collate(split.sequences)
    logits = model(**inputs).logits
    logits.sum().backward()
    weight = model.bert.encoder.layer[4].output.dense.weight
    gradient = weight.grad.clone()
    model.zero_grad()
    prefix = FrozenPrefix(model, 4)
    hidden_states = prefix.compute_hidden_states(encoder, split.sequences, 100)
    assert [len(states) for states in hidden_states] == inputs["attention_mask"].sum(1).tolist()
    with prefix.replay_batch():
        prefix.load_batch(hidden_states)
        replayed_logits = model(**inputs).logits
        replayed_logits.sum().backward()
    assert torch.allclose(logits, replayed_logits, atol=2e-2)  # cached in bfloat16
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), weight.grad.flatten(), dim=0) > 0.999
    assert torch.equal(model(**inputs).logits, logits)


def test_a_frozen_share_of_zero_freezes_nothing_and_layers_round_down(cache: Path) -> None:
    model = load_classifier(resolve_model("tiny-encoder", cache), require_all_weights=False)
    assert freeze_lowest_layers(model, 0.0) == 0
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    assert freeze_lowest_layers(model, 0.4) == 0  # only the embeddings
    assert 0 < model.num_parameters(only_trainable=True) < model.num_parameters()
    assert freeze_lowest_layers(model, 0.99) == 1


@pytest.mark.parametrize("learning_rate", [1e30, 1e37])
def test_training_that_diverges_is_one_message(learning_rate: float, cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, require_all_weights=False)
    encoder = build_text_encoder(model, backbone, 64)
    tasks = [HeadTask("love", build_split(encoder, 8, 1), build_split(encoder, 8, 2))]
    plan = TrainPlan(epochs=2, batch_rows=4, batch_tokens=512, seed=0)
    with pytest.raises(
        RlufError, match=r"reward model love was not a number .*2 epochs; lower reward\.<name>\.learning_r"
    ):
        RewardModelTrainer(model, encoder, plan).fit(
            TorchEngine(model, learning_rate), tasks, TrainProgress([FitResult()]), **NO_CALLBACKS
        )


def test_an_expired_deadline_stops_training(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, require_all_weights=False)
    encoder = build_text_encoder(model, backbone, 64)
    split = build_split(encoder, 8, 1)
    plan = TrainPlan(epochs=1, batch_rows=4, batch_tokens=512, seed=0, deadline=0.0)
    trainer = RewardModelTrainer(model, encoder, plan)
    with pytest.raises(DeadlineError, match=r"deadline in epoch 1; raise timeouts\.reward_training_s"):
        trainer.fit(
            TorchEngine(model, 1e-3),
            [HeadTask("love", split, split)],
            TrainProgress([FitResult()]),
            **NO_CALLBACKS,
        )


def test_empty_splits_and_missing_columns_are_data_errors(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    encoder = build_text_encoder(load_classifier(backbone, require_all_weights=False), backbone, 64)
    with pytest.raises(DataError, match="no rows"):
        encode_split([], encoder, is_pairwise=False, source_name="love/train.parquet")
    with pytest.raises(DataError, match="chosen"):
        encode_split(build_records(2, 0), encoder, is_pairwise=True, source_name="helpfulness/train.parquet")


class _WorkerLostError(Exception):
    """Simulates the end of a worker."""


@dataclass
class TrainRun:
    """One run of the loop: its results, all saved progress, and the rows read, as (head, row), at each save."""

    results: list[FitResult] = field(default_factory=list)
    saves: list[TrainProgress] = field(default_factory=list)
    rows_at_saves: list[Counter[tuple[int, int]]] = field(default_factory=list)
    rows_read: Counter[tuple[int, int]] = field(default_factory=Counter)


def test_interrupted_training_reads_every_row_once_per_epoch(cache: Path) -> None:
    """Two heads, interrupted in the middle of an epoch; the next run resumes the last save and reads the rest."""
    backbone = resolve_model("tiny-encoder", cache)
    encoder = build_text_encoder(load_classifier(backbone, require_all_weights=False), backbone, 64)
    tasks = [
        HeadTask(str(head), build_split(encoder, 80, head), build_split(encoder, 20, 9), head_index=head)
        for head in range(2)
    ]
    plan = TrainPlan(epochs=2, batch_rows=4, batch_tokens=1024, seed=3, save_interval_s=0.0)

    def run_training(progress: TrainProgress, max_saves: int) -> TrainRun:
        model = load_classifier(backbone, require_all_weights=False, dropout=0.0, seed=0, head_count=2)
        run = TrainRun()
        trainer = RewardModelTrainer(model, encoder, plan)
        original_step = trainer._train_step

        def counting_step(engine: Any, task: HeadTask, loss_weights: Any, row_indices: Any) -> torch.Tensor:
            run.rows_read.update((task.head_index, row) for row in row_indices)
            return original_step(engine, task, loss_weights, row_indices)

        def save_progress(current_progress: TrainProgress) -> None:
            run.saves.append(deepcopy(current_progress))
            run.rows_at_saves.append(Counter(run.rows_read))
            if len(run.saves) == max_saves:
                raise _WorkerLostError

        trainer._train_step = counting_step  # type: ignore[method-assign]
        try:
            run.results = trainer.fit(TorchEngine(model, 1e-3), tasks, progress, on_save=save_progress, **NO_CALLBACKS)
        except _WorkerLostError:
            return run
        return run

    interrupted_run = run_training(TrainProgress([FitResult(), FitResult()]), max_saves=7)
    last_save = interrupted_run.saves[-1]
    assert last_save.epoch == 1
    assert 0 < sum(len(task_keys) for task_keys in last_save.read_keys) < 160
    resumed_run = run_training(last_save, max_saves=-1)
    rows_read = interrupted_run.rows_at_saves[-1] + resumed_run.rows_read
    assert rows_read == Counter({(head, row): 2 for head in range(2) for row in range(80)})
    assert [result.examples for result in resumed_run.results] == [160, 160]
    assert [len(result.history) for result in resumed_run.results] == [2, 2]


def test_objects_of_all_ranks_are_gathered_by_torch() -> None:
    """A group of one process: torch fills the entry of its only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert gather_objects({"rows": 3}, 2) == [{"rows": 3}, None]
    finally:
        torch.distributed.destroy_process_group()
    assert gather_objects("alone", 1) == ["alone"]
