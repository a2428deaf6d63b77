"""Linear probe: planted data, folds by cluster, captured head inputs, and the last-token rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rluf.config.reward import HeadReading
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import build_text_encoder, load_classifier
from rluf.reward.encoded_split import encode_split
from rluf.reward.linear_probe import (
    _merge_equal_rows,
    assign_folds,
    fit_probe,
    fold_bias_into_weights,
    get_linear_head,
    set_head_weights,
)
from rluf.reward.metrics import auroc
from rluf.reward.model import HeadInputCapture, find_capture_points
from rluf.reward.text import EncodedItem
from rluf.reward.trainer import RewardModelTrainer, TrainPlan
from rluf.types import ScoringItem
from rluf.utils.stats import fit_logistic, sigmoid


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(2, 5), st.integers(0, 3))
def test_each_cluster_has_one_fold_and_folds_are_even(cluster_numbers: list[int], fold_count: int, seed: int) -> None:
    clusters = [f"u{number}" for number in cluster_numbers]
    folds = assign_folds(clusters, fold_count, seed=seed)
    assert all(len(set(folds[np.asarray(clusters) == name].tolist())) == 1 for name in set(clusters))
    fold_sizes = np.bincount(folds, minlength=fold_count)
    largest_cluster = max(cluster_numbers.count(number) for number in set(cluster_numbers))
    assert fold_sizes.max() - fold_sizes.min() <= largest_cluster


def test_a_probe_recovers_a_linear_truth_on_features_of_any_scale() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 20)) * np.logspace(-2, 2, 20) + 3
    true_logits = (x[:, 0] - 3) / 0.01 - (x[:, 19] - 3) / 100
    y = (rng.random(900) < sigmoid(2 * true_logits)).astype(float)
    users = [f"u{i % 60}" for i in range(900)]
    head_weights, bias, strength = fit_probe(x[:600], y[:600], np.ones(600), users[:600], is_pairwise=False)
    assert auroc(x[600:] @ head_weights + bias, y[600:]) > 0.85
    assert abs(float((x @ head_weights + bias).mean())) < 0.5
    assert strength >= 1e-3
    is_positive = y[:, None] == 1
    pairs = np.concatenate([np.where(is_positive, x, 2 * x.mean(0) - x), np.where(is_positive, 6 - x, x)])
    pair_weights, pair_bias, _ = fit_probe(pairs, np.ones(900), np.ones(900), users, is_pairwise=True)
    assert pair_bias == 0.0
    assert ((pairs[:900] - pairs[900:]) @ pair_weights > 0).mean() > 0.8


@pytest.mark.parametrize("strength", [1e-3, 0.1, 3.0])
def test_the_fit_equals_scikit_learns(strength: float) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 12))
    y = (rng.random(400) < sigmoid(x[:, 0] - 1)).astype(float)
    weights = rng.uniform(0.5, 2, 400)
    reference = LogisticRegression(C=strength, tol=1e-8, max_iter=2000).fit(x, y, weights)
    solution = fit_logistic(x, y, weights, strength)
    assert np.allclose(solution[:-1], reference.coef_[0], atol=1e-3)
    assert solution[-1] == pytest.approx(float(reference.intercept_[0]), abs=1e-3)


def test_the_effect_that_an_offset_explains_is_not_learned_again() -> None:
    """The first feature follows the offset: without the offset both features get weight, with it only the second."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4000, 2))
    y = (rng.random(4000) < sigmoid(1.5 * x[:, 0] + x[:, 1])).astype(float)
    users = [f"u{i % 200}" for i in range(4000)]
    plain_weights, _, _ = fit_probe(x, y, np.ones(4000), users, is_pairwise=False)
    offset_weights, _, _ = fit_probe(x, y, np.ones(4000), users, is_pairwise=False, logit_offsets=1.5 * x[:, 0])
    assert plain_weights[0] == pytest.approx(1.5 * plain_weights[1], rel=0.2)
    assert offset_weights[1] > 0 and abs(offset_weights[0]) < 0.15 * offset_weights[1]
    first, second = x[:2000], x[2000:]
    first_won = (rng.random(2000) < sigmoid((first - second) @ [1.5, 1.0]))[:, None]
    pairs = np.concatenate([np.where(first_won, first, second), np.where(first_won, second, first)])
    pair_weights, _, _ = fit_probe(
        pairs, np.ones(2000), np.ones(2000), users[:2000], is_pairwise=True, logit_offsets=1.5 * pairs[:, 0]
    )
    # Wider than above: the regularization strength is free, since only the ranking counts.
    assert pair_weights[1] > 0 and abs(pair_weights[0]) < 0.3 * pair_weights[1]


