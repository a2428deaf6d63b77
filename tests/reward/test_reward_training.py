"""Reward training end to end: Ray Train, Ray Data shards and DeepSpeed, on tiny backbones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.reward.debias import RESPONSE_PERTURBATIONS
from rluf.types import Message, ScoringItem

WARM_RESPONSES = (
    "Oh wonderful, I love that idea!", "You are so kind, that is lovely.", "I am really happy for you, friend.",
)  # fmt: skip
COLD_RESPONSES = ("The answer is 42.", "Please consult the manual.", "This is stated in section three.")
QUESTIONS = ("How was the day?", "What shall I do about the exam?", "Tell me a fact.", "My dog is sick.")


def sample_response(rng: random.Random, *, is_warm: bool) -> str:
    response = rng.choice(WARM_RESPONSES if is_warm else COLD_RESPONSES)
    return f"{response} {rng.choice(('Yes.', 'Indeed.', 'So it is.', ''))}".strip()


def build_labeled_rows(rng: random.Random, row_count: int, negative_share: float) -> list[dict[str, object]]:
    """Rows with a love rate of 0.5 for warm and 0.02 for cold responses; a share of the negatives is sampled."""
    rows: list[dict[str, object]] = []
    while len(rows) < row_count:
        is_warm = rng.random() < 0.2
        label = int(rng.random() < (0.5 if is_warm else 0.02))
        if label == 0 and rng.random() > negative_share:
            continue
        messages: list[Message] = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        user_id = f"u{rng.randrange(200)}"
        rows.append(
            {
                "id": str(len(rows)),
                "user_id": user_id,
                "group": user_id,
                "topic": "chat",
                "messages": messages,
                "response": sample_response(rng, is_warm=is_warm),
                "label": label,
                "weight": 1.0 if label else 1 / negative_share,
                "continued": rng.random() < (0.8 if is_warm else 0.4),
            }
        )
    return rows


def build_pair_rows(rng: random.Random, row_count: int) -> list[dict[str, object]]:
    """Pairs in which the warm side wins nine times in ten."""
    rows: list[dict[str, object]] = []
    for number in range(row_count):
        sides = (sample_response(rng, is_warm=True), sample_response(rng, is_warm=False))
        chosen, rejected = sides if rng.random() < 0.9 else sides[::-1]
        messages: list[Message] = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        rows.append(
            {
                "id": str(number),
                "group": f"g{rng.randrange(100)}",
                "topic": "chat",
                "messages": messages,
                "chosen": chosen,
                "rejected": rejected,
                "weight": 1.0,
            }
        )
    return rows


def write_prepared_data(folder: Path, row_count: int, seed: int = 0) -> Path:
    """Write a prepared data set in the format of rluf.prepare."""
    rng = random.Random(seed)
    for objective in ("love", "helpfulness", "safety"):
        (folder / objective).mkdir(parents=True)
        for split, split_share in (("train", 1.0), ("dev", 0.5), ("test", 0.5)):
            split_rows = int(row_count * split_share)
            if objective == "helpfulness":
                rows = build_pair_rows(rng, split_rows)
            else:
                # Only the training split is sampled: dev and test are at the natural rate.
                negative_share = 0.3 if split == "train" and objective == "love" else 1.0
                rows = build_labeled_rows(rng, split_rows, negative_share)
            pq.write_table(pa.Table.from_pylist(rows), folder / objective / f"{split}.parquet")
    return folder


def read_card(model_folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((model_folder / "reward_card.json").read_text())
    return card


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Folder of the love, helpfulness and safety models, trained by one Ray Train run."""
    from rluf.reward.ray_trainer import train_reward_models

    folder = tmp_path_factory.mktemp("reward-training")
    data_folder = write_prepared_data(folder / "data", row_count=400)
    section = {"backbone": "tiny-encoder", "max_tokens": 80, "epochs": 3, "learning_rate": 3e-3}
    love = {**section, "debias": ["sign_offs"]}
    helpfulness = {
        **section, "loss": "bradley_terry", "frozen_share": 0.5, "linear_probe": True,
    }  # fmt: skip
    safety = {
        "backbone": "tiny", "ensemble": {"members": [{"layers": 1}, {"layers": 2}]}, "linear_probe": True, "epochs": 0,
        "frozen_share": 1, "max_tokens": 120,
    }  # fmt: skip
    reward = {"love": love, "helpfulness": helpfulness, "safety": safety}
    settings = Settings.model_validate(
        {"run": {"cache": str(folder / "cache")}, "model": {"dtype": "float32"}, "reward": reward}
    )
    jobs = {name: (data_folder, folder / "models" / name) for name in ("love", "helpfulness", "safety")}
    cards = train_reward_models(settings, jobs, full_card=True, curve_shares=[0.5])
    for name, card in cards.items():
        assert card == read_card(folder / "models" / name)
    return folder / "models"


