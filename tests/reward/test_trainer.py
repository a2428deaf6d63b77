"""The training loop with a plain torch engine: step plans, frozen layers, choice of the best epoch."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import DataError, StallError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, freeze, load_classifier
from rluf.reward.frozen_prefix import FrozenPrefix
from rluf.reward.text import TextEncoder
from rluf.reward.trainer import Fit, Plan, Position, Rows, Task, Trainer, dev_log_loss, encode_rows, step_plan


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


QUIET: dict[str, Any] = {"snapshot": lambda: None, "report": lambda *_: None}


class TorchEngine:
    """AdamW without anything around it."""

    def __init__(self, model: torch.nn.Module, rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

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


def _records(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = rng.randrange(2)
        text = rng.choice(("!!!! wow love", "love !!!") if label else ("no. cold.", "stone. no"))
        rows.append(
            {
                "id": f"{seed}-{number}",
                "messages": [{"role": "user", "content": "hi"}],
                "response": text,
                "label": label,
                "weight": 1.0,
                "user_id": f"u{number % 50}",
            }
        )
    return rows


def _rows(encoder: TextEncoder, count: int, seed: int) -> Rows:
    return encode_rows(_records(count, seed), encoder, pairs=False, where="here")


@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_a_step_plan_reads_every_row_in_the_promised_number_of_steps(
    lengths: list[int], batch: int, extra: int, epoch: int
) -> None:
    steps = -(-len(lengths) // batch) + extra
    found = step_plan(lengths, Plan(epochs=1, batch_rows=batch, batch_tokens=512, seed=1), steps, epoch)
    assert len(found) == steps
    assert all(0 < len(step) <= batch for step in found)
    assert {row for step in found for row in step} == set(range(len(lengths)))
    if extra == 0:
        assert sum(map(len, found)) == len(lengths)


def test_epochs_differ_and_seeds_repeat() -> None:
    plan = Plan(epochs=2, batch_rows=4, batch_tokens=512, seed=1)
    lengths = list(range(40))
    assert step_plan(lengths, plan, 10, 0) == step_plan(lengths, plan, 10, 0)
    assert step_plan(lengths, plan, 10, 0) != step_plan(lengths, plan, 10, 1)


def test_loss_weights_keep_the_class_balance_of_the_sample() -> None:
    rows = Rows(False, [], np.asarray([1.0, 0, 0, 0]), np.asarray([1.0, 6, 6, 12]), list("abcd"), np.ones(4))
    assert rows.loss_weights.tolist() == [1.0, 0.75, 0.75, 1.5]
    assert rows.keys.tolist() == [0, 1, 2, 3]  # rows made by hand are told apart too


def test_training_learns_keeps_the_best_epoch_and_reports(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, trained=False, dropout=0.0, seed=0)
    encoder = encoder_for(model, backbone, 64)
    train, dev = _rows(encoder, 200, 1), _rows(encoder, 60, 2)
    kept: list[int] = []
    told: list[dict[str, float]] = []
    plan = Plan(epochs=3, batch_rows=16, batch_tokens=1024, seed=0)
    (found,) = Trainer(model, encoder, plan).fit(
        TorchEngine(model, 3e-3),
        [Task("love", train, dev)],
        Position([Fit()]),
        snapshot=lambda: kept.append(len(told)),
        report=lambda _, figures: told.append(figures),
    )
    assert found.best_loss < 0.2
    assert kept[-1] == found.best_epoch
    assert [row["epoch"] for row in told] == [1.0, 2.0, 3.0]
    assert dev_log_loss(found.dev_logits, dev, found.shift) == found.best_loss
    assert found.tokens == 3 * train.tokens


def test_training_stops_when_dev_gets_no_better(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, trained=False, dropout=0.0, seed=0)
    encoder = encoder_for(model, backbone, 64)
    rows = _rows(encoder, 60, 1)
    unlike = replace(rows, labels=1 - rows.labels)
    plan = Plan(epochs=6, batch_rows=16, batch_tokens=1024, seed=0, patience=2)
    (found,) = Trainer(model, encoder, plan).fit(
        TorchEngine(model, 3e-3), [Task("love", rows, unlike)], Position([Fit()]), **QUIET
    )
    assert len(found.history) < 6
    assert len(found.history) - 1 - found.best_epoch == 2


def test_replayed_frozen_layers_give_the_same_logits_and_gradients(cache: Path) -> None:
    backbone = resolve_model("minilm", cache)
    model = load_classifier(backbone, trained=False, dropout=0.0, seed=0)
    encoder = encoder_for(model, backbone, 64)
    assert freeze(model, 0.7) == 4
    assert model.num_parameters(only_trainable=True) < model.num_parameters() / 4
    rows = _rows(encoder, 6, 3)
    inputs = encoder.collate(rows.sequences)
    mask = inputs["attention_mask"]
    plain = model(**inputs).logits
    plain.sum().backward()
    weight = model.bert.encoder.layer[4].output.dense.weight
    gradient = weight.grad.clone()
    model.zero_grad()
    prefix = FrozenPrefix(model, 4)
    kept = prefix.compute(encoder, rows.sequences, 100)
    assert [len(hidden) for hidden in kept] == mask.sum(1).tolist()
    with prefix.replaying():
        prefix.load(kept)
        replayed = model(**inputs).logits
        replayed.sum().backward()
    assert torch.allclose(plain, replayed, atol=2e-2)  # kept in bfloat16
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), weight.grad.flatten(), dim=0) > 0.999
    assert torch.equal(model(**inputs).logits, plain)


def test_a_share_of_nought_freezes_nothing_and_layers_round_down(cache: Path) -> None:
    model = load_classifier(resolve_model("tiny-encoder", cache), trained=False)
    assert freeze(model, 0.0) == 0
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    assert freeze(model, 0.4) == 0  # the embeddings only
    assert 0 < model.num_parameters(only_trainable=True) < model.num_parameters()
    assert freeze(model, 0.99) == 1


def test_a_passed_deadline_stops_training(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    model = load_classifier(backbone, trained=False)
    encoder = encoder_for(model, backbone, 64)
    rows = _rows(encoder, 8, 1)
    plan = Plan(epochs=1, batch_rows=4, batch_tokens=512, seed=0, deadline=0.0)
    with pytest.raises(StallError, match="deadline_s"):
        Trainer(model, encoder, plan).fit(
            TorchEngine(model, 1e-3), [Task("love", rows, rows)], Position([Fit()]), **QUIET
        )


def test_empty_splits_and_missing_columns_are_data_errors(cache: Path) -> None:
    backbone = resolve_model("tiny-encoder", cache)
    encoder = encoder_for(load_classifier(backbone, trained=False), backbone, 64)
    with pytest.raises(DataError, match="no rows"):
        encode_rows([], encoder, pairs=False, where="love/train.parquet")
    with pytest.raises(DataError, match="chosen"):
        encode_rows(_records(2, 0), encoder, pairs=True, where="helpfulness/train.parquet")


class _KilledError(Exception):
    """Stands for whatever ends a worker."""


def test_training_that_is_cut_short_reads_every_row_once_an_epoch(cache: Path) -> None:
    """Two heads, ended in mid-epoch; another run goes on from what was kept last and reads the rest only."""
    backbone = resolve_model("tiny-encoder", cache)
    encoder = encoder_for(load_classifier(backbone, trained=False), backbone, 64)
    tasks = [Task(str(head), _rows(encoder, 80, head), _rows(encoder, 20, 9), head=head) for head in range(2)]
    plan = Plan(epochs=2, batch_rows=4, batch_tokens=1024, seed=3, save_s=0.0)

    def run(position: Position, deaths: int) -> tuple[list[Fit], list[Position], Counter[tuple[int, int]]]:
        model = load_classifier(backbone, trained=False, dropout=0.0, seed=0, heads=2)
        kept: list[Position] = []
        read: Counter[tuple[int, int]] = Counter()
        trainer = Trainer(model, encoder, plan)
        forward = trainer._step

        def step(engine: Any, task: Task, weights: Any, rows: Any) -> torch.Tensor:
            read.update((task.head, row) for row in rows)
            return forward(engine, task, weights, rows)

        def save(stand: Position) -> None:
            kept.append(deepcopy(stand))
            read_then.append(Counter(read))
            if len(kept) == deaths:
                raise _KilledError

        read_then: list[Counter[tuple[int, int]]] = []
        trainer._step = step  # type: ignore[method-assign]
        try:
            found = trainer.fit(TorchEngine(model, 1e-3), tasks, position, save=save, **QUIET)
        except _KilledError:
            return [], kept, read_then[-1]
        return found, kept, read

    _, kept, before = run(Position([Fit(), Fit()]), deaths=7)
    assert kept[-1].epoch == 1
    assert 0 < sum(len(done) for done in kept[-1].done) < 160
    found, _, after = run(kept[-1], deaths=-1)
    assert before + after == Counter({(head, row): 2 for head in range(2) for row in range(80)})
    assert [fit.examples for fit in found] == [160, 160]
    assert [len(fit.history) for fit in found] == [2, 2]
