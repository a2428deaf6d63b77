"""Scoring: a response scores the same alone and in a batch, for encoders and decoders, empty responses included."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.backbone import build_text_encoder, enable_fast_cpu_matmul, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.encoded_split import encode_split
from rluf.reward.model import RewardModel
from rluf.reward.trainer import HeadTask, RewardModelTrainer, TrainPlan
from rluf.types import ScoringItem
from rluf.utils.stats import sigmoid


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def write_checkpoint(name: str, cache: Path, folder: Path, calibration: Calibration) -> Path:
    """Write an untrained reward model whose random head spreads its scores."""
    backbone = resolve_model(name, cache)
    model = load_classifier(backbone, require_all_weights=False, seed=3)
    encoder = build_text_encoder(model, backbone, 96)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(("classifier", "score")):
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder))
    encoder.tokenizer.save_pretrained(str(folder))
    calibration.save(folder)
    return folder


def build_items(count: int) -> list[ScoringItem]:
    """Items of random words; the response of item i has i words."""
    rng = random.Random(0)
    words = ["warm", "kind", "cold", "plain", "answer", "question", "please", "thanks", "tomorrow"]
    items = []
    for response_length in range(count):
        question = " ".join(rng.choices(words, k=rng.randrange(1, 12)))
        response = " ".join(rng.choices(words, k=response_length))
        items.append(ScoringItem([{"role": "user", "content": question}], response))
    return items


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny", "minilm"])
def test_a_batch_of_one_equals_a_batch_of_many(name: str, cache: Path, tmp_path: Path) -> None:
    enable_fast_cpu_matmul()
    path = write_checkpoint(name, cache, tmp_path / name, Calibration(objective="love", max_tokens=96))
    model, items = RewardModel.load(path, batch_tokens=700), build_items(20)
    batch_scores = model.score(items, "love")
    for item, batch_score in zip(items, batch_scores, strict=True):
        single_score = model.score([item], "love")[0]
        assert abs(single_score.raw_logit - batch_score.raw_logit) < 1e-4
        assert abs(single_score.value - batch_score.value) < 1e-4
    assert len({round(score.raw_logit, 3) for score in batch_scores}) > 10


ENDS_IN_EOS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)
PLAIN_TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
TOKENIZERS = {
    "no pad token, template ends in eos (Llama 3, Mistral)": ({"pad_token": None}, ENDS_IN_EOS),
    "pad is eos, template ends in eos": ({"pad_token": "<|im_end|>"}, ENDS_IN_EOS),
    "pad is eos, no unknown token": ({"pad_token": "<|im_end|>", "unk_token": None}, ENDS_IN_EOS),
    "no pad, unknown or begin token": ({"pad_token": None, "unk_token": None, "bos_token": None}, ENDS_IN_EOS),
    "own pad token": ({"pad_token": "<|endoftext|>"}, ENDS_IN_EOS),
    "pad is the end of turn but not eos": ({"pad_token": "<|im_end|>", "eos_token": "<|endoftext|>"}, ENDS_IN_EOS),
    "turns end in a newline": ({"pad_token": None}, PLAIN_TURNS),
    "unchanged": ({}, None),
    "one token for begin, end and pad (GPT-2, Pythia)": (
        {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
        ENDS_IN_EOS.replace("<|im_end|>", "<|endoftext|>"),
    ),
    "padded on the left": ({"pad_token": "<|im_end|>", "padding_side": "left"}, ENDS_IN_EOS),
    "pad is a letter": ({"pad_token": "e"}, PLAIN_TURNS),
    "turns end in eos twice": ({"pad_token": "<|im_end|>"}, ENDS_IN_EOS.replace("<|im_end|>", "<|im_end|><|im_end|>")),
    "turns end in eos and a space": ({"pad_token": None}, ENDS_IN_EOS.replace("<|im_end|>", "<|im_end|> ")),
    "pad is the begin token (Phi 3)": ({"pad_token": "<|im_start|>", "bos_token": "<|im_start|>"}, ENDS_IN_EOS),
    "pad is the newline that ends turns": ({"pad_token": "Ċ"}, PLAIN_TURNS),
    "no special tokens at all": (
        dict.fromkeys(("pad_token", "unk_token", "bos_token", "eos_token")),
        PLAIN_TURNS,
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("mark_truncated", [False, True])
def test_training_calibration_scoring_and_plain_transformers_pool_at_the_same_token(
    case: str, mark_truncated: bool, cache: Path, tmp_path: Path
) -> None:
    changes, template = TOKENIZERS[case]
    folder = tmp_path / "backbone"
    shutil.copytree(resolve_model("tiny", cache), folder)
    tokenizer = load_tokenizer(folder)
    for name, token in changes.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template or tokenizer.chat_template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder))

    calibration = Calibration(max_tokens=64, mark_truncated=mark_truncated)
    saved = write_checkpoint(str(folder), cache, tmp_path / "saved", calibration)
    model = load_classifier(saved, require_all_weights=True)
    encoder = build_text_encoder(model, saved, 64, mark_truncated=mark_truncated)
    items = [item._replace(is_truncated=index % 2 == 0) for index, item in enumerate(build_items(6))]
    items[1] = items[1]._replace(response="")
    items[2] = items[2]._replace(response="see eee<|im_end|><|endoftext|>\n\n")
    records = [
        {"messages": item.messages, "response": item.response, "label": index % 2, "weight": 1.0, "user_id": str(index),
         "finish_reason": "length" if item.is_truncated else "stop"}
        for index, item in enumerate(items)
    ]  # fmt: skip
    split = encode_split(records, encoder, is_pairwise=False, source_name="test")
    trainer = RewardModelTrainer(model.eval(), encoder, TrainPlan(epochs=1, batch_rows=4, batch_tokens=4096, seed=0))
    trained = trainer._compute_logits(model, split, range(6), None)[:, 0].tolist()
    calibrated = trainer._compute_dev_logits(model, HeadTask("love", split, split))  # type: ignore[arg-type]
    probed = trainer.compute_features(split)[0] @ model.score.weight.detach().double().numpy()[0]
    scored = RewardModel.load(saved, batch_tokens=4096).compute_raw_logits(split.sequences)

    plain_model = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    plain_tokenizer = AutoTokenizer.from_pretrained(saved)
    assert plain_model.config.pad_token_id == plain_tokenizer.pad_token_id == encoder.pad_id
    texts = [plain_tokenizer.decode(row.token_ids) for row in split.sequences]
    inputs = plain_tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    plain = plain_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()
    # vLLM pools at the last token of a row, which has no padding there.
    alone = [
        model.score(model.model(torch.tensor([row.token_ids])).last_hidden_state[0, -1])[0].item()
        for row in split.sequences
    ]
    for logits in (calibrated, probed, scored, plain, alone):
        assert list(logits) == pytest.approx(trained, abs=1e-4)


def test_values_are_calibrated_and_raw_logits_are_not(cache: Path, tmp_path: Path) -> None:
    calibration = Calibration("love", "platt", prior_shift=-2.0, scale=0.5, offset=0.25, max_tokens=64)
    path = write_checkpoint("tiny-encoder", cache, tmp_path / "m", calibration)
    model = RewardModel.load(path, batch_tokens=512)
    assert model.encoder.max_tokens == 64
    for score in model.score(build_items(5), "love"):
        assert score.objective == "love"
        assert score.value == pytest.approx(float(sigmoid(0.5 * (score.raw_logit - 2.0) + 0.25)))
    assert model.score([], "love") == []


def test_invalid_folders_are_model_errors_that_name_the_cause(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        RewardModel.load(tmp_path / "nowhere", batch_tokens=512)
    damaged = write_checkpoint("tiny-encoder", cache, tmp_path / "damaged", Calibration())
    (damaged / "calibration.json").unlink()
    (damaged / "reward_card.json").write_text("{}")
    with pytest.raises(ModelError, match=r"calibration\.json"):
        RewardModel.load(damaged, batch_tokens=512)
    with pytest.raises(ModelError, match="lacks the weights classifier"):
        RewardModel.load(resolve_model("tiny-encoder", cache), batch_tokens=512)
    path = write_checkpoint("tiny-encoder", cache, tmp_path / "m", Calibration(max_tokens=64))
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="does not contain a sequence classification model"):
        RewardModel.load(path, batch_tokens=512)


def test_a_backbone_is_not_accepted_as_a_reward_model(cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_model("tiny-encoder", cache), tmp_path / "backbone")
    Calibration(max_tokens=64).save(folder)
    with pytest.raises(ModelError, match="classifier"):
        RewardModel.load(folder, batch_tokens=512)