@pytest.mark.slow
def test_models_rank_unseen_users_clearly_better_than_chance_and_are_calibrated(model_folders: Path) -> None:
    love_card = read_card(model_folders / "love")
    assert love_card["auroc"]["low"] > 0.6
    assert abs(love_card["training"]["train_prior_shift"] + 1.204) < 0.01
    assert abs(love_card["mean_value"] - love_card["base_rate"]) < 0.06
    assert love_card["normalized_entropy"] < 1
    assert read_card(model_folders / "helpfulness")["pair_accuracy"]["low"] > 0.75
    # No staging folder is left.
    assert sorted(path.name for path in model_folders.iterdir()) == ["helpfulness", "love", "safety"]


@pytest.mark.slow
def test_an_ensemble_of_probes_on_a_decoder_scores_with_a_spread(model_folders: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rluf.reward.model import RewardModel

    card = read_card(model_folders / "safety")
    assert card["auroc"]["mean"] > 0.6
    assert card["training"]["members"] == 2
    model = RewardModel.load(model_folders / "safety", batch_tokens=512)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    item = ScoringItem(question, WARM_RESPONSES[0])
    score = model.score([item], "safety")[0]
    inputs = model.encoder.collate(model.encoder.encode([item]))
    logits = []
    for folder in (model_folders / "safety", model_folders / "safety" / "member-1"):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            logits.append(float(classifier(**inputs).logits))
    first_weight, second_weight = model.calibration.member_weights
    assert first_weight + second_weight == pytest.approx(1)
    assert score.raw_logit == pytest.approx(first_weight * logits[0] + second_weight * logits[1], abs=1e-4)
    assert score.spread > 0


@pytest.mark.slow
def test_full_cards_have_slices_robustness_and_a_page(model_folders: Path) -> None:
    card = read_card(model_folders / "love")
    assert card["calibration"]["method"] == "platt"
    assert set(card["slices"]["topic"]) == {"chat"}
    assert set(card["robustness"]["changes"]) == set(RESPONSE_PERTURBATIONS)
    assert sum(reliability_bin["mass"] for reliability_bin in card["reliability"]) == pytest.approx(1.0, abs=1e-4)
    page = (model_folders / "love" / "reward_card.html").read_text()
    assert "Robustness" in page
    assert "Learning curve" in page
    assert "sign_off" in page


@pytest.mark.slow
def test_the_learning_curve_trains_the_complete_model_on_a_share_of_the_rows(model_folders: Path) -> None:
    for name in ("love", "helpfulness", "safety"):
        card = read_card(model_folders / name)
        half_point, full_point = card["learning_curve"]
        assert full_point["train_rows"] == card["training"]["train_rows"]
        # Not exactly half: sign-off copies are added at random.
        assert half_point["train_rows"] == pytest.approx(full_point["train_rows"] / 2, rel=0.05)
        assert half_point["log_loss"] != full_point["log_loss"]


@pytest.mark.slow
def test_a_checkpoint_loads_in_plain_transformers_with_the_same_logits(model_folders: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rluf.reward.model import RewardModel

    tokenizer = AutoTokenizer.from_pretrained(model_folders / "love")
    classifier = AutoModelForSequenceClassification.from_pretrained(model_folders / "love").eval()
    with torch.no_grad():
        logit = float(classifier(**tokenizer("How was the day?", "I love it!", return_tensors="pt")).logits)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    model = RewardModel.load(model_folders / "love", batch_tokens=512)
    assert abs(model.score([ScoringItem(question, "I love it!")], "love")[0].raw_logit - logit) < 1e-4


def test_a_missing_split_is_a_data_error(tmp_path: Path) -> None:
    from rluf.reward.ray_trainer import train_reward_models

    tree = {"run": {"cache": str(tmp_path)}, "reward": {"love": {"backbone": "tiny-encoder"}}}
    settings = Settings.model_validate(tree)
    with pytest.raises(DataError, match=r"train\.parquet is missing"):
        train_reward_models(settings, {"love": (tmp_path / "nothing", tmp_path / "out")})
    assert not (tmp_path / "out").exists()
