"""The probe: worked data, folds by cluster, what the head reads, and the last-token rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, load_classifier
from rluf.reward.linear_probe import HeadInput, _fit, _merged, fit_probe, fold_bias, linear_head, set_head
from rluf.reward.metrics import auroc
from rluf.reward.splits import folds
from rluf.reward.text import Encoded
from rluf.reward.trainer import Plan, Trainer, encode_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(2, 5), st.integers(0, 3))
def test_a_cluster_lies_in_one_fold_and_folds_are_even(members: list[int], count: int, seed: int) -> None:
    clusters = [f"u{m}" for m in members]
    found = folds(clusters, count, seed=seed)
    assert all(len(set(found[np.asarray(clusters) == name].tolist())) == 1 for name in set(clusters))
    sizes = np.bincount(found, minlength=count)
    assert sizes.max() - sizes.min() <= max(members.count(m) for m in set(members))


def test_a_probe_finds_a_linear_truth_on_the_features_own_scale() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 20)) * np.logspace(-2, 2, 20) + 3
    truth = (x[:, 0] - 3) / 0.01 - (x[:, 19] - 3) / 100
    y = (rng.random(900) < 1 / (1 + np.exp(-2 * truth))).astype(float)
    users = [f"u{i % 60}" for i in range(900)]
    head, bias, strength = fit_probe(x[:600], y[:600], np.ones(600), users[:600], pairs=False)
    assert auroc(x[600:] @ head + bias, y[600:]) > 0.85
    assert abs(float((x @ head + bias).mean())) < 0.5
    assert strength >= 1e-3
    shown = np.concatenate([np.where(y[:, None] == 1, x, 2 * x.mean(0) - x), np.where(y[:, None] == 1, 6 - x, x)])
    pairs, nothing, _ = fit_probe(shown, np.ones(900), np.ones(900), users, pairs=True)
    assert nothing == 0.0
    assert ((shown[:900] - shown[900:]) @ pairs > 0).mean() > 0.8


@pytest.mark.parametrize("strength", [1e-3, 0.1, 3.0])
def test_the_fit_is_scikit_learns(strength: float) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 12))
    y = (rng.random(400) < 1 / (1 + np.exp(1 - x[:, 0]))).astype(float)
    weights = rng.uniform(0.5, 2, 400)
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=2000).fit(x, y, weights)
    ours = _fit(x, y, weights, np.zeros(400), np.zeros((0, 0)), strength, bias=True)
    assert np.allclose(ours[:-1], theirs.coef_[0], atol=1e-3)
    assert ours[-1] == pytest.approx(float(theirs.intercept_[0]), abs=1e-3)


def test_what_an_offset_explains_is_not_learnt_again() -> None:
    """The first feature goes with the offset: without it that feature is paid, with it the second alone."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4000, 2))
    y = (rng.random(4000) < 1 / (1 + np.exp(-1.5 * x[:, 0] - x[:, 1]))).astype(float)
    users = [f"u{i % 200}" for i in range(4000)]
    plain, _, _ = fit_probe(x, y, np.ones(4000), users, pairs=False)
    fair, _, _ = fit_probe(x, y, np.ones(4000), users, pairs=False, offsets=1.5 * x[:, 0])
    assert plain[0] == pytest.approx(1.5 * plain[1], rel=0.2)
    assert fair[1] > 0 and abs(fair[0]) < 0.15 * fair[1]
    sides = np.concatenate([x[:2000], x[2000:]])
    won = (rng.random(2000) < 1 / (1 + np.exp(-(sides[:2000] - sides[2000:]) @ [1.5, 1.0]))).astype(float)
    shown = np.concatenate([np.where(won[:, None] == 1, sides[:2000], sides[2000:]),
                            np.where(won[:, None] == 1, sides[2000:], sides[:2000])])  # fmt: skip
    fair, _, _ = fit_probe(shown, np.ones(2000), np.ones(2000), users[:2000], pairs=True, offsets=1.5 * shown[:, 0])
    assert fair[1] > 0 and abs(fair[0]) < 0.3 * fair[1]  # how strongly to regularise is free: ranking is what counts


