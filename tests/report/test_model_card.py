"""The model card of a saved policy: from the run folder's files, without paths of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rluf.report.model_card import read_code_version, write_model_card
from rluf.utils.files import write_json

INTERVAL = {"mean": 0.7, "low": 0.6, "high": 0.8}


def write_run_folder(run_folder: Path, base_model: str) -> Path:
    config = {
        "name": "mine", "seed": 3, "model": {"path": base_model}, "run": {"root": "/secret/place"}, "learner": {},
        "algorithm": {"name": "grpo", "steps": 5}, "objectives": {"love": {"weight": 0.4}},
        "aggregation": {"topic_objectives": {"risky": "safety"}},
    }  # fmt: skip
    data_card = {"sources": [{"kind": "feedback", "file": "/secret/place/log.jsonl", "rows": 7}], "seed": 3}
    comparison = {"base": INTERVAL, "aligned": INTERVAL, "difference": INTERVAL}
    summary = {
        "offline": {"p_love": comparison},
        "gates": {"verdict": "pass", "judged_by": "reward models"},
        "kl": None,
    }
    write_json(run_folder / "config.json", config)
    write_json(run_folder / "summary.json", summary)
    write_json(run_folder / "cards" / "data.json", data_card)
    write_json(run_folder / "cards" / "love.json", {"auroc": INTERVAL, "n": 12, "ece": 0.01})
    return run_folder


def test_the_card_has_data_rewards_settings_and_results(tmp_path: Path) -> None:
    card = write_model_card(write_run_folder(tmp_path, "org/model"))
    text = card.read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["library_name"]) == ("org/model", "transformers")
    for expected_text in (
        "love: auroc 0.700 [0.600, 0.800] on n = 12", "feedback: log.jsonl, 7 rows", "gates: undecided", "love 0.4",
        "p_love by the reward model on unseen prompts: 0.700 -> 0.700", read_code_version(), "grpo, 5 steps",
    ):  # fmt: skip
        assert expected_text in text
    card_files = {path.name: path.read_text("utf-8") for path in (tmp_path / "policy" / "rluf").iterdir()}
    assert set(card_files) == {"settings.json", "data.json", "love.json"}
    assert "secret" not in text + "".join(card_files.values())
    assert json.loads(card_files["settings.json"])["algorithm"]["steps"] == 5


def test_settings_and_cards_have_no_place_of_the_training_machine(tmp_path: Path) -> None:
    run_folder = write_run_folder(tmp_path, "/secret/models/base")
    entry = {"kind": "feedback", "path": "/secret/place/log.jsonl"}
    write_json(run_folder / "cards" / "data.json", {"sources": [], "entries": [entry]})
    write_json(run_folder / "cards" / "love.json", {"previous": {"folder": "/secret/cache/love"}})
    config = json.loads((run_folder / "config.json").read_text("utf-8"))
    config["data"] = {
        "feedback": ["/secret/log.jsonl", {"reader": "kto", "path": "/secret/with space/kto.jsonl"}],
        "prompts": ["~/secret/prompts.jsonl", "s3://secret/prompts.parquet", "https://secret/", "owner/prompts"],
        "preferences": [
            {"source": "sql", "path": "SELECT * FROM pairs", "options": {"host": "secret", "user": "secret"}}
        ],
        "labels": {"warmth": ["../secret/warmth.csv", "sample:safety", "hf://datasets/owner/name", "logs/w.jsonl"]},
    }
    config["objectives"]["brevity"] = {"source": "function", "path": "pickle:/secret/functions/0a.pkl", "weight": 1}
    config["objectives"]["tone"] = {"source": "serve", "path": "http://secret:8000", "weight": 1}
    config["model"]["system_prompt"] = "/no_think Answer in km/h"
    write_json(run_folder / "config.json", config)
    write_model_card(run_folder)
    texts = {path.stem: path.read_text("utf-8") for path in (tmp_path / "policy" / "rluf").iterdir()}
    settings = json.loads(texts["settings"])
    assert "secret" not in "".join(texts.values())
    assert json.loads(texts["data"])["entries"] == [{"kind": "feedback", "path": "log.jsonl"}]
    assert json.loads(texts["love"]) == {"previous": {"folder": "love"}}
    assert settings["data"] == {
        "feedback": ["log.jsonl", {"reader": "kto", "path": "kto.jsonl"}],
        "prompts": ["prompts.jsonl", "prompts.parquet", "https", "owner/prompts"],
        "preferences": [{"source": "sql", "path": "SELECT * FROM pairs"}],
        "labels": {"warmth": ["warmth.csv", "sample:safety", "hf://datasets/owner/name", "logs/w.jsonl"]},
    }
    assert settings["model"] == {"path": "base", "system_prompt": "/no_think Answer in km/h"}
    assert [settings["objectives"][name]["path"] for name in ("brevity", "tone")] == ["0a.pkl", "http"]


def test_results_of_simulated_users_say_so(tmp_path: Path) -> None:
    run_folder = write_run_folder(tmp_path, "org/model")
    lift = {"mean": 0.2, "low": 0.1, "high": 0.3}
    check = {"name": "love", "status": "pass", "limit": 0.0, "judged_by": "simulated users", "lift": lift}
    summary = {
        "love_rate": {"base": INTERVAL, "aligned": INTERVAL, "difference": INTERVAL, "lift": lift},
        "gates": {
            "verdict": "undecided",
            "measured_verdict": "pass",
            "judged_by": "simulated users",
            "checks": [check],
        },
    }
    write_json(run_folder / "summary.json", summary)
    text = write_model_card(run_folder).read_text("utf-8")
    assert (
        "- Undecided: no person has read the responses; new simulated users love the aligned policy 20% more often."
        in text
    )
    assert "- Simulated love: 70.0% -> 70.0%, relative lift +20% (+10% to +30%)" in text


def test_a_model_folder_is_not_a_hub_id(tmp_path: Path) -> None:
    text = write_model_card(write_run_folder(tmp_path, "./models/mine")).read_text("utf-8")
    assert "base_model" not in text.split("---")[1]
    assert "./models" not in text


def test_a_missing_estimate_is_unknown(tmp_path: Path) -> None:
    run_folder = write_run_folder(tmp_path, "org/model")
    missing = {"mean": None, "low": None, "high": None}
    write_json(run_folder / "cards" / "love.json", {"auroc": missing, "n": 12, "ece": 0.01})
    assert "love: auroc unknown on n = 12" in write_model_card(run_folder).read_text("utf-8")


def test_the_metadata_is_that_of_the_hub(tmp_path: Path) -> None:
    run_folder = write_run_folder(tmp_path, "org/model")
    summary = json.loads((run_folder / "summary.json").read_text())
    love_rate = {"base": INTERVAL, "aligned": INTERVAL, "difference": INTERVAL, "lift": None}
    undefined = {"mean": float("nan"), "low": None, "high": None}
    summary["offline"]["helpfulness"] = {"base": INTERVAL, "aligned": undefined, "difference": INTERVAL}
    (run_folder / "summary.json").write_text(json.dumps({**summary, "love_rate": love_rate}))
    card = ModelCard.load(write_model_card(run_folder))
    assert card.data.model_name == "mine"
    assert card.data.to_dict()["tags"] == ["rlhf", "rluf"]
    assert "license" not in card.data.to_dict()
    results = {result.metric_type: result for result in card.data.eval_results}
    assert sorted(results) == ["love_rate", "p_love"]
    assert (results["love_rate"].metric_value, results["love_rate"].metric_name) == (
        0.7, "Love, share by simulated users",
    )  # fmt: skip
    assert results["p_love"].metric_name == "p_love, mean score of the reward model"
    assert {result.dataset_name for result in results.values()} == {"test prompts of the run"}
    assert "Simulated users judged the policy, not people" in card.text


def test_real_runs_do_not_mention_simulated_users(tmp_path: Path) -> None:
    card = ModelCard.load(write_model_card(write_run_folder(tmp_path, "org/model")))
    assert "imulated" not in card.text


@pytest.mark.parametrize(
    ("base_card", "expected"),
    [("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"), ("# No metadata\n", None), ("---\n: [\n---\n", None)],
)
def test_the_license_is_that_of_the_base_model(tmp_path: Path, base_card: str, expected: str | None) -> None:
    base_folder = tmp_path / "base"
    base_folder.mkdir()
    (base_folder / "README.md").write_text(base_card)
    card = ModelCard.load(write_model_card(write_run_folder(tmp_path / "run", str(base_folder))))
    assert card.data.license == expected
    assert str(tmp_path) not in card.content


def test_a_base_model_is_an_id_of_the_hub_only(tmp_path: Path) -> None:
    for index, base_model in enumerate(("tiny", "./models/mine", "/models/mine", "~/mine", "a/b/c", "models/")):
        card = ModelCard.load(write_model_card(write_run_folder(tmp_path / str(index), base_model)))
        assert card.data.base_model is None
