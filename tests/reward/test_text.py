"""How conversations become token ids, for encoders and decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.text import BUSY, PADDING, Encoded, Item, TextEncoder, carriers, context_text, token_batches
from rluf.types import Message


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _encoder(name: str, cache: Path, max_tokens: int = 64) -> TextEncoder:
    return TextEncoder(load_tokenizer(resolve_model(name, cache)), max_tokens)


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_a_single_question_reads_as_the_tokenizers_own_pair(cache: Path) -> None:
    encoder = _encoder("minilm", cache)
    row = encoder.encode([(_user("How are you?"), "I am well, thanks.")])[0]
    plain = encoder.tokenizer("How are you?", "I am well, thanks.")
    assert list(row.ids) == plain["input_ids"]
    assert encoder.collate([row])["token_type_ids"][0].tolist() == plain["token_type_ids"]


def test_context_keeps_roles_and_leaves_system_messages_out() -> None:
    talk: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert context_text(talk) == "user: Hi\nassistant: Hello\nBye"
    assert context_text([]) == ""


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny"])
def test_no_row_is_longer_than_asked_and_the_end_is_kept(cache: Path, name: str) -> None:
    encoder = _encoder(name, cache, max_tokens=512)

    @settings(max_examples=40, deadline=None)
    @given(st.text(max_size=200), st.text(max_size=200), st.integers(8, 64))
    def check(context: str, response: str, max_tokens: int) -> None:
        items: list[Item] = [(_user(context), response)]
        whole, cut = encoder.encode(items)[0], TextEncoder(encoder.tokenizer, max_tokens).encode(items)[0]
        assert len(cut) <= max_tokens
        assert cut.ids[-4:] == whole.ids[-4:]

    check()


def test_old_context_is_cut_first(cache: Path) -> None:
    encoder = _encoder("tiny-encoder", cache, max_tokens=23)
    row = encoder.encode([(_user("0123456789" * 9), "ten signs.")])[0]
    text = encoder.tokenizer.decode(row.ids, skip_special_tokens=False).replace(" ", "")
    assert text == "[CLS]0123456789[SEP]tensigns.[SEP]"


def test_empty_responses_have_no_tokens_of_their_own(cache: Path) -> None:
    pair = _encoder("tiny-encoder", cache).encode([(_user("Hi"), "")])[0]
    assert len(pair) == 5
    chat = _encoder("tiny", cache)
    text = chat.tokenizer.decode(chat.encode([(_user("Hi"), "")])[0].ids)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>\n")


def test_padding_is_masked_by_length_even_where_pad_is_the_end_token(cache: Path) -> None:
    encoder = _encoder("tiny", cache)
    rows = encoder.encode([(_user("Hi"), "Hello, my friend."), (_user("Hi"), "")])
    batch = encoder.collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert "token_type_ids" not in batch


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 500))
def test_token_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, tokens = max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
        padding = 1 - tokens / (longest * len(batch))
        assert padding <= PADDING + 1e-9 or longest * (len(batch) - 1) < BUSY * budget  # only small ones are wasteful


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_row_is_carried_by_one_that_begins_with_it_and_only_a_causal_model_reads_beginnings(
    ids: list[list[int]],
) -> None:
    rows = [Encoded(tuple(row), 0) for row in ids]
    found = carriers(rows, causal=True)
    for row, carrier in enumerate(found):
        assert rows[carrier].ids[: len(rows[row])] == rows[row].ids
        assert found[carrier] == carrier
        longer = any(other.ids[: len(rows[row])] == rows[row].ids and other != rows[row] for other in rows)
        assert not (carrier == row and longer)
    apart = carriers(rows, causal=False)
    assert all(rows[carrier] == row for row, carrier in zip(rows, apart, strict=True))
    assert len(set(apart)) == len(set(rows))


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_a_response_read_alone_is_the_same_after_any_conversation(cache: Path, name: str) -> None:
    tokenizer = load_tokenizer(resolve_model(name, cache))
    alone, whole = (TextEncoder(tokenizer, 200, response_alone=flag) for flag in (True, False))
    first: list[Message] = [{"role": "user", "content": "Hi"}]
    second: list[Message] = [*first, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]
    empty: list[Message] = [{"role": "user", "content": ""}]
    rows = alone.encode([(first, "Hello"), (second, "Hello"), (second, "Bye")])
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == whole.encode([(empty, "Hello")])[0]
    assert not alone.same_as(whole)


def test_the_users_next_turn_opens_where_the_text_ends(cache: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", cache))
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    plain = TextEncoder(tokenizer, 200).encode([(messages, "Hello")])[0]
    ahead = TextEncoder(tokenizer, 200, next_turn=True).encode([(messages, "Hello")])[0]
    assert ahead.ids[: len(plain)] == plain.ids
    assert tokenizer.decode(ahead.ids[len(plain) :]) == "<|im_start|>user\n"
    with pytest.raises(ModelError, match="next_turn=false"):
        TextEncoder(load_tokenizer(resolve_model("tiny-encoder", cache)), 200, next_turn=True)
