"""What a model reads of long rows: pairs that become equal, the limit of tokens that follows from the rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.encoded_split import choose_token_limit, encode_split
from rluf.reward.losses import bradley_terry_loss
from rluf.reward.ray_trainer import resolve_token_limits
from rluf.reward.text import TextEncoder, list_length_warnings, summarize_truncation


@pytest.fixture(scope="module", params=["tiny-encoder", "tiny"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(resolve_model(request.param, tmp_path_factory.mktemp("cache")))


def build_pair(chosen: str, rejected: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me about cats."}]
    return {"messages": messages, "chosen": chosen, "rejected": rejected, "group": chosen, "weight": 2.0} | fields


def test_pairs_that_differ_only_in_what_is_cut_weigh_nothing(tokenizer: Any, caplog: Any) -> None:
    words = "a long answer about many things and more " * 40
    pairs = [
        build_pair("Yes.", "No."),
        build_pair(words + "alpha " + words, words + "omega " + words),
        build_pair("alpha " + words, "omega " + words),
        build_pair(words + "alpha", words + "omega"),
    ]
    encoder = TextEncoder(tokenizer, 64)
    with caplog.at_level(logging.WARNING):
        split = encode_split(pairs, encoder, is_pairwise=True, source_name="pairs.parquet")
    assert split.is_equal_pair.tolist() == [False, True, False, False]
    assert split.weights.tolist() == [2.0, 0.0, 2.0, 2.0]
    assert split.loss_weights[1] == 0 and (split.loss_weights[[0, 2, 3]] > 0).all()
    assert "left out 1 of 4 pairs" in caplog.text and "max_tokens=64" in caplog.text
    with pytest.raises(DataError, match="equal in all 1 pairs"):
        encode_split(pairs[1:2], encoder, is_pairwise=True, source_name="pairs.parquet")


def test_responses_that_differ_only_in_case_are_equal_to_an_uncased_model(tmp_path: Path) -> None:
    encoder = TextEncoder(load_tokenizer(resolve_model("minilm", tmp_path)), 64)
    pairs = [build_pair("Hello there", "hello THERE"), build_pair("Hello there", "hello you")]
    split = encode_split(pairs, encoder, is_pairwise=True, source_name="pairs.parquet")
    assert split.weights.tolist() == [0.0, 2.0]


def test_a_step_of_equal_pairs_has_no_loss_and_no_gradient() -> None:
    chosen = torch.tensor([0.5, 1.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2), torch.zeros(2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and chosen.grad is not None and chosen.grad.tolist() == [0.0, 0.0]


def test_labeled_rows_are_no_pairs(tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "response": "Yes", "label": 1, "weight": 1.0, "group": "a"}
    split = encode_split([row, row], TextEncoder(tokenizer, 64), is_pairwise=False, source_name="rows.parquet")
    assert not split.is_equal_pair.any() and split.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("long_share", "words", "expected"),
    [(0.0, 0, 96), (0.04, 3000, 96), (0.06, 3000, 512), (1.0, 20, None), (0.5, 24, None)],
)
def test_the_limit_follows_from_the_95th_percentile(
    tokenizer: Any, long_share: float, words: int, expected: int | None
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hi"}], "response": "word " * (words if i < 100 * long_share else 1)}
        for i in range(100)
    ]
    high_length, limit = choose_token_limit(rows, TextEncoder(tokenizer, 10**6))
    assert limit == (expected or min(max(-(-high_length // 16) * 16, 96), 512))
    encoded = TextEncoder(tokenizer, limit).encode([])
    assert encoded == [] and 96 <= limit <= 512 and limit % 16 == 0
    if expected is None:
        assert words <= high_length <= limit


def test_the_longer_response_of_a_pair_counts(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 10**6)
    lengths = [
        choose_token_limit([pair], encoder)[0]
        for pair in (build_pair("Yes", "word " * 90), build_pair("word " * 90, "Yes"), build_pair("Yes", "Yes"))
    ]
    assert lengths[0] == lengths[1] > lengths[2] + 80


def write_rows(folder: Path, name: str, words: int) -> None:
    folder.joinpath(name).mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}], "response": "word " * words, "label": i % 2}
        for i in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / name / "train.parquet")


def test_auto_becomes_a_number_of_each_model_and_a_number_stays(tmp_path: Path) -> None:
    for name, words in (("love", 300), ("safety", 2), ("helpfulness", 200)):
        write_rows(tmp_path, name, words)
    settings = Settings.model_validate(
        {
            "reward": {name: {"backbone": "tiny"} for name in ("love", "safety")}
            | {"helpfulness": {"max_tokens": 40, "loss": "bradley_terry"}}
        }
    )
    names = ("love", "safety", "helpfulness")
    resolved = resolve_token_limits(settings, [(name,) for name in names], dict.fromkeys(names, tmp_path))
    limits = [resolved.reward.by_objective[name].max_tokens for name in names]
    assert limits[1:] == [96, 40] and isinstance(limits[0], int) and 300 < limits[0] <= 512
    assert Settings.model_validate_json(resolved.model_dump_json()) == resolved
    shared = Settings.model_validate({"reward": {"shared_backbone_heads": ["continued", "safety"]}})
    resolved = resolve_token_limits(shared, [("continued", "safety")], dict.fromkeys(("continued", "safety"), tmp_path))
    assert resolved.reward.get_head_settings("continued").token_limit > 300
    assert set(resolved.reward.by_objective) == set(shared.reward.by_objective)


def test_cards_warn_from_a_tenth_of_cut_rows(tokenizer: Any) -> None:
    encoder = TextEncoder(tokenizer, 64)
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "response": "word " * (200 if i < 2 else 1), "label": i % 2}
        | {"weight": 1.0, "group": "a"}
        for i in range(20)
    ]
    split = encode_split(rows, encoder, is_pairwise=False, source_name="rows.parquet")
    truncation = summarize_truncation(split.sequences)
    assert truncation["cut_share"] == 0.1 and truncation["no_prompt_share"] == 0
    (warning,) = list_length_warnings({"train": truncation}, 64)
    assert warning == "10% of the train rows are longer than max_tokens=64 and are cut; raise it"
    assert list_length_warnings({"train": summarize_truncation(split.sequences[1:])}, 64) == []


def test_rows_without_a_prompt_are_reported_by_text_pairs(tmp_path: Path) -> None:
    encoder = TextEncoder(load_tokenizer(resolve_model("minilm", tmp_path)), 64)
    messages: list[Any] = [{"role": "system", "content": "You are kind."}]
    row = {"messages": messages, "response": "Yes", "label": 1, "weight": 1.0, "group": "a"}
    split = encode_split([row], encoder, is_pairwise=False, source_name="rows.parquet")
    truncation = summarize_truncation(split.sequences)
    assert truncation["no_prompt_share"] == 1
    assert any("without any prompt" in text for text in list_length_warnings({"test": truncation}, 64))
    assert np.isclose(summarize_truncation([])["no_prompt_share"], 0)
