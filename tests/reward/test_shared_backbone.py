"""Heads of one backbone: trained together without Ray, written as one-logit folders, scored by one forward pass."""

from __future__ import annotations

import json
import math
import os
import shutil
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
from rluf.reward.export import export_models
from rluf.reward.fit import HeadData, train_member
from rluf.reward.model import RewardModel, SharedBackboneModel, load_reward_scorer
from rluf.reward.shared_backbone import BACKBONE_FILE, get_data_objective, select_labeled_rows
from rluf.reward.text import render_context
from rluf.types import ScoringItem
from tests.reward.test_reward_training import COLD_RESPONSES, WARM_RESPONSES, write_prepared_data

HEADS = ("love", "continued", "helpfulness", "safety")
PROBE_SECTION = {"linear_probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120}


def load_head_data(data_folder: Path, head: str) -> HeadData:
    folder = data_folder / get_data_objective(head)
    train_rows, dev_rows = (pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "dev"))
    return HeadData(head, train_rows, dev_rows, folder)


def build_items() -> list[ScoringItem]:
    texts = (*WARM_RESPONSES, *COLD_RESPONSES, "")
    return [ScoringItem([{"role": "user", "content": "How was the day?"}], text) for text in texts]


BACKBONES = [("tiny", "float32"), ("tiny-encoder", "float32"), ("tiny", "bfloat16")]


@pytest.fixture(scope="module")
def folders_by_backbone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Path]]:
    """Four heads with a probe each on one frozen backbone: a decoder (head without bias) or an encoder."""
    return {backbone: train_heads(tmp_path_factory.mktemp("heads"), *backbone) for backbone in BACKBONES}


@pytest.fixture(scope="module", params=BACKBONES, ids="-".join)
def head_folders(
    request: pytest.FixtureRequest, folders_by_backbone: dict[tuple[str, str], dict[str, Path]]
) -> dict[str, Path]:
    return folders_by_backbone[request.param]


def train_heads(root: Path, backbone: str, dtype: str) -> dict[str, Path]:
    """The folder of each head."""
    data_folder = write_prepared_data(root / "data", row_count=80)
    section = {"backbone": backbone, **PROBE_SECTION}
    reward = {
        "shared_backbone_heads": HEADS,
        "love": section,
        # Epochs and learning rate must be ignored: the first head's section applies.
        "safety": {**section, "epochs": 7, "learning_rate": 0.5},
        "helpfulness": {**section, "loss": "bradley_terry"},
    }
    settings = Settings.model_validate(
        {"run": {"cache": str(root / "cache")}, "model": {"dtype": dtype}, "reward": reward}
    )
    member = train_member(settings, [load_head_data(data_folder, head) for head in HEADS], 0, math.inf)
    outputs = {head: (data_folder / get_data_objective(head), root / "out" / head) for head in HEADS}
    export_models(settings, outputs, [member], time.monotonic(), full_card=False)
    return {head: output_folder for head, (_, output_folder) in outputs.items()}


def test_one_forward_pass_gives_the_scores_of_each_separate_head(head_folders: dict[str, Path]) -> None:
    joint_scores = load_reward_scorer(head_folders, batch_tokens=512)(build_items())
    assert list(joint_scores) == list(HEADS)
    for head, folder in head_folders.items():
        scores = RewardModel.load(folder, batch_tokens=512).score(build_items(), head)
        for joint_score, score in zip(joint_scores[head], scores, strict=True):
            assert joint_score.raw_logit == pytest.approx(score.raw_logit, abs=1e-4)
            assert joint_score.value == pytest.approx(score.value, abs=1e-4)
    shared_model = SharedBackboneModel.load(head_folders, batch_tokens=16384)
    forward_calls: list[Any] = []
    shared_model.model.members[0].register_forward_hook(lambda *_: forward_calls.append(1))
    shared_model.score(build_items())
    assert len(forward_calls) == 1
    assert shared_model.score([]) == {head: [] for head in HEADS}


