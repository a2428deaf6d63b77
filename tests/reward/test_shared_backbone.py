"""Heads of one backbone: trained together without Ray, written as folders of one logit, scored by one forward pass."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.reward.export import finish
from rluf.reward.fit import Splits, train_member
from rluf.reward.model import RewardModel, SharedModel, load_scorers
from rluf.reward.shared_backbone import BACKBONE, data_of, labelled
from rluf.reward.text import Item, context_text
from tests.reward.test_reward_training import COLD, WARM, write_data

HEADS = ("love", "continued", "helpfulness", "safety")


def _splits(data: Path, head: str) -> Splits:
    folder = data / data_of(head)
    rows = [pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "dev")]
    return Splits(head, rows[0], rows[1], folder)


@pytest.fixture(scope="module", params=[("tiny", "float32"), ("tiny-encoder", "float32"), ("tiny", "bfloat16")])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four heads with a probe each on one frozen backbone, a decoder's (no bias) or an encoder's."""
    root = tmp_path_factory.mktemp("heads")
    data = write_data(root / "data", rows=80)
    backbone, dtype = request.param
    section = {"backbone": backbone, "probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120}
    settings = Settings.model_validate(
        {
            "run": {"cache": str(root / "cache")},
            "reward": {
                "dtype": dtype,
                "heads": HEADS,
                "love": section,
                "safety": {**section, "calibration": "temperature", "epochs": 7, "learning_rate": 0.5},
                "helpfulness": {**section, "loss": "bradley_terry"},
            },
        }
    )
    member = train_member(settings, [_splits(data, head) for head in HEADS], 0, math.inf)
    outs = {head: (data / data_of(head), root / "out" / head) for head in HEADS}
    finish(settings, outs, [member], time.monotonic(), thorough=False)
    return {head: out for head, (_, out) in outs.items()}


def _items() -> list[Item]:
    return [([{"role": "user", "content": "How was the day?"}], text) for text in (*WARM, *COLD, "")]


def test_one_forward_pass_scores_as_each_head_alone(folders: dict[str, Path]) -> None:
    together = load_scorers(folders, batch_tokens=512)(_items())
    assert list(together) == list(HEADS)
    for head, folder in folders.items():
        alone = RewardModel.load(folder, batch_tokens=512).score(_items(), head)
        assert [s.raw for s in together[head]] == pytest.approx([s.raw for s in alone], abs=1e-4)
        assert [s.value for s in together[head]] == pytest.approx([s.value for s in alone], abs=1e-4)
    shared = SharedModel.load(folders, batch_tokens=16384)
    calls: list[Any] = []
    shared.model.members[0].register_forward_hook(lambda *_: calls.append(1))
    shared.score(_items())
    assert len(calls) == 1
    assert shared.score([]) == {head: [] for head in HEADS}


def test_an_ensemble_of_depths_has_its_heads_at_each_and_one_pass_serves_all(tmp_path: Path) -> None:
    data, heads = write_data(tmp_path / "data", rows=80), ("love", "helpfulness")
    section = {"backbone": "tiny", "probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120, "layers": [1, 2]}
    tree = {"dtype": "float32", "heads": heads, "love": section, "helpfulness": {"loss": "bradley_terry"}}
    settings = Settings.model_validate({"run": {"cache": str(tmp_path / "cache")}, "reward": tree})
    shared: dict[tuple[str, str], Any] = {}
    splits = [_splits(data, head) for head in heads]
    members = [train_member(settings, splits, number, math.inf, shared=shared) for number in range(2)]
    assert list(shared) == [("tiny", head) for head in heads]
    outs = {head: (data / head, tmp_path / "out" / head) for head in heads}
    finish(settings, outs, members, time.monotonic(), thorough=False)
    for place in range(2):
        spreads = [member.found[place].dev_logits.std() for member in members]
        assert spreads[0] == pytest.approx(spreads[1])
    model = SharedModel.load({head: out for head, (_, out) in outs.items()}, batch_tokens=16384)
    calls: list[Any] = []
    for member in model.model.members:
        member.register_forward_hook(lambda *_: calls.append(1))
    together = model.score(_items())
    assert len(calls) == 1
    for head, (_, out) in outs.items():
        alone = RewardModel.load(out, batch_tokens=512).score(_items(), head)
        assert [(s.raw, s.spread) for s in together[head]] == [
            pytest.approx((s.raw, s.spread), abs=1e-5) for s in alone
        ]


def test_plain_transformers_reads_a_heads_folder(folders: dict[str, Path]) -> None:
    for head, folder in folders.items():
        model = RewardModel.load(folder, batch_tokens=512)
        rows = model.encoder.encode(_items())
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert plain.config.num_labels == 1
        with torch.no_grad():
            logits = [float(plain(**model.encoder.collate([row])).logits) for row in rows]
        assert logits == pytest.approx(model.raw(rows), abs=1e-4), head


def test_the_backbone_lies_on_disk_once_and_each_head_learnt_its_own(folders: dict[str, Path]) -> None:
    assert len({os.stat(folder / BACKBONE).st_ino for folder in folders.values()}) == 1
    cards = {head: json.loads((folder / "reward_card.json").read_text()) for head, folder in folders.items()}
    assert len({card["calibration"]["backbone"] for card in cards.values()}) == 1
    assert {head: card["calibration"]["method"] for head, card in cards.items()} == {
        "love": "platt", "continued": "platt", "helpfulness": "centred", "safety": "temperature",
    }  # fmt: skip
    told = {head: card["settings"] for head, card in cards.items()}
    assert {one["epochs"] for one in told.values()} == {0}  # the first head's section trains all
    assert told["safety"]["learning_rate"] == told["love"]["learning_rate"]
    assert (told["safety"]["calibration"], told["helpfulness"]["loss"]) == ("temperature", "bradley_terry")
    assert cards["love"]["auroc"]["mean"] > 0.6
    assert cards["helpfulness"]["pair_accuracy"]["mean"] > 0.7
    assert cards["continued"]["base_rate"] != cards["love"]["base_rate"]


def test_heads_of_other_folders_are_scored_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(folders["safety"], tmp_path / "safety")
    told = json.loads((other / "calibration.json").read_text())
    (other / "calibration.json").write_text(json.dumps({**told, "backbone": ""}))
    found = load_scorers({"love": folders["love"], "safety": other}, batch_tokens=512)(_items())
    alone = RewardModel.load(folders["safety"], batch_tokens=512).score(_items(), "safety")
    assert [s.value for s in found["safety"]] == pytest.approx([s.value for s in alone], abs=1e-4)


def test_continued_and_thumbs_are_read_off_the_feedback() -> None:
    rows = [
        {"continued": True, "reaction": "love"},
        {"continued": False, "reaction": None},
        {"continued": None, "reaction": "thumbs_down"},
    ]
    assert [row["label"] for row in labelled("continued", rows, "here")] == [1, 0]
    assert [row["label"] for row in labelled("thumbs", rows, "here")] == [1, 0]
    assert labelled("love", rows, "here") == rows
    with pytest.raises(DataError, match=r"reward\.heads"):
        labelled("thumbs", rows[1:2], "here")


POOLING = """
import json, sys
from vllm import LLM, PoolingParams
folder, items = sys.argv[1], json.load(sys.stdin)
llm = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=128)
plain = PoolingParams(use_activation=False)
if "ids" in items[0]:
    found = llm.encode([{"prompt_token_ids": item["ids"]} for item in items], pooling_task="classify",
                       pooling_params=plain)
    logits = [float(one.outputs.data[0]) for one in found]
else:
    logits = [float(llm.score(item["first"], item["second"], pooling_params=plain)[0].outputs.score) for item in items]
print("LOGITS " + json.dumps(logits))
"""


@pytest.mark.slow
def test_vllms_pooling_runner_gives_the_same_logit(folders: dict[str, Path]) -> None:
    """Decoders get our token ids; encoders a pair of texts, which vLLM's tokenizing joins as ours does."""
    model = RewardModel.load(folders["love"], batch_tokens=4096)
    items = _items()[:-1]  # vLLM takes no empty text
    rows = model.encoder.encode(items)
    if model.encoder.pair:
        told: list[Any] = [{"first": context_text(messages), "second": text} for messages, text in items]
    else:
        told = [{"ids": row.ids} for row in rows]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", POOLING, str(folders["love"])],
        input=json.dumps(told), capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGITS ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[-1].removeprefix("LOGITS ")) == pytest.approx(model.raw(rows), abs=1e-3)