@pytest.mark.parametrize("merged_rows", [1, 3])
@pytest.mark.parametrize("effect", [-2.0, 0.0, 2.0])
def test_what_a_covariate_explains_is_not_learned_from_the_features(effect: float, merged_rows: int) -> None:
    """The first feature is a noisy copy of the covariate, as a text tells its turn; only the second one is rewarded."""
    rng = np.random.default_rng(8)
    context = np.repeat(rng.normal(size=(1500, 1)), merged_rows, axis=0) + 3.0
    count = len(context)
    x = np.repeat(rng.normal(size=(1500, 2)), merged_rows, axis=0)
    x[:, 0] = 0.5 * x[:, 0] + context[:, 0]
    y = (rng.random(count) < sigmoid(x[:, 1] + effect * (context[:, 0] - 3.0))).astype(float)
    users, ones = [f"u{i // merged_rows % 100}" for i in range(count)], np.ones(count)
    plain, _, _ = fit_probe(x, y, ones, users, is_pairwise=False)
    weights, bias, _ = fit_probe(x, y, ones, users, is_pairwise=False, covariates=context)
    assert weights.shape == (2,)
    assert weights[1] > 0.5 and abs(weights[0]) < 0.25
    assert abs(plain[0]) >= abs(effect) / 2
    assert float((x @ weights + bias).mean()) == pytest.approx(0.0, abs=0.25)  # the logit at the covariates' means


def test_covariates_leave_the_penalty_of_sign_offs_in_place() -> None:
    rng = np.random.default_rng(9)
    x, context = rng.normal(size=(2000, 3)), rng.normal(size=(2000, 2))
    y = (rng.random(2000) < sigmoid(x[:, 0] + x[:, 1] + context[:, 0])).astype(float)
    users, change = [f"u{i % 100}" for i in range(2000)], np.asarray([0.0, 2.0, 0.5])
    weights, _, _ = fit_probe(
        x, y, np.ones(2000), users, is_pairwise=False, covariates=context, change_moment=np.outer(change, change)
    )
    assert abs(weights @ change) < 0.2 * weights[0]