def test_an_ensemble_of_depths_has_all_heads_at_each_depth_and_needs_one_pass(tmp_path: Path) -> None:
    data_folder, heads = write_prepared_data(tmp_path / "data", row_count=80), ("love", "helpfulness")
    reward = {
        "shared_backbone_heads": heads,
        "love": {"backbone": "tiny", "ensemble": {"members": [{"layers": 1}, {"layers": 2}]}, **PROBE_SECTION},
        "helpfulness": {"loss": "bradley_terry"},
    }
    settings = Settings.model_validate(
        {"run": {"cache": str(tmp_path / "cache")}, "model": {"dtype": "float32"}, "reward": reward}
    )
    shared_features: dict[tuple[str, str], Any] = {}
    head_data = [load_head_data(data_folder, head) for head in heads]
    members = [
        train_member(settings, head_data, index, math.inf, shared_features=shared_features) for index in range(2)
    ]
    assert list(shared_features) == [("tiny", head) for head in heads]
    outputs = {head: (data_folder / head, tmp_path / "out" / head) for head in heads}
    export_models(settings, outputs, members, time.monotonic(), full_card=False)
    for head_index in range(2):
        spreads = [member.fit_results[head_index].dev_logits.std() for member in members]
        assert spreads[0] == pytest.approx(spreads[1])
    model_folders = {head: output_folder for head, (_, output_folder) in outputs.items()}
    shared_model = SharedBackboneModel.load(model_folders, batch_tokens=16384)
    forward_calls: list[Any] = []
    for member in shared_model.model.members:
        member.register_forward_hook(lambda *_: forward_calls.append(1))
    joint_scores = shared_model.score(build_items())
    assert len(forward_calls) == 1
    for head, folder in model_folders.items():
        scores = RewardModel.load(folder, batch_tokens=512).score(build_items(), head)
        for joint_score, score in zip(joint_scores[head], scores, strict=True):
            assert joint_score.raw_logit == pytest.approx(score.raw_logit, abs=1e-5)
            assert joint_score.spread == pytest.approx(score.spread, abs=1e-5)


def test_plain_transformers_loads_the_folder_of_a_head(head_folders: dict[str, Path]) -> None:
    for head, folder in head_folders.items():
        model = RewardModel.load(folder, batch_tokens=512)
        rows = model.encoder.encode(build_items())
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert classifier.config.num_labels == 1
        with torch.no_grad():
            logits = [float(classifier(**model.encoder.collate([row])).logits) for row in rows]
        assert logits == pytest.approx(model.compute_raw_logits(rows), abs=1e-4), head


def test_the_backbone_is_stored_once_and_each_head_has_its_own_training(head_folders: dict[str, Path]) -> None:
    assert len({os.stat(folder / BACKBONE_FILE).st_ino for folder in head_folders.values()}) == 1
    cards = {head: json.loads((folder / "reward_card.json").read_text()) for head, folder in head_folders.items()}
    assert len({card["calibration"]["backbone_hash"] for card in cards.values()}) == 1
    assert {head: card["calibration"]["method"] for head, card in cards.items()} == {
        "love": "platt", "continued": "platt", "helpfulness": "centered", "safety": "platt",
    }  # fmt: skip
    head_settings = {head: card["settings"] for head, card in cards.items()}
    assert {section["epochs"] for section in head_settings.values()} == {0}
    assert head_settings["safety"]["learning_rate"] == head_settings["love"]["learning_rate"]
    assert head_settings["helpfulness"]["loss"] == "bradley_terry"
    assert cards["love"]["auroc"]["mean"] > 0.6
    assert cards["helpfulness"]["pair_accuracy"]["mean"] > 0.7
    assert cards["continued"]["base_rate"] != cards["love"]["base_rate"]