def test_what_a_sign_off_changes_earns_nothing() -> None:
    """The labels pay the second feature, which a sign-off raises: held down, it moves the logit by next to nothing."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3000, 3))
    y = (rng.random(3000) < 1 / (1 + np.exp(-x[:, 0] - x[:, 1]))).astype(float)
    users, moved = [f"u{i % 200}" for i in range(3000)], np.asarray([0.0, 2.0, 0.5])
    plain, _, _ = fit_probe(x, y, np.ones(3000), users, pairs=False)
    held, _, _ = fit_probe(x, y, np.ones(3000), users, pairs=False, drift=np.outer(moved, moved))
    assert moved @ plain > 1.0 * np.linalg.norm(plain)
    assert abs(moved @ held) < 0.3 * np.linalg.norm(held) < held[0] * 0.4


def test_a_tie_pulls_the_sides_together() -> None:
    x = np.asarray([[1.0], [2.0], [0.0], [0.0]])  # chosen, then rejected
    one, tie = np.ones(2), np.asarray([1.0, 0.5])
    won, _, _ = fit_probe(x, one, np.ones(2), ["a", "b"], pairs=True)
    tied, _, _ = fit_probe(x, tie, np.ones(2), ["a", "b"], pairs=True)
    assert 0 < tied[0] < won[0]


def test_a_row_that_comes_often_weighs_as_one_with_the_sum() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 3)), (rng.random(60) < 0.5).astype(float)
    users = [f"u{i}" for i in range(60)]
    times = rng.integers(1, 4, 60)
    often = np.repeat(np.arange(60), times)
    weighed = fit_probe(x - x.mean(0), y, times.astype(float), users, pairs=False)
    merged = _merged(x[often], y[often], np.ones(len(often)), [users[i] for i in often], np.zeros(len(often)))
    assert np.allclose(merged[0], x) and np.allclose(merged[2], times) and merged[3] == users
    listed = fit_probe(x[often] - x.mean(0), y[often], np.ones(len(often)), [users[i] for i in often], pairs=False)
    assert np.allclose(weighed[0], listed[0], atol=1e-6)


def test_a_bias_goes_into_weights_where_a_direction_is_steady_and_stays_out_elsewhere() -> None:
    rng = np.random.default_rng(1)
    steady = np.concatenate([rng.normal(size=(500, 8)), 20 + 0.1 * rng.normal(size=(500, 1))], axis=1)
    head = rng.normal(size=9)
    folded, left = fold_bias(steady, head, -4.0)
    assert left == 0.0
    assert np.allclose(steady @ folded, steady @ head - 4.0, atol=0.2)
    wild = rng.normal(size=(500, 9))
    assert fold_bias(wild, head, -4.0)[1] == -4.0


def test_the_head_reads_the_same_whatever_the_row_is_batched_with(tiny: Path) -> None:
    model = load_classifier(tiny, trained=False, seed=1).eval()
    encoder = encoder_for(model, tiny, 64)
    rows = encoder.encode([([{"role": "user", "content": "Hi"}], text) for text in ("", "yes", "a longer answer")])
    caught, weights = HeadInput(model), np.random.default_rng(0).normal(size=model.config.hidden_size)
    set_head(model, weights, 0.0)
    with torch.inference_mode():
        logits = model(**encoder.collate(rows)).logits[:, 0]
    features = caught.take([(place, len(row) - 1) for place, row in enumerate(rows)])
    caught.close()
    assert np.allclose(features[0] @ weights, logits.numpy(), atol=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(0, 250), min_size=1, max_size=24),
    pad=st.integers(0, 9),
    left=st.booleans(),
    ends=st.booleans(),
)
def test_the_last_token_rule(tiny: Path, ids: list[int], pad: int, left: bool, ends: bool) -> None:
    """The logit is that of the last token that is no padding, left or right, with an end token or without.

    In this tokenizer the end token is the pad token, so transformers skips it in every row alike.
    """
    model = _MODELS.setdefault(str(tiny), load_classifier(tiny, trained=False, seed=2).eval())
    encoder = encoder_for(model, tiny, 64)
    ids = [token for token in ids if token != encoder.pad_id] or [5]
    row = [*ids, encoder.pad_id] if ends else ids
    filler, unread = [encoder.pad_id] * pad, [0] * pad
    padded = torch.tensor([[*filler, *row] if left else [*row, *filler]])
    mask = torch.tensor([[*unread, *[1] * len(row)] if left else [*[1] * len(row), *unread]])
    with torch.inference_mode():
        alone = encoder.collate([Encoded(tuple(row), len(row))])
        hidden = model.model(**alone).last_hidden_state[0, len(ids) - 1]
        expected = float(hidden @ model.score.weight[0])
        assert abs(float(model(**alone).logits[0, 0]) - expected) < 1e-4
        assert abs(float(model(input_ids=padded, attention_mask=mask).logits[0, 0]) - expected) < 1e-3


_MODELS: dict[str, torch.nn.Module] = {}


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ModelError, match="probe=false"):
        linear_head(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_features_of_messages_of_one_conversation_are_those_of_each_alone(tmp_path: Path, name: str) -> None:
    folder = resolve_model(name, tmp_path)
    model = load_classifier(folder, trained=False, seed=1)
    encoder = encoder_for(model, folder, 96)
    talk, records = [{"role": "user", "content": "Hi"}], []
    for number in range(3):
        records.append({"messages": list(talk), "response": f"Answer {number}", "label": number % 2, "weight": 1.0})
        talk += [{"role": "assistant", "content": f"Answer {number}"}, {"role": "user", "content": "And?"}]
    records = [row | {"group": "g"} for row in [*records, records[1]]]
    plan = Plan(epochs=0, batch_rows=1, batch_tokens=256, seed=0)
    together = Trainer(model, encoder, plan).features(encode_rows(records, encoder, pairs=False, where="here"))
    for row, expected in zip(records, together[0], strict=True):
        alone = Trainer(model, encoder, plan).features(encode_rows([row], encoder, pairs=False, where="here"))
        assert np.allclose(alone[:, 0], expected, atol=1e-4)
    both = Trainer(model, encoder, plan).features(encode_rows(records, encoder, pairs=False, where="here"), (1, 2))
    assert np.allclose(both[1], together[0], atol=1e-4)
    low = load_classifier(folder, trained=False, seed=1, layers=1)
    alone = Trainer(low, encoder, plan).features(encode_rows(records, encoder, pairs=False, where="here"))
    assert np.allclose(both[0], alone[0], atol=1e-4)


def test_kept_layers_are_the_lowest(tiny: Path) -> None:
    whole, one = load_classifier(tiny, trained=False), load_classifier(tiny, trained=False, layers=1)
    assert (whole.config.num_hidden_layers, one.config.num_hidden_layers) == (2, 1)
    assert torch.equal(whole.model.layers[0].mlp.up_proj.weight, one.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ModelError, match="layers=3"):
        load_classifier(tiny, trained=False, layers=3)