def test_the_change_that_a_sign_off_causes_earns_nothing() -> None:
    """The labels reward the second feature, which a sign-off raises; with the penalty the logit hardly moves."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3000, 3))
    y = (rng.random(3000) < sigmoid(x[:, 0] + x[:, 1])).astype(float)
    users, change = [f"u{i % 200}" for i in range(3000)], np.asarray([0.0, 2.0, 0.5])
    plain_weights, _, _ = fit_probe(x, y, np.ones(3000), users, is_pairwise=False)
    invariant_weights, _, _ = fit_probe(
        x, y, np.ones(3000), users, is_pairwise=False, change_moment=np.outer(change, change)
    )
    assert change @ plain_weights > 1.0 * np.linalg.norm(plain_weights)
    norm = np.linalg.norm(invariant_weights)
    assert abs(change @ invariant_weights) < 0.3 * norm < invariant_weights[0] * 0.4


def test_repeated_rows_equal_one_row_with_the_sum_of_their_weights() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 3)), (rng.random(60) < 0.5).astype(float)
    users = [f"u{i}" for i in range(60)]
    counts = rng.integers(1, 4, 60)
    repeated = np.repeat(np.arange(60), counts)
    repeated_users, ones = [users[i] for i in repeated], np.ones(len(repeated))
    weighted_fit = fit_probe(x - x.mean(0), y, counts.astype(float), users, is_pairwise=False)
    merged = _merge_equal_rows(x[repeated], y[repeated], ones, repeated_users, np.zeros(len(repeated)))
    assert np.allclose(merged[0], x) and np.allclose(merged[2], counts) and merged[3] == users
    repeated_fit = fit_probe(x[repeated] - x.mean(0), y[repeated], ones, repeated_users, is_pairwise=False)
    assert np.allclose(weighted_fit[0], repeated_fit[0], atol=1e-6)


def test_a_bias_is_folded_only_where_the_features_have_a_nearly_constant_direction() -> None:
    rng = np.random.default_rng(1)
    head_weights = rng.normal(size=9)
    nearly_constant = 20 + 0.1 * rng.normal(size=(500, 1))
    features = np.concatenate([rng.normal(size=(500, 8)), nearly_constant], axis=1)
    folded_weights, remaining_bias = fold_bias_into_weights(features, head_weights, -4.0)
    assert remaining_bias == 0.0
    assert np.allclose(features @ folded_weights, features @ head_weights - 4.0, atol=0.2)
    assert fold_bias_into_weights(rng.normal(size=(500, 9)), head_weights, -4.0)[1] == -4.0


def test_captured_features_do_not_depend_on_the_batch(tiny_folder: Path) -> None:
    model = load_classifier(tiny_folder, require_all_weights=False, seed=1).eval()
    encoder = build_text_encoder(model, tiny_folder, 64)
    rows = encoder.encode(
        [ScoringItem([{"role": "user", "content": "Hi"}], text) for text in ("", "yes", "a longer answer")]
    )
    capture, weights = (
        HeadInputCapture(find_capture_points(model)),
        np.random.default_rng(0).normal(size=model.config.hidden_size),
    )
    set_head_weights(model, weights, 0.0)
    with torch.inference_mode():
        logits = model(**encoder.collate(rows)).logits[:, 0]
    features = capture.take_features(list(enumerate(rows)))
    capture.close()
    assert np.allclose(features[0] @ weights, logits.numpy(), atol=1e-4)


@cache
def load_tiny_model(folder: Path) -> Any:
    return load_classifier(folder, require_all_weights=False, seed=2).eval()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    token_ids=st.lists(st.integers(0, 250), min_size=1, max_size=24),
    padding=st.integers(0, 9),
    pads_left=st.booleans(),
    has_end_token=st.booleans(),
)
def test_the_last_token_rule(
    tiny_folder: Path, token_ids: list[int], padding: int, pads_left: bool, has_end_token: bool
) -> None:
    """The logit is that of the last token that is not padding, on either side, with or without an end token."""
    model = load_tiny_model(tiny_folder)
    encoder = build_text_encoder(model, tiny_folder, 64)
    token_ids = [token for token in token_ids if token != encoder.pad_id] or [5]
    row = [*token_ids, encoder.tokenizer.eos_token_id] if has_end_token else token_ids
    pad_ids, pad_mask = [encoder.pad_id] * padding, [0] * padding
    padded_ids = torch.tensor([[*pad_ids, *row] if pads_left else [*row, *pad_ids]])
    mask = torch.tensor([[*pad_mask, *[1] * len(row)] if pads_left else [*[1] * len(row), *pad_mask]])
    with torch.inference_mode():
        inputs = encoder.collate([EncodedItem(tuple(row), len(row))])
        last_hidden_state = model.model(**inputs).last_hidden_state[0, len(row) - 1]
        expected = float(last_hidden_state @ model.score.weight[0])
        assert abs(float(model(**inputs).logits[0, 0]) - expected) < 1e-4
        assert abs(float(model(input_ids=padded_ids, attention_mask=mask).logits[0, 0]) - expected) < 1e-3


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ModelError, match="linear_probe=false"):
        get_linear_head(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_features_of_one_conversations_messages_equal_those_of_separate_rows(tmp_path: Path, name: str) -> None:
    folder = resolve_model(name, tmp_path)
    model = load_classifier(folder, require_all_weights=False, seed=1)
    encoder = build_text_encoder(model, folder, 96)
    messages, records = [{"role": "user", "content": "Hi"}], []
    for number in range(3):
        records.append({"messages": list(messages), "response": f"Answer {number}", "label": number % 2, "weight": 1.0})
        messages += [{"role": "assistant", "content": f"Answer {number}"}, {"role": "user", "content": "And?"}]
    records = [row | {"group": "g"} for row in [*records, records[1]]]
    plan = TrainPlan(epochs=0, batch_rows=1, batch_tokens=256, seed=0)

    def compute_features(
        classifier: Any, rows: list[dict[str, Any]], readings: tuple[HeadReading, ...] = (HeadReading(),)
    ) -> np.ndarray:
        split = encode_split(rows, encoder, is_pairwise=False, source_name="here")
        return RewardModelTrainer(classifier, encoder, plan).compute_features(split, readings)

    joint_features = compute_features(model, records)
    for row, expected in zip(records, joint_features[0], strict=True):
        assert np.allclose(compute_features(model, [row])[:, 0], expected, atol=1e-4)
    features_by_depth = compute_features(model, records, (HeadReading(1), HeadReading(2)))
    assert np.allclose(features_by_depth[1], joint_features[0], atol=1e-4)
    one_layer_model = load_classifier(folder, require_all_weights=False, seed=1, layer_count=1)
    assert np.allclose(features_by_depth[0], compute_features(one_layer_model, records)[0], atol=1e-4)


@pytest.mark.parametrize("max_tokens", [200, 40])
def test_poolings_read_the_tokens_of_the_response_whoever_shares_the_pass(tiny_folder: Path, max_tokens: int) -> None:
    model = load_classifier(tiny_folder, require_all_weights=False, seed=1)
    encoder = build_text_encoder(model, tiny_folder, max_tokens, locate_responses=True)
    messages = [{"role": "user", "content": "Hi, how was the day?"}]
    responses = ("Fine.", "Fine. It was a good long day, and yours?", "", "Not <|im_end|> so good")
    rows = [{"messages": messages, "response": text, "label": 1, "weight": 1.0, "group": "g"} for text in responses]
    split = encode_split(rows, encoder, is_pairwise=False, source_name="here")
    trainer = RewardModelTrainer(model, encoder, TrainPlan(epochs=0, batch_rows=1, batch_tokens=256, seed=0))
    readings = (HeadReading(1), HeadReading(1, "mean"), HeadReading(2, "mean"), HeadReading(2, "response_end"))
    features = trainer.compute_features(split, readings)
    assert np.allclose(trainer.compute_features(split, (readings[2],))[0], features[2], atol=1e-4)
    for index, row in enumerate(split.sequences):
        start, end = row.response_span
        if not responses[index]:
            start, end = len(row) - 1, len(row)
        with torch.inference_mode():
            states = model.model(torch.tensor([row.token_ids]), output_hidden_states=True)
            # The state after the last layer has passed through the final norm already, that after the first has not.
            expected = [model.model.norm(states.hidden_states[1]), states.last_hidden_state]
        assert np.allclose(features[0, index], expected[0][0, -1], atol=1e-4)
        for feature, layer_states in zip(features[1:3, index], expected, strict=True):
            assert np.allclose(feature, layer_states[0, start:end].mean(0), atol=1e-4)
        assert np.allclose(features[3, index], expected[1][0, end - 1], atol=1e-4)


def test_truncation_retains_the_lowest_layers(tiny_folder: Path) -> None:
    full_model = load_classifier(tiny_folder, require_all_weights=False)
    truncated_model = load_classifier(tiny_folder, require_all_weights=False, layer_count=1)
    assert (full_model.config.num_hidden_layers, truncated_model.config.num_hidden_layers) == (2, 1)
    full_weight, truncated_weight = (
        model.model.layers[0].mlp.up_proj.weight for model in (full_model, truncated_model)
    )
    assert torch.equal(full_weight, truncated_weight)
    with pytest.raises(ModelError, match="layers=3"):
        load_classifier(tiny_folder, require_all_weights=False, layer_count=3)