def test_heads_without_a_common_backbone_hash_are_scored_separately(
    head_folders: dict[str, Path], tmp_path: Path
) -> None:
    safety_folder = shutil.copytree(head_folders["safety"], tmp_path / "safety")
    calibration = json.loads((safety_folder / "calibration.json").read_text())
    (safety_folder / "calibration.json").write_text(json.dumps({**calibration, "backbone_hash": ""}))
    folders = {"love": head_folders["love"], "safety": safety_folder}
    joint_scores = load_reward_scorer(folders, batch_tokens=512)(build_items())
    scores = RewardModel.load(head_folders["safety"], batch_tokens=512).score(build_items(), "safety")
    assert [score.value for score in joint_scores["safety"]] == pytest.approx(
        [score.value for score in scores], abs=1e-4
    )


def test_labels_of_reaction_heads_come_from_the_feedback() -> None:
    rows = [
        {"continued": True, "reaction": "love"},
        {"continued": False, "reaction": None},
        {"continued": None, "reaction": "thumbs_down"},
    ]
    assert [row["label"] for row in select_labeled_rows("continued", rows, "here")] == [1, 0]
    assert [row["label"] for row in select_labeled_rows("thumbs", rows, "here")] == [1, 0]
    assert [row["label"] for row in select_labeled_rows("dislike", rows, "here")] == [0, 0, 1]
    assert select_labeled_rows("love", rows, "here") == rows
    with pytest.raises(DataError, match=r"has a thumb down.*head dislike"):
        select_labeled_rows("dislike", rows[:2], "here")
    with pytest.raises(DataError, match=r"reward\.shared_backbone_heads"):
        select_labeled_rows("thumbs", rows[1:2], "here")


VLLM_POOLING_SCRIPT = """
import gc, json, sys
from vllm import LLM, PoolingParams
for folder, items in json.load(sys.stdin):
    llm = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=128)
    raw_logit = PoolingParams(use_activation=False)
    if "ids" in items[0]:
        prompts = [{"prompt_token_ids": item["ids"]} for item in items]
        outputs = llm.encode(prompts, pooling_task="classify", pooling_params=raw_logit)
        logits = [float(output.outputs.data[0]) for output in outputs]
    else:
        logits = [float(llm.score(item["first"], item["second"], pooling_params=raw_logit)[0].outputs.score)
                  for item in items]
    print("LOGITS " + json.dumps(logits))
    del llm  # its end takes the process group with it, which must not be that of the next one
    gc.collect()
"""


@pytest.mark.slow
def test_vllms_pooling_runner_gives_the_same_logits(
    folders_by_backbone: dict[tuple[str, str], dict[str, Path]],
) -> None:
    """Decoders get our token ids; encoders get a pair of texts, which vLLM's tokenization joins as ours does."""
    items = build_items()[:-1]  # vLLM rejects an empty text
    orders: list[tuple[str, list[Any]]] = []
    expected: dict[tuple[str, str], Any] = {}
    for backbone, folders in folders_by_backbone.items():
        model = RewardModel.load(folders["love"], batch_tokens=4096)
        rows = model.encoder.encode(items)
        expected[backbone] = pytest.approx(model.compute_raw_logits(rows), abs=1e-3)
        if model.encoder.uses_text_pairs:
            inputs: list[Any] = [{"first": render_context(item.messages), "second": item.response} for item in items]
        else:
            inputs = [{"ids": row.token_ids} for row in rows]
        orders.append((str(folders["love"]), inputs))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    # One process for all: its import of vLLM takes longer than what it computes.
    process = subprocess.run(
        [sys.executable, "-c", VLLM_POOLING_SCRIPT],
        input=json.dumps(orders), capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    result_lines = [line for line in process.stdout.splitlines() if line.startswith("LOGITS ")]
    assert len(result_lines) == len(orders), process.stderr[-3000:]
    logits = [json.loads(line.removeprefix("LOGITS ")) for line in result_lines]
    assert dict(zip(expected, logits, strict=True)) == expected
