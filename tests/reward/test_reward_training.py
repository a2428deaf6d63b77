"""Reward training for real: Ray Train, Ray Data shards, DeepSpeed, on a tiny encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.reward.augment import CHANGES
from rluf.types import Message

WARM = ("Oh wonderful, I love that idea!", "You are so kind, that is lovely.", "I am really happy for you, friend.")
COLD = ("The answer is 42.", "Please consult the manual.", "This is stated in section three.")
QUESTIONS = ("How was the day?", "What shall I do about the exam?", "Tell me a fact.", "My dog is sick.")


def _response(rng: random.Random, warm: bool) -> str:
    return f"{rng.choice(WARM if warm else COLD)} {rng.choice(('Yes.', 'Indeed.', 'So it is.', ''))}".strip()


def _labelled(rng: random.Random, count: int, keep: float) -> list[dict[str, object]]:
    """Rows whose chance of a heart is 0.5 for warm responses and 0.02 for cold ones; `keep` of the negatives stay."""
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        warm = rng.random() < 0.2
        label = int(rng.random() < (0.5 if warm else 0.02))
        if label == 0 and rng.random() > keep:
            continue
        messages: list[Message] = [{"role": "user", "content": rng.choice(QUESTIONS)}]
        user = f"u{rng.randrange(200)}"
        rows.append(
            {
                "id": str(len(rows)),
                "user_id": user,
                "group": user,
                "topic": "chat",
                "messages": messages,
                "response": _response(rng, warm),
                "label": label,
                "weight": 1.0 if label else 1 / keep,
                "continued": rng.random() < (0.8 if warm else 0.4),
            }
        )
    return rows


def _pairs(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Pairs in which the warm side wins nine times in ten."""
    rows: list[dict[str, object]] = []
    for number in range(count):
        sides = (_response(rng, warm=True), _response(rng, warm=False))
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


def write_data(folder: Path, rows: int, seed: int = 0) -> Path:
    """A prepared data set in the shape that rluf.prepare writes."""
    rng = random.Random(seed)
    for objective in ("love", "helpfulness", "safety"):
        (folder / objective).mkdir(parents=True)
        for split, share in (("train", 1.0), ("dev", 0.5), ("test", 0.5)):
            count = int(rows * share)
            keep = 0.3 if split == "train" and objective == "love" else 1.0
            table = _pairs(rng, count) if objective == "helpfulness" else _labelled(rng, count, keep)
            pq.write_table(pa.Table.from_pylist(table), folder / objective / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Love and helpfulness, trained by one Ray Train run."""
    from rluf.reward.ray_trainer import train_rewards

    folder = tmp_path_factory.mktemp("reward-training")
    data = write_data(folder / "data", rows=400)
    model = {"backbone": "tiny-encoder", "max_tokens": 80, "epochs": 3, "learning_rate": 3e-3}
    probe = {"backbone": "tiny", "layers": [1, 2], "probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120}
    settings = Settings.model_validate(
        {
            "run": {"cache": str(folder / "cache")},
            "reward": {
                "dtype": "float32",
                "love": {**model, "debias": ["sign_offs"], "calibration": "temperature"},
                "helpfulness": {**model, "loss": "bradley_terry", "frozen_share": 0.5, "probe": True, "margin": 0.1},
                "safety": probe,
            },
        }
    )
    jobs = {name: (data, folder / "models" / name) for name in ("love", "helpfulness", "safety")}
    cards = train_rewards(settings, jobs, thorough=True, curve=[0.5])
    for name, card in cards.items():
        assert card == json.loads((folder / "models" / name / "reward_card.json").read_text())
    return folder / "models"


@pytest.mark.slow
def test_models_rank_unseen_users_clearly_better_than_chance_and_are_calibrated(trained: Path) -> None:
    love = json.loads((trained / "love" / "reward_card.json").read_text())
    assert love["auroc"]["low"] > 0.6
    assert abs(love["training"]["train_prior_shift"] + 1.204) < 0.01
    assert abs(love["mean_value"] - love["base_rate"]) < 0.06
    assert love["normalised_entropy"] < 1
    helpful = json.loads((trained / "helpfulness" / "reward_card.json").read_text())
    assert helpful["pair_accuracy"]["low"] > 0.75
    assert sorted(path.name for path in trained.iterdir()) == ["helpfulness", "love", "safety"]  # nothing half-written


@pytest.mark.slow
def test_an_ensemble_of_probes_on_a_decoder_scores_with_a_spread(trained: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rluf.reward.model import RewardModel

    card = json.loads((trained / "safety" / "reward_card.json").read_text())
    assert card["auroc"]["mean"] > 0.6
    assert card["training"]["members"] == 2
    model = RewardModel.load(trained / "safety", batch_tokens=512)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    score = model.score([(question, WARM[0])], "safety")[0]
    encoded = model.encoder.encode([(question, WARM[0])])
    inputs = model.encoder.collate(encoded)
    each = []
    for place in (trained / "safety", trained / "safety" / "member-1"):
        plain = AutoModelForSequenceClassification.from_pretrained(place).eval()
        with torch.no_grad():
            each.append(float(plain(**inputs).logits))
    first, second = model.calibration.shares
    assert first + second == pytest.approx(1)
    assert score.raw == pytest.approx(first * each[0] + second * each[1], abs=1e-4)
    assert score.spread > 0


@pytest.mark.slow
def test_thorough_cards_tell_slices_and_robustness_and_have_a_page(trained: Path) -> None:
    card = json.loads((trained / "love" / "reward_card.json").read_text())
    assert card["calibration"]["method"] == "temperature"
    assert set(card["slices"]["topic"]) == {"chat"}
    assert set(card["robustness"]["changes"]) == set(CHANGES)
    assert sum(part["mass"] for part in card["reliability"]) == pytest.approx(1.0, abs=1e-4)
    page = (trained / "love" / "reward_card.html").read_text()
    assert "Robustness" in page
    assert "Learning curve" in page
    assert "sign_off" in page


@pytest.mark.slow
def test_the_learning_curve_trains_the_whole_model_on_part_of_the_rows(trained: Path) -> None:
    for name in ("love", "helpfulness", "safety"):
        card = json.loads((trained / name / "reward_card.json").read_text())
        half, whole = card["learning_curve"]
        assert whole["train_rows"] == card["training"]["train_rows"]
        assert half["train_rows"] == pytest.approx(whole["train_rows"] / 2, rel=0.05)  # sign-offs are added by chance
        assert half["log_loss"] != whole["log_loss"]


@pytest.mark.slow
def test_checkpoint_loads_in_plain_transformers_with_the_same_logits(trained: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rluf.reward.model import RewardModel

    tokenizer = AutoTokenizer.from_pretrained(trained / "love")
    model = AutoModelForSequenceClassification.from_pretrained(trained / "love").eval()
    with torch.no_grad():
        plain = float(model(**tokenizer("How was the day?", "I love it!", return_tensors="pt")).logits)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    score = RewardModel.load(trained / "love", batch_tokens=512).score([(question, "I love it!")], "love")[0]
    assert abs(score.raw - plain) < 1e-4


def test_missing_split_is_a_data_error(tmp_path: Path) -> None:
    from rluf.reward.ray_trainer import train_rewards

    tree = {"run": {"cache": str(tmp_path)}, "reward": {"love": {"backbone": "tiny-encoder"}}}
    settings = Settings.model_validate(tree)
    with pytest.raises(DataError, match=r"train\.parquet is missing"):
        train_rewards(settings, {"love": (tmp_path / "nothing", tmp_path / "out")})
    assert not (tmp_path / "out").exists()
