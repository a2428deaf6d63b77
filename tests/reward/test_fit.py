"""Ensemble members trained, calibrated and exported together; neither Ray nor DeepSpeed is needed for probes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DeadlineError, ModelError
from rluf.reward.card import fit_calibration
from rluf.reward.encoded_split import encode_split
from rluf.reward.export import export_models, subsample_rows
from rluf.reward.fit import HeadData, TrainedModel, train_ensemble, train_member
from rluf.reward.linear_probe import fit_probe
from rluf.reward.model import RewardModel, compute_logits
from rluf.reward.trainer import compute_dev_log_loss
from rluf.types import Message, ScoringItem
from tests.reward.test_reward_training import COLD_RESPONSES, WARM_RESPONSES, write_prepared_data

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
"""Training dtypes that scores must not depend on: torch computes in both on every processor."""
TWO_DEPTHS = ({"layers": 1}, {"layers": 2})


def build_settings(cache: Path, *, dtype: str = "float32", **model: Any) -> Settings:
    section = {"backbone": "tiny", "linear_probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120, **model}
    pair_section = {**section, "loss": "bradley_terry"}
    reward = {"safety": section, "love": section, "helpfulness": pair_section}
    return Settings.model_validate({"run": {"cache": str(cache)}, "model": {"dtype": dtype}, "reward": reward})


def load_head_data(data_folder: Path, objective: str) -> HeadData:
    train_rows, dev_rows = (read_rows(data_folder, objective, split) for split in ("train", "dev"))
    return HeadData(objective, train_rows, dev_rows, data_folder / objective)


def read_rows(data_folder: Path, objective: str, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(data_folder / objective / f"{split}.parquet").to_pylist()
    return rows


def export_and_load(
    settings: Settings, data_folder: Path, objective: str, members: list[TrainedModel], output_folder: Path
) -> RewardModel:
    outputs = {objective: (data_folder / objective, output_folder)}
    export_models(settings, outputs, members, time.monotonic(), full_card=False)
    return RewardModel.load(output_folder, batch_tokens=2048)


def read_card(model_folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((model_folder / "reward_card.json").read_text())
    return card


def build_items(*texts: str) -> list[ScoringItem]:
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    return [ScoringItem(question, text) for text in texts]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared_data(tmp_path_factory.mktemp("member") / "data", row_count=160)


@DTYPES
def test_an_ensemble_of_probes_ranks_is_calibrated_and_has_a_card(
    data_folder: Path, tmp_path: Path, dtype: str
) -> None:
    settings = build_settings(tmp_path, dtype=dtype, ensemble={"members": TWO_DEPTHS})
    head_data = [load_head_data(data_folder, "love")]
    shared_features: dict[tuple[str, str], Any] = {}
    members = [
        train_member(settings, head_data, index, math.inf, shared_features=shared_features) for index in range(2)
    ]
    assert list(shared_features) == [("tiny", "love")]
    separate_member = train_member(settings, head_data, 0, math.inf)
    assert np.allclose(separate_member.fit_results[0].dev_logits, members[0].fit_results[0].dev_logits, atol=1e-4)
    outputs = {"love": (data_folder / "love", tmp_path / "out")}
    export_models(settings, outputs, members, time.monotonic(), full_card=True)
    card = read_card(tmp_path / "out")
    assert card["training"]["members"] == 2
    assert card["training"]["best_epoch"] == 0
    assert card["training"]["train_tokens"] == members[0].tasks[0].train_split.token_count  # one pass reads for both
    assert card["robustness"]["rows"] > 20
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    assert [forward_pass.capture_points.readings for forward_pass in model._forward_passes] == [
        ((1, "last"), (2, "last"))
    ]
    rows = model.encoder.encode(build_items(*WARM_RESPONSES))
    separate_logits = [compute_logits(member, model.encoder, rows, 512)[:, 0] for member in model.members]
    assert np.allclose(model.compute_member_logits(rows), separate_logits, atol=1e-4)
    warm_scores, cold_scores = (model.score(build_items(*texts), "love") for texts in (WARM_RESPONSES, COLD_RESPONSES))
    assert min(score.value for score in warm_scores) > max(score.value for score in cold_scores)
    assert all(score.spread > 0 for score in warm_scores)


def test_counterfactual_pairs_train_but_do_not_calibrate(data_folder: Path, tmp_path: Path) -> None:
    head_data = [load_head_data(data_folder, "helpfulness")]
    plain, debiased = (
        train_ensemble(build_settings(tmp_path, debias=debias), head_data, math.inf)[0]
        for debias in ([], ["counterfactuals"])
    )
    assert len(debiased.tasks[0].dev_split) == len(plain.tasks[0].dev_split)
    assert not np.allclose(debiased.fit_results[0].dev_logits, plain.fit_results[0].dev_logits)
    settings = build_settings(tmp_path, debias=["counterfactuals"])
    model = export_and_load(settings, data_folder, "helpfulness", [debiased], tmp_path / "out")
    card = read_card(tmp_path / "out")
    assert card["training"]["train_rows"] == len(head_data[0].train_rows)
    assert card["training"]["counterfactual_copies"] > 10
    assert {"echo", "flattery", "cut"} <= set(card["prompt_fit"]["shares"])
    assert card["truncation"]["test"]["cut_share"] == 0
    # Cut copies were read in training, so the model distinguishes a cut response from a finished one.
    assert model.calibration.mark_truncated
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    items = [ScoringItem(question, "Oh, it", is_truncated) for is_truncated in (False, True)]
    assert len({score.raw_logit for score in model.score(items, "helpfulness")}) == 2


def test_the_context_is_fitted_with_the_head_and_is_not_in_the_model(data_folder: Path, tmp_path: Path) -> None:
    head_data = load_head_data(data_folder, "love")
    for rows in (head_data.train_rows, head_data.dev_rows):
        for index, row in enumerate(rows):
            row |= {"turn": index % 5, "model_version": f"bot-{index % 2}"}
    settings = build_settings(tmp_path)
    love = settings.reward.love.model_copy(update={"debias": ("context",)})
    context_settings = settings.model_copy(update={"reward": settings.reward.model_copy(update={"love": love})})
    plain, contextual = (
        train_ensemble(each_settings, [head_data], math.inf)[0] for each_settings in (settings, context_settings)
    )
    assert contextual.tasks[0].train_split.context_columns.shape == (len(head_data.train_rows), 4)
    assert contextual.tasks[0].dev_split.context_columns.shape == (len(head_data.dev_rows), 4)
    assert {name: tensor.shape for name, tensor in contextual.weights.items()} == {
        name: tensor.shape for name, tensor in plain.weights.items()
    }
    model = export_and_load(context_settings, data_folder, "love", [contextual], tmp_path / "out")
    dev_split = contextual.tasks[0].dev_split
    values = model.calibration.compute_probabilities(contextual.fit_results[0].dev_logits)
    rate = np.average(dev_split.labels, weights=dev_split.weights)
    assert np.average(values, weights=dev_split.weights) == pytest.approx(rate, abs=1e-4)


def test_a_head_fitted_on_labels_has_no_counterfactual_rows(data_folder: Path, tmp_path: Path) -> None:
    settings = build_settings(tmp_path, debias=["counterfactuals"])
    (member,) = train_ensemble(settings, [load_head_data(data_folder, "love")], math.inf)
    assert member.tasks[0].train_split.counterfactual_count == 0
    assert not member.encoder.mark_truncated


@DTYPES
@pytest.mark.parametrize("objective", ["love", "helpfulness"])
def test_the_mean_of_members_with_a_shared_head_is_its_logit_and_has_no_spread(
    data_folder: Path, tmp_path: Path, objective: str, dtype: str
) -> None:
    member_settings = [*TWO_DEPTHS, {"backbone": "tiny-encoder", "layers": 1}]
    settings = build_settings(tmp_path, dtype=dtype, ensemble={"members": member_settings, "shared_head": True})
    members = train_ensemble(settings, [load_head_data(data_folder, objective)], math.inf)
    task, features = members[0].tasks[0], [member.probe_features[0] for member in members]
    train_split = task.train_split
    head_weights, bias, _ = fit_probe(
        np.concatenate([member_features.train_features for member_features in features], axis=1),
        train_split.labels,
        train_split.loss_weights,
        train_split.clusters,
        is_pairwise=train_split.is_pairwise,
        seed=settings.seed,
    )
    joint_logits = np.concatenate([member_features.dev_features for member_features in features], axis=1) @ head_weights
    mean_logits = np.mean([member.fit_results[0].dev_logits for member in members], axis=0)
    # Equal except for a bias that was folded into the weights.
    tolerance = 0.1 * joint_logits.std()
    assert np.allclose(mean_logits - mean_logits.mean(), joint_logits - joint_logits.mean(), atol=tolerance)
    assert bias == 0.0 or objective == "love"
    model = export_and_load(settings, data_folder, objective, members, tmp_path / "out")
    assert model.calibration.shared_head
    dev_log_loss = compute_dev_log_loss(mean_logits, task.dev_split, members[0].fit_results[0].prior_shift)
    assert read_card(tmp_path / "out")["training"]["dev_log_loss"] == pytest.approx(dev_log_loss, abs=1e-6)
    # Encoded by the loaded model, whose encoder holds an encoding per member.
    dev_rows = read_rows(data_folder, objective, "dev")
    dev_split = encode_split(dev_rows, model.encoder, is_pairwise=task.dev_split.is_pairwise, source_name="dev")
    assert np.allclose(model.compute_raw_logits(dev_split.sequences), mean_logits, atol=1e-3)
    scores = model.score(build_items(*WARM_RESPONSES, *COLD_RESPONSES), objective)
    assert {score.spread for score in scores} == {0.0}
    assert min(score.value for score in scores[:3]) > max(score.value for score in scores[3:])


@DTYPES
@pytest.mark.parametrize("frozen_share", [0.0, 0.5])
def test_a_trained_model_is_calibrated_on_the_logits_that_it_scores_with(
    data_folder: Path, tmp_path: Path, frozen_share: float, dtype: str, process_group: None
) -> None:
    settings = build_settings(
        tmp_path, dtype=dtype, linear_probe=False, epochs=2, frozen_share=frozen_share, learning_rate=1e-3
    )
    member = train_member(settings, [load_head_data(data_folder, "love")], 0, math.inf)
    assert member.fit_results[0].best_epoch >= 0
    model = export_and_load(settings, data_folder, "love", [member], tmp_path / "out")
    dev_items = [ScoringItem(row["messages"], row["response"]) for row in read_rows(data_folder, "love", "dev")]
    logits = model.compute_raw_logits(model.encoder.encode(dev_items))
    assert logits == pytest.approx(member.fit_results[0].dev_logits, abs=1e-3)
    refitted = fit_calibration(member.tasks[0].dev_split, np.asarray(logits), model.calibration)
    assert (refitted.scale, refitted.offset) == pytest.approx(
        (model.calibration.scale, model.calibration.offset), abs=1e-2
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rows_are_subsampled_per_label(share: float) -> None:
    rows: list[dict[str, Any]] = [{"id": number, "label": int(number % 20 == 0)} for number in range(400)]
    sampled_rows = subsample_rows(rows, share, "love")
    label_counts = [sum(row["label"] == label for row in sampled_rows) for label in (0, 1)]
    assert label_counts == pytest.approx([380 * share, 20 * share], abs=1)
    assert sampled_rows == subsample_rows(rows, share, "love")
    one_positive = [{"label": 1}, *({"label": 0} for _ in range(30))]
    assert {row["label"] for row in subsample_rows(one_positive, share, "love")} == {0, 1}  # the only positive stays
    pairs = [{"chosen": "a", "rejected": "b"} for _ in range(100)]
    assert len(subsample_rows(pairs, share, "helpfulness")) == pytest.approx(100 * share, abs=1)
    continued_rows = [{"label": 0, "continued": number % 2 == 0} for number in range(40)]
    sampled_rows = subsample_rows(continued_rows, share, "continued")
    assert sum(row["continued"] for row in sampled_rows) == pytest.approx(len(sampled_rows) / 2, abs=1)


@DTYPES
@pytest.mark.parametrize(("backbone", "other_backbone"), [("tiny", "tiny-encoder"), ("tiny-encoder", "tiny")])
def test_members_on_two_backbones_encode_text_their_own_way_and_have_equal_spread(
    data_folder: Path, tmp_path: Path, backbone: str, other_backbone: str, dtype: str
) -> None:
    """Encoders cannot predict a next message, so read_at_next_turn applies to the decoder, wherever it is listed."""
    member_settings = [{"layers": 2}, {"backbone": other_backbone, "layers": 2}]
    settings = build_settings(
        tmp_path, dtype=dtype, backbone=backbone, ensemble={"members": member_settings}, read_at_next_turn=True
    )
    head_data = [load_head_data(data_folder, "love")]
    members = [train_member(settings, head_data, index, math.inf) for index in range(2)]
    model = export_and_load(settings, data_folder, "love", members, tmp_path / "out")
    first_spread, second_spread = (member.fit_results[0].dev_logits.std() for member in members)
    assert first_spread == pytest.approx(second_spread)
    items = build_items(*WARM_RESPONSES, *COLD_RESPONSES)
    rows = model.encoder.encode(items)
    assert [len(row.member_encodings) for row in rows] == [1] * len(items)
    encoders = [model.encoder, *model.encoder.member_encoders]
    assert [encoder.read_at_next_turn for encoder in encoders] == [backbone == "tiny", backbone != "tiny"]
    separate_logits = [
        compute_logits(member, encoder, encoder.encode(items), 512)
        for member, encoder in zip(model.members, encoders, strict=True)
    ]
    assert sum(model.calibration.member_weights) == pytest.approx(1)
    expected = np.average(separate_logits, axis=0, weights=model.calibration.member_weights)
    raw_logits = model.compute_raw_logits(rows)
    assert raw_logits == pytest.approx(expected[:, 0], abs=1e-4)
    assert min(raw_logits[: len(WARM_RESPONSES)]) > max(raw_logits[len(WARM_RESPONSES) :])


@DTYPES
@pytest.mark.parametrize("backbone", ["tiny", "tiny-encoder"])
def test_members_that_read_only_the_response_have_a_forward_pass_of_their_own(
    data_folder: Path, tmp_path: Path, backbone: str, dtype: str
) -> None:
    response_members = [{"layers": layers, "input": "response"} for layers in (1, 2)]
    settings = build_settings(
        tmp_path,
        dtype=dtype,
        backbone=backbone,
        ensemble={"members": [*TWO_DEPTHS, *response_members], "shared_head": True},
    )
    members = train_ensemble(settings, [load_head_data(data_folder, "love")], math.inf)
    model = export_and_load(settings, data_folder, "love", members, tmp_path / "out")
    assert model.calibration.response_only_members == (2, 3)
    served_members = [
        (forward_pass.member_indices, forward_pass.capture_points.readings) for forward_pass in model._forward_passes
    ]
    assert served_members == [((0, 1), ((1, "last"), (2, "last"))), ((2, 3), ((1, "last"), (2, "last")))]
    first_question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    other_question: list[Message] = [{"role": "user", "content": "Tell me of ships, and of the sea that they sail."}]
    response = WARM_RESPONSES[0]
    rows = model.encoder.encode([ScoringItem(first_question, response), ScoringItem(other_question, response)])
    logits = model.compute_member_logits(rows)
    assert logits[2:, 0] == pytest.approx(logits[2:, 1], abs=1e-9)
    assert (abs(logits[:2, 0] - logits[:2, 1]) > 1e-6).all()
    dev_items = [ScoringItem(row["messages"], row["response"]) for row in read_rows(data_folder, "love", "dev")]
    fitted_logits = np.mean([member.fit_results[0].dev_logits for member in members], axis=0)
    assert len(members[0].tasks[0].dev_split) == len(dev_items)
    assert model.compute_raw_logits(model.encoder.encode(dev_items)) == pytest.approx(fitted_logits, abs=1e-3)


@DTYPES
@pytest.mark.parametrize("shared_head", [False, True])
def test_members_with_other_poolings_share_the_pass_and_are_scored_as_they_were_fitted(
    data_folder: Path, tmp_path: Path, shared_head: bool, dtype: str
) -> None:
    pooled_members = [{"layers": 1, "pooling": "mean"}, {"layers": 2, "pooling": "response_end"}]
    ensemble = {"members": [*TWO_DEPTHS, *pooled_members], "shared_head": shared_head}
    settings = build_settings(tmp_path, dtype=dtype, ensemble=ensemble, read_at_next_turn=True)
    members = train_ensemble(settings, [load_head_data(data_folder, "love")], math.inf)
    model = export_and_load(settings, data_folder, "love", members, tmp_path / "out")
    assert model.calibration.member_poolings == ("last", "last", "mean", "response_end")
    (forward_pass,) = model._forward_passes
    assert sorted(zip(forward_pass.member_indices, forward_pass.capture_points.readings, strict=True)) == [
        (0, (1, "last")), (1, (2, "last")), (2, (1, "mean")), (3, (2, "response_end")),
    ]  # fmt: skip
    dev_items = [ScoringItem(row["messages"], row["response"]) for row in read_rows(data_folder, "love", "dev")]
    logits = model.compute_member_logits(model.encoder.encode(dev_items))
    fitted_logits = np.stack([member.fit_results[0].dev_logits for member in members])
    assert logits == pytest.approx(fitted_logits, abs=1e-3)
    assert (abs(logits[0] - logits[2]) > 1e-3).any()


def test_mean_pooling_of_an_encoder_is_refused(data_folder: Path, tmp_path: Path) -> None:
    members = [{"layers": 1}, {"backbone": "tiny-encoder", "pooling": "mean"}]
    settings = build_settings(tmp_path, backbone="tiny", ensemble={"members": members})
    with pytest.raises(ModelError, match="tiny-encoder has pooling: mean"):
        train_ensemble(settings, [load_head_data(data_folder, "love")], math.inf)


def test_read_at_next_turn_without_a_decoder_is_refused_before_any_row_is_encoded(
    data_folder: Path, tmp_path: Path
) -> None:
    settings = build_settings(
        tmp_path, backbone="tiny-encoder", ensemble={"members": TWO_DEPTHS}, read_at_next_turn=True
    )
    with pytest.raises(ModelError, match=r"tiny-encoder\) are encoders"):
        train_ensemble(settings, [load_head_data(data_folder, "love")], math.inf)


def test_a_probe_on_pairs_prefers_the_chosen_response(data_folder: Path, tmp_path: Path) -> None:
    settings = build_settings(tmp_path, read_at_next_turn=True)
    member = train_member(settings, [load_head_data(data_folder, "helpfulness")], 0, math.inf)
    model = export_and_load(settings, data_folder, "helpfulness", [member], tmp_path / "out")
    card = read_card(tmp_path / "out")
    assert card["pair_accuracy"]["mean"] > 0.75
    assert card["calibration"]["read_at_next_turn"] is True
    assert model.encoder.read_at_next_turn


def test_an_expired_deadline_stops_the_probe(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match=r"deadline in the probe; raise timeouts\.reward_training_s"):
        train_member(build_settings(tmp_path), [load_head_data(data_folder, "safety")], 0, 0.0)
