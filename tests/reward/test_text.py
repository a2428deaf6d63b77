"""Encoding of conversations as token ids, for encoders and decoders; batching."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.text import (
    MAX_PADDING_SHARE,
    MIN_FILL_SHARE,
    EncodedItem,
    TextEncoder,
    find_carrier_rows,
    fit_token_budget,
    plan_token_batches,
    render_context,
    summarize_truncation,
)
from rluf.types import Message, ScoringItem


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build_encoder(name: str, cache: Path, max_tokens: int = 64) -> TextEncoder:
    return TextEncoder(load_tokenizer(resolve_model(name, cache)), max_tokens)


def user_turn(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_a_single_question_is_encoded_as_the_tokenizers_own_pair(cache: Path) -> None:
    encoder = build_encoder("minilm", cache)
    row = encoder.encode([ScoringItem(user_turn("How are you?"), "I am well, thanks.")])[0]
    reference = encoder.tokenizer("How are you?", "I am well, thanks.")
    assert list(row.token_ids) == reference["input_ids"]
    assert encoder.collate([row])["token_type_ids"][0].tolist() == reference["token_type_ids"]


def test_the_context_contains_roles_and_no_system_messages() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert render_context(messages) == "user: Hi\nassistant: Hello\nBye"
    assert render_context([]) == ""


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny"])
def test_no_row_exceeds_the_limit_and_truncation_preserves_the_end(cache: Path, name: str) -> None:
    encoder = build_encoder(name, cache, max_tokens=512)

    @settings(max_examples=40)
    @given(st.text(max_size=200), st.text(max_size=200), st.integers(8, 64))
    def check_truncation(context: str, response: str, max_tokens: int) -> None:
        items = [ScoringItem(user_turn(context), response)]
        full_row = encoder.encode(items)[0]
        truncated_row = TextEncoder(encoder.tokenizer, max_tokens).encode(items)[0]
        assert len(truncated_row) <= max_tokens
        assert truncated_row.token_ids[-3:] == full_row.token_ids[-3:]
        dropped = truncated_row.dropped_prompt_tokens + truncated_row.dropped_response_tokens
        assert len(truncated_row) + dropped == len(full_row)

    check_truncation()


def test_truncation_removes_the_oldest_context_first(cache: Path) -> None:
    encoder = build_encoder("tiny-encoder", cache, max_tokens=23)
    row = encoder.encode([ScoringItem(user_turn("0123456789" * 9), "ten signs.")])[0]
    text = encoder.tokenizer.decode(row.token_ids, skip_special_tokens=False).replace(" ", "")
    assert text == "[CLS]0123456789[SEP]tensigns.[SEP]"


@pytest.mark.parametrize(
    ("prompt_count", "response_count", "budget", "prompt_part", "response_part"),
    [
        (3, 4, 7, [0, 1, 2], [10, 11, 12, 13]),  # everything fits
        (9, 4, 7, [6, 7, 8], [10, 11, 12, 13]),  # the prompt loses its start, the response nothing
        (9, 20, 8, [7, 8], [10, 11, 12, 27, 28, 29]),  # the prompt keeps a quarter, the response loses its middle
        (1, 20, 8, [0], [10, 11, 12, 26, 27, 28, 29]),  # a prompt below a quarter stays whole
        (0, 3, 2, [], [10, 12]),
        (5, 0, 2, [3, 4], []),
        (5, 5, 0, [], []),
    ],
)
def test_a_row_that_is_too_long_keeps_parts_of_prompt_and_response(
    prompt_count: int, response_count: int, budget: int, prompt_part: list[int], response_part: list[int]
) -> None:
    prompt_ids, response_ids = list(range(prompt_count)), list(range(10, 10 + response_count))
    assert fit_token_budget(prompt_ids, response_ids, budget) == (prompt_part, response_part)


@pytest.mark.parametrize(
    ("prompt_count", "response_count", "dropped_count"),
    [(8, 8, 0), (9, 8, 4), (12, 8, 4), (13, 8, 8), (9, 12, 5), (4, 20, 0), (3, 13, 0), (40, 1, 28)],
)
def test_the_prompt_loses_whole_blocks_unless_it_needs_the_rest(
    prompt_count: int, response_count: int, dropped_count: int
) -> None:
    prompt_part, response_part = fit_token_budget(
        list(range(prompt_count)), list(range(100, 100 + response_count)), 16, block_tokens=4
    )
    assert prompt_part == list(range(prompt_count))[dropped_count:]
    assert len(prompt_part) + len(response_part) <= 16


def test_the_messages_of_a_long_conversation_share_passes(cache: Path) -> None:
    encoder = build_encoder("tiny", cache, max_tokens=800)
    turns = [f"message number {number}" for number in range(60)]
    chat: list[Message] = [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(turns)
    ]
    rows = encoder.encode([ScoringItem(chat[:number], turns[number]) for number in range(1, 60, 2)])
    cut_count = sum(row.dropped_prompt_tokens > 0 for row in rows)
    assert cut_count > 10
    assert max(map(len, rows)) <= 800
    assert len(set(find_carrier_rows(rows, is_causal=True))) <= cut_count // 2


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny"])
def test_the_prompt_is_read_in_front_of_a_response_longer_than_the_limit(cache: Path, name: str) -> None:
    encoder = build_encoder(name, cache, max_tokens=96)
    rows = encoder.encode([ScoringItem(user_turn(f"Tell me about {word}"), "word " * 200) for word in ("cats", "rain")])
    assert rows[0] != rows[1]
    assert [len(row) for row in rows] == [96, 96]
    texts = [encoder.tokenizer.decode(row.token_ids).replace(" ", "") for row in rows]
    assert ["cats" in texts[0], "rain" in texts[1]] == [True, True]
    summary = summarize_truncation([*rows, *encoder.encode([ScoringItem(user_turn("Hi"), "Yes.")])])
    assert (summary["cut_share"], summary["response_cut_share"]) == (2 / 3, 2 / 3)


@pytest.mark.parametrize("read_at_next_turn", [False, True])
def test_a_cut_response_is_not_followed_by_the_end_of_turn(cache: Path, read_at_next_turn: bool) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", cache))
    encoder = TextEncoder(tokenizer, 200, mark_truncated=True, read_at_next_turn=read_at_next_turn)
    finished, cut = (ScoringItem(user_turn("Hi"), "Hello, my", is_truncated) for is_truncated in (False, True))
    finished_text, cut_text = (tokenizer.decode(row.token_ids) for row in encoder.encode([finished, cut]))
    header = "<|im_start|>user\n" if read_at_next_turn else ""
    assert finished_text.endswith(f"assistant\nHello, my<|im_end|>\n{header}")
    assert cut_text.endswith(f"assistant\nHello, my{header}")
    unmarked = TextEncoder(tokenizer, 200, read_at_next_turn=read_at_next_turn)
    assert unmarked.encode([cut]) == unmarked.encode([finished]) == encoder.encode([finished])
    assert not unmarked.is_equivalent_to(encoder)


@pytest.mark.parametrize("options", [{}, {"read_at_next_turn": True}, {"response_only": True}])
@pytest.mark.parametrize("is_truncated", [False, True])
@pytest.mark.parametrize(
    ("response", "located"),
    [("Hello, my friend", "Hello, my friend"), ("", ""), ("Hi <|im_start|>user", "Hi user"), ("w " * 90, None)],
)
def test_the_tokens_of_a_response_are_located(
    cache: Path, options: dict[str, bool], is_truncated: bool, response: str, located: str | None
) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", cache))
    encoder = TextEncoder(tokenizer, 80, mark_truncated=True, locate_responses=True, **options)
    row = encoder.encode(
        [ScoringItem(user_turn("Hello, my dear " * (4 if located is None else 1)), response, is_truncated)]
    )[0]
    start, end = row.response_span
    text, prompt = tokenizer.decode(row.token_ids[start:end]), tokenizer.decode(row.token_ids[:start])
    assert prompt.endswith("assistant\n")
    assert text == located or (located is None and set(text) == {"w", " "} and end - start > 30)
    suffix = tokenizer.decode(row.token_ids[end:])
    header = "<|im_start|>user\n" if "read_at_next_turn" in options else ""
    assert suffix == header if is_truncated else suffix.startswith("<|im_end|>") and suffix.endswith(header)
    plain = TextEncoder(tokenizer, 80, mark_truncated=True, **options)
    assert plain.is_equivalent_to(encoder)


def test_an_encoder_reads_no_separator_after_a_cut_response(cache: Path) -> None:
    encoder = TextEncoder(load_tokenizer(resolve_model("minilm", cache)), 64, mark_truncated=True)
    finished, cut = encoder.encode([ScoringItem(user_turn("Hi"), "Hello, my", flag) for flag in (False, True)])
    assert finished.token_ids == (*cut.token_ids, encoder.tokenizer.sep_token_id)
    assert cut.response_start == finished.response_start == 3


def test_empty_responses_have_no_tokens_of_their_own(cache: Path) -> None:
    pair_row = build_encoder("tiny-encoder", cache).encode([ScoringItem(user_turn("Hi"), "")])[0]
    assert len(pair_row) == 5
    chat_encoder = build_encoder("tiny", cache)
    text = chat_encoder.tokenizer.decode(chat_encoder.encode([ScoringItem(user_turn("Hi"), "")])[0].token_ids)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>\n")


def test_padding_is_masked_by_length_even_if_the_pad_token_is_the_end_token(cache: Path) -> None:
    encoder = build_encoder("tiny", cache)
    rows = encoder.encode([ScoringItem(user_turn("Hi"), "Hello, my friend."), ScoringItem(user_turn("Hi"), "")])
    batch = encoder.collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert "token_type_ids" not in batch


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 500))
def test_token_batches_contain_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        max_length, real_tokens = max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert len(batch) == 1 or max_length * len(batch) <= budget
        padding_share = 1 - real_tokens / (max_length * len(batch))
        is_small = max_length * (len(batch) - 1) < MIN_FILL_SHARE * budget
        assert padding_share <= MAX_PADDING_SHARE + 1e-9 or is_small


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_row_is_carried_by_an_extension_only_if_the_model_is_causal(token_ids: list[list[int]]) -> None:
    rows = [EncodedItem(tuple(ids), 0) for ids in token_ids]
    carriers = find_carrier_rows(rows, is_causal=True)
    for row_index, carrier in enumerate(carriers):
        row = rows[row_index]
        assert rows[carrier].token_ids[: len(row)] == row.token_ids
        assert carriers[carrier] == carrier
        has_extension = any(other.token_ids[: len(row)] == row.token_ids and other != row for other in rows)
        assert not (carrier == row_index and has_extension)
    bidirectional_carriers = find_carrier_rows(rows, is_causal=False)
    assert all(rows[carrier] == row for row, carrier in zip(rows, bidirectional_carriers, strict=True))
    assert len(set(bidirectional_carriers)) == len(set(rows))


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_a_response_only_encoding_does_not_depend_on_the_conversation(cache: Path, name: str) -> None:
    tokenizer = load_tokenizer(resolve_model(name, cache))
    response_encoder, encoder = (TextEncoder(tokenizer, 200, response_only=flag) for flag in (True, False))
    first: list[Message] = [{"role": "user", "content": "Hi"}]
    second: list[Message] = [*first, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    empty: list[Message] = [{"role": "user", "content": ""}]
    rows = response_encoder.encode(
        [ScoringItem(first, "Hello"), ScoringItem(second, "Hello"), ScoringItem(second, "Bye")]
    )
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == encoder.encode([ScoringItem(empty, "Hello")])[0]
    assert not response_encoder.is_equivalent_to(encoder)


def test_reading_at_the_next_turn_appends_the_header_of_the_users_message(cache: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", cache))
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    row = TextEncoder(tokenizer, 200).encode([ScoringItem(messages, "Hello")])[0]
    next_turn_row = TextEncoder(tokenizer, 200, read_at_next_turn=True).encode([ScoringItem(messages, "Hello")])[0]
    assert next_turn_row.token_ids[: len(row)] == row.token_ids
    assert tokenizer.decode(next_turn_row.token_ids[len(row) :]) == "<|im_start|>user\n"
    with pytest.raises(ModelError, match="read_at_next_turn=false"):
        TextEncoder(load_tokenizer(resolve_model("tiny-encoder", cache)), 200, read_at_next_turn=True)
