"""The card beside a saved policy: from the run folder's own files, without paths of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from rluf.report.model_card import code_version, write_model_card
from rluf.tracking.run_files import write_json

INTERVAL = {"mean": 0.7, "low": 0.6, "high": 0.8}


def run_folder(folder: Path, base: str) -> Path:
    config = {
        "name": "mine", "seed": 3, "model": {"path": base}, "run": {"root": "/secret/place"}, "learner": {},
        "algorithm": {"name": "grpo", "steps": 5}, "objectives": {"love": {"weight": 0.4}, "alone": ["risky:safety"]},
    }  # fmt: skip
    data = {"sources": [{"kind": "feedback", "file": "/secret/place/log.jsonl", "rows": 7}], "seed": 3}
    gap = {"base": INTERVAL, "aligned": INTERVAL, "difference": INTERVAL}
    summary = {"offline": {"p_love": gap}, "gates": {"verdict": "pass", "judged_by": "reward models"}, "kl": None}
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", summary)
    write_json(folder / "cards" / "data.json", data)
    write_json(folder / "cards" / "love.json", {"auroc": INTERVAL, "n": 12, "ece": 0.01})
    return folder


def test_the_card_tells_data_rewards_settings_and_results(tmp_path: Path) -> None:
    card = write_model_card(run_folder(tmp_path, "org/model"))
    text = card.read_text("utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("org/model", "transformers")
    for part in (
        "love: auroc 0.700 [0.600, 0.800] on n = 12", "feedback: log.jsonl, 7 rows", "gates: pass", "love 0.4",
        "p_love by the reward model on unseen prompts: 0.700 -> 0.700", code_version(), "grpo, 5 steps",
    ):  # fmt: skip
        assert part in text
    kept = {file.name: file.read_text("utf-8") for file in (tmp_path / "policy" / "rluf").iterdir()}
    assert set(kept) == {"settings.json", "data.json", "love.json"}
    assert "secret" not in text + "".join(kept.values())
    assert json.loads(kept["settings.json"])["algorithm"]["steps"] == 5


def test_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    text = write_model_card(run_folder(tmp_path, "./models/mine")).read_text("utf-8")
    assert "base_model" not in text.split("---")[1]
    assert "./models" not in text


def test_a_figure_that_nobody_knows_is_told_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "org/model")
    none = {"mean": None, "low": None, "high": None}
    write_json(folder / "cards" / "love.json", {"auroc": none, "n": 12, "ece": 0.01})
    assert "love: auroc unknown on n = 12" in write_model_card(folder).read_text("utf-8")
