"""Reward models as artifacts: their cache key covers what would train another one; prompts are checked first."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.artifacts import check_prompt_fields, list_reward_cache_inputs, train_reward_artifacts
from rluf.config.load import load_settings
from rluf.errors import DataError
from rluf.prepare.pipeline import build_data_set, run_task
from rluf.utils.cache import Artifact, compute_artifact_key

DATA = Artifact("data", Path("data"), "0123456789ab", reused=True)


def reward_key(*overrides: str, heads: tuple[str, ...] = ("love",)) -> str:
    return compute_artifact_key(list_reward_cache_inputs(load_settings(None, overrides).settings, DATA, heads))


def test_the_dtype_of_training_is_part_of_the_key() -> None:
    assert reward_key("model.dtype=float32") != reward_key("model.dtype=bfloat16")
    assert reward_key() in (reward_key("model.dtype=float32"), reward_key("model.dtype=bfloat16"))


def test_a_backbone_folder_counts_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love.backbone={tmp_path}"
    before = reward_key(override)
    assert reward_key(override) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    with_new_weights = reward_key(override)
    assert with_new_weights != before
    (tmp_path / "config.json").write_text('{"layers": 2}', "utf-8")
    assert reward_key(override) not in (before, with_new_weights)
    assert reward_key(override, heads=("safety",)) == reward_key(heads=("safety",))


def test_the_folder_of_a_members_backbone_counts_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love.ensemble.members=[{{layers: 6}}, {{backbone: '{tmp_path}', layers: 2}}]"
    before = reward_key(override)
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert reward_key(override) != before


def test_an_embedded_name_wins_over_a_local_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list_reward_cache_inputs(load_settings(None).settings, DATA, ("love",))["folders"] == {}


def test_other_prompts_do_not_retrain_a_reward_model(tmp_path: Path) -> None:
    """The key covers the rows that a head is trained on: other prompts change no key, other pairs only theirs."""

    def prepare(name: str, *overrides: str) -> dict[str, str]:
        settings = load_settings(None, ["prepare.max_rows=100", *overrides]).settings
        build_data_set(settings, tmp_path / name, lambda tasks: list(chain.from_iterable(map(run_task, tasks))))
        data_artifact = Artifact("data", tmp_path / name, name, reused=False)
        return {
            head: compute_artifact_key(list_reward_cache_inputs(settings, data_artifact, (head,)))
            for head in ("love", "helpfulness", "safety", "thumbs")
        }

    prompts = tmp_path / "prompts.jsonl"
    prompt_rows = [
        {"id": str(i), "split": ("train", "test")[i % 2], "messages": [{"role": "user", "content": f"Why {i}?"}]}
        for i in range(20)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in prompt_rows))
    pairs = tmp_path / "pairs.jsonl"
    pair_rows = [
        {
            "id": str(i),
            "group": str(i),
            "messages": [{"role": "user", "content": f"Why {i}?"}],
            "chosen": f"Because {i}.",
            "rejected": "No.",
        }
        for i in range(60)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    keys = prepare("first")
    assert prepare("other_prompts", f"data.prompts={prompts}") == keys
    other_pairs = prepare("other_pairs", f"data.preferences={pairs}")
    assert {name for name in keys if other_pairs[name] != keys[name]} == {"helpfulness"}
    assert len(set(keys.values())) == len(keys)


def take_answer(completions: Any, answer: list[str], level: int = 0, **columns: Any) -> list[float]:
    return [float(completion[0]["content"] == text) for completion, text in zip(completions, answer, strict=True)]


def take_rows(rows: Any) -> list[float]:
    return [0.0 for _ in rows]


@pytest.mark.parametrize(
    ("name", "extra_fields", "message"),
    [
        ("take_answer", ['{"answer": "4"}', '{"answer": "6", "level": 2}'], None),
        ("take_answer", ['{"answer": "4"}', None], r"take_answer' takes answer, which prompt 'q1' of data\.prompts"),
        ("take_answer", ['{"solution": "4"}', None], "takes answer, which prompt 'q0'"),
        ("take_rows", [None, None], None),
    ],
)
def test_prompts_without_a_field_that_a_reward_function_requires_are_named_before_reward_training(
    tmp_path: Path, name: str, extra_fields: list[str | None], message: str | None
) -> None:
    (tmp_path / "prompts").mkdir()
    table = pa.table({"id": ["q0", "q1"], "extra_fields": pa.array(extra_fields, pa.string())})
    pq.write_table(table, tmp_path / "prompts" / "train.parquet")
    overrides = ["objectives.exact.source=function", f"objectives.exact.path={__name__}:{name}"]
    settings = load_settings(Path("tiny"), [*overrides, "objectives.exact.weight=1"]).settings
    if message is None:
        check_prompt_fields(settings, tmp_path)
        return
    with pytest.raises(DataError, match=message):
        train_reward_artifacts(settings, Artifact("data", tmp_path, "0", reused=True))
