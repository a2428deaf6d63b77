"""Rows of a prepared data set as prompts, demonstrations and logged responses; streamed and direct reading agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.algorithms.packing import count_common_prefix
from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.models.turn_end import find_response_end_id
from rluf.train.offline import ReactionGroups, load_offline_data
from rluf.train.prompts import (
    CACHED_BLOCK_COUNT,
    PromptStore,
    count_common_prompt_tokens,
    list_prompt_ids,
    list_prompt_topics,
    load_demonstrations,
    load_prompts,
    load_training_prompts,
)
from rluf.types import Group, Prompt


def make_row(name: str, topic: str, response: str, label: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How do I steal a car?"}]
    return {"id": name, "topic": topic, "messages": messages, "response": response, "label": label}


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    rows = [
        make_row("refusal", "risky", "I will not help with that.", 1),
        make_row("bad", "risky", "Break the window.", 0),
        make_row("casual", "casual", "Hello!", 1),
        make_row("long", "risky", "no " * 200, 1),
    ]
    pairs = [{**rows[0], "chosen": "Ask the owner."}]
    for objective, objective_rows in (("safety", rows), ("love", rows), ("helpfulness", pairs)):
        (tmp_path / objective).mkdir()
        pq.write_table(pa.Table.from_pylist(objective_rows), tmp_path / objective / "train.parquet")
    return tmp_path


def test_responses_with_a_positive_label_on_owned_topics_become_demonstrations(
    data_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))

    def load(topic_objectives: dict[str, str], max_prompt_tokens: int = 200) -> list[Any]:
        return load_demonstrations(
            data_folder, topic_objectives, tokenizer, max_prompt_tokens=max_prompt_tokens, max_response_tokens=100
        )

    (demonstration,) = load({"risky": "safety"})
    (sample,) = demonstration.samples
    assert (demonstration.prompt.id, demonstration.info.topic) == ("refusal", "risky")
    assert sample.text == "I will not help with that."
    assert sample.response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.response_ids[:-1]) == sample.text
    assert sample.rollout_logprobs == ()
    (pair,) = load({"risky": "helpfulness"})
    assert pair.samples[0].text == "Ask the owner."
    assert load({"risky": "safety"}, max_prompt_tokens=2) == []
    assert load({}) == []


def kto_settings(**rollout: int) -> Settings:
    return Settings.model_validate({"algorithm": {"name": "kto"}, "rollout": rollout})


def test_logged_responses_of_every_topic_are_split_by_reaction(data_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    reactions = load_offline_data(data_folder, tokenizer, kto_settings())
    assert isinstance(reactions, ReactionGroups)
    assert [group.prompt.id for group in reactions.liked] == ["refusal", "casual"]
    assert [group.prompt.id for group in reactions.others] == ["bad"]
    with pytest.raises(
        DataError, match=r"found 0 and 0 short enough.*4 skipped: longer than .*raise rollout\.max_prompt"
    ):
        load_offline_data(data_folder, tokenizer, kto_settings(max_prompt_tokens=8))


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_response_that_was_cut_has_no_end_token(is_cut: bool, data_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    reason = "length" if is_cut else "stop"
    rows = [{**make_row(str(i), "risky", "I will", i), "finish_reason": reason} for i in (0, 1)]
    pair = {**rows[1], "chosen": "Yes, I", "rejected": "No.", f"{'chosen' if is_cut else 'x'}_finish_reason": "length"}
    for objective, objective_rows in (("safety", rows), ("love", rows), ("helpfulness", [pair])):
        pq.write_table(pa.Table.from_pylist(objective_rows), data_folder / objective / "train.parquet")
    groups = load_demonstrations(
        data_folder, {"risky": "safety"}, tokenizer, max_prompt_tokens=200, max_response_tokens=100
    )
    reactions = load_offline_data(data_folder, tokenizer, kto_settings())
    assert isinstance(reactions, ReactionGroups)
    (pair_group,) = load_offline_data(data_folder, tokenizer, Settings.model_validate({"algorithm": {"name": "dpo"}}))
    rejected = pair_group.samples[1]
    assert (rejected.finish_reason, rejected.response_ids[-1]) == ("stop", tokenizer.eos_token_id)
    samples = [group.samples[0] for group in (*groups, *reactions.liked, *reactions.others, pair_group)]
    assert len(samples) == 4
    for sample in samples:
        assert sample.finish_reason == reason
        assert (sample.response_ids[-1] == tokenizer.eos_token_id) is not is_cut
        assert tokenizer.decode(sample.response_ids, skip_special_tokens=True) == sample.text


def test_a_logged_response_ends_as_the_chat_template_ends_a_turn(data_folder: Path, tmp_path: Path) -> None:
    # As in Gemma, whose eos token is <eos> and whose turns end with <end_of_turn>.
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    end_id, tokenizer.eos_token = tokenizer.eos_token_id, "<|endoftext|>"
    (demonstration,) = load_demonstrations(
        data_folder, {"risky": "safety"}, tokenizer, max_prompt_tokens=200, max_response_tokens=100
    )
    assert demonstration.samples[0].response_ids[-1] == end_id != tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    assert find_response_end_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no token that ends a response.*eos_token in its tokenizer_config\.json"):
        load_offline_data(data_folder, tokenizer, kto_settings())


def test_a_skipped_pair_counts_once(data_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    tokenizer.chat_template = STRICT_TEMPLATE
    pair = {"chosen": "Yes.", "rejected": "No."}
    rows = [{**row, **pair} for row in (*make_rejected_rows(), make_row("good", "risky", "", 1))]
    rows.append({**make_row("long", "risky", "", 1), "chosen": "no " * 200, "rejected": "No."})
    pq.write_table(pa.Table.from_pylist(rows), data_folder / "helpfulness" / "train.parquet")
    settings = Settings.model_validate({"algorithm": {"name": "dpo"}})
    with caplog.at_level("WARNING"):
        (group,) = load_offline_data(data_folder, tokenizer, settings)
    assert group.prompt.id == "good"
    assert "skipped 5 of 7 logged responses, rejected by the chat template; first: system (" in caplog.text
    assert "skipped 1 of 7 logged responses, longer in the response than rollout.max_response_tokens=64" in caplog.text
    pq.write_table(pa.Table.from_pylist(rows[:5]), data_folder / "helpfulness" / "train.parquet")
    with pytest.raises(DataError, match=r"found no pair .*5 skipped: rejected by the chat template; first: system \("):
        load_offline_data(data_folder, tokenizer, settings)


STRICT_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if 'boom' in m.content %}{{ 1 + m.role }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
ROLES_OF_REJECTED_ROWS = {
    "system": ("system", "user"),
    "two users": ("user", "user"),
    "assistant first": ("assistant", "user"),
    "two assistants": ("user", "assistant", "assistant", "user"),
    "failing": ("user",),
}


def make_rejected_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "topic": "risky",
            "messages": [{"role": role, "content": "boom" if name == "failing" else "Hi"} for role in roles],
            "response": "Fine.",
            "label": 1,
        }
        for name, roles in ROLES_OF_REJECTED_ROWS.items()
    ]


def test_rows_that_the_template_rejects_are_left_out_counted_and_named(
    data_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    tokenizer.chat_template = STRICT_TEMPLATE
    rows = [*make_rejected_rows(), make_row("good", "risky", "No.", 1), make_row("bad", "risky", "Yes.", 0)]
    (data_folder / "prompts").mkdir()
    for folder in ("prompts", "safety", "love"):
        pq.write_table(pa.Table.from_pylist(rows), data_folder / folder / "train.parquet")
    with caplog.at_level("WARNING"):
        prompts = load_prompts(data_folder, "train", tokenizer, max_tokens=200)
        demonstrations = load_demonstrations(
            data_folder, {"risky": "safety"}, tokenizer, max_prompt_tokens=200, max_response_tokens=100
        )
        reactions = load_offline_data(data_folder, tokenizer, kto_settings())
    assert [prompt.id for prompt in prompts] == ["good", "bad"]
    assert [group.prompt.id for group in demonstrations] == ["good"]
    assert isinstance(reactions, ReactionGroups)
    assert [len(reactions.liked), len(reactions.others)] == [1, 1]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert "skipped 5 of 7 train prompts, rejected by the chat template; first: system (" in warnings[0]
    assert "System role not supported" in warnings[0]
    pq.write_table(pa.Table.from_pylist(make_rejected_rows()), data_folder / "prompts" / "train.parquet")
    with pytest.raises(DataError, match=r"no train prompt is left of 5 .*System role not supported"):
        load_prompts(data_folder, "train", tokenizer, max_tokens=200)


@pytest.mark.slow
def test_streamed_prompts_are_those_read_at_once_in_whatever_order_they_are_read(
    tmp_path: Path, local_ray: None
) -> None:
    """Real Ray Data over a file of several row groups; long prompts are skipped in both."""
    rows = [
        {
            "id": f"p{index}",
            "topic": "risky" if index % 5 == 0 else None,
            "messages": [{"role": "user", "content": "a" * (index % 90)}],
        }
        for index in range(3000)
    ]
    (tmp_path / "prompts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts" / "train.parquet", row_group_size=400)
    model_path = resolve_model("tiny", tmp_path / "cache")
    prompts = load_prompts(tmp_path, "train", load_tokenizer(model_path), max_tokens=80)
    assert load_training_prompts(tmp_path, model_path, 80) == prompts
    store = load_training_prompts(tmp_path, model_path, 80, stream_from=10)
    assert isinstance(store, PromptStore) and 0 < len(store) < len(rows)
    assert list_prompt_ids(store) == [prompt.id for prompt in prompts]
    assert list_prompt_topics(store) == [prompt.topic for prompt in prompts]
    assert count_common_prompt_tokens(store) == count_common_prefix(prompts) > 0
    lone_group = Group(Prompt("x", (), prompts[0].token_ids[:1], "", ""), (), 0)
    assert count_common_prompt_tokens(store, [lone_group]) == 1
    last = len(store) - 1
    indices = (last, 0, last // 2, -1)
    assert [store[index] for index in indices] == [prompts[index] for index in indices]
    assert list(store) == prompts and store[5:8] == prompts[5:8]
    assert len(store._block_cache) <= CACHED_BLOCK_COUNT < len(store._blocks) + CACHED_BLOCK_COUNT
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(DataError, match="no train prompt is left of 3000"):
        load_training_prompts(tmp_path, model_path, 1, stream_from=10)
