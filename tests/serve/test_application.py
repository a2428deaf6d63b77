"""The application built from settings, and a scorer that replaces its models; without Ray."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import rluf.serve.deployments
from rluf.config.derived import list_configured_reward_folders
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.serve.application import (
    _build_policy_application,
    _fingerprint_engine,
    build_scorer_config,
    find_candidate_folders,
    get_feedback_root,
    get_log_folder,
    load_or_create_salt,
)
from rluf.serve.deployments import ScorerDeployment
from rluf.serve.policy_deployment import PolicyDeployment
from rluf.utils.paths import resolve_cache_folder
from tests.serve.conftest import OBJECTIVES, make_items, score_offline, write_models


def make_settings(folder: Path, root: Path, **serve: object) -> Settings:
    objectives = {name: {"path": str(folder / name), "weight": 0.3} for name in OBJECTIVES}
    return Settings.model_validate({"run": {"root": str(root)}, "objectives": objectives, "serve": serve})


def test_the_version_depends_on_the_files_and_facts_come_from_the_cards(model_folder: Path, tmp_path: Path) -> None:
    settings = make_settings(model_folder, tmp_path)
    first_config = build_scorer_config(settings, list_configured_reward_folders(settings))
    assert first_config["facts"]["love"]["mean_value"] == 0.25
    assert first_config["facts"]["love"]["max_tokens"] == 96
    copied_settings = make_settings(shutil.copytree(model_folder, tmp_path / "copy"), tmp_path)
    assert (
        build_scorer_config(copied_settings, list_configured_reward_folders(copied_settings))["version"]
        == first_config["version"]
    )
    (tmp_path / "copy" / "love" / "calibration.json").write_text('{"scale": 2.0}')
    assert (
        build_scorer_config(copied_settings, list_configured_reward_folders(copied_settings))["version"]
        != first_config["version"]
    )
    shutil.rmtree(tmp_path / "copy" / "love")
    with pytest.raises(ModelError, match=r"copy/love has no config\.json"):
        build_scorer_config(copied_settings, list_configured_reward_folders(copied_settings))


def test_a_judge_can_be_served_and_a_missing_model_is_named_in_the_error(model_folder: Path, tmp_path: Path) -> None:
    tree = make_settings(model_folder, tmp_path).model_dump(mode="json")
    tree["objectives"]["safety"] = {"source": "judge", "path": "refusal", "weight": 0.2}
    judge_settings = Settings.model_validate(tree)
    scorer_config = build_scorer_config(judge_settings, list_configured_reward_folders(judge_settings))
    assert scorer_config["models"]["safety"] == {"judge": "refusal"}
    tree["objectives"]["love"]["path"] = None
    settings_without_model = Settings.model_validate(tree)
    with pytest.raises(ModelError, match=r"objectives\.love\.path"):
        build_scorer_config(settings_without_model, list_configured_reward_folders(settings_without_model))


def test_candidate_models_are_those_in_its_folder(model_folder: Path, tmp_path: Path) -> None:
    assert find_candidate_folders(make_settings(model_folder, tmp_path)) is None
    shutil.copytree(model_folder / "love", tmp_path / "new" / "love")
    assert find_candidate_folders(make_settings(model_folder, tmp_path, candidate=str(tmp_path / "new"))) == {
        "love": tmp_path / "new" / "love"
    }
    with pytest.raises(ModelError, match=r"serve\.candidate"):
        find_candidate_folders(make_settings(model_folder, tmp_path, candidate=str(tmp_path / "nothing")))


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LONG_PROMPT_OVERRIDES = [
    "rollout.max_prompt_tokens=1024",
    "rollout.max_response_tokens=512",
    "algorithm.micro_batch_tokens=8192",
]


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        *((config, []) for config in CONFIGS),
        (None, LONG_PROMPT_OVERRIDES),
        (None, ["rollout.concurrency=2", "algorithm.samples_per_prompt=2"]),
    ],
)
def test_a_policy_replica_accepts_all_settings_that_the_driver_accepts(
    config: Path | None, overrides: list[str]
) -> None:
    settings = load_settings(config, overrides).settings
    folder = resolve_model("tiny", resolve_cache_folder(settings))
    (settings_json,) = _build_policy_application(settings, "some", folder, "1")._bound_deployment.init_args
    replica_settings = PolicyDeployment(settings_json)._settings
    assert (replica_settings.model, replica_settings.rollout, replica_settings.cluster, replica_settings.seed) == (
        settings.model, settings.rollout, settings.cluster, settings.seed
    )  # fmt: skip
    assert replica_settings.policy_dtype == settings.policy_dtype
    assert replica_settings.weight_sync.transport == "shm"


def test_the_engine_fingerprint_covers_all_files_but_the_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_model("tiny", resolve_cache_folder(Settings())), tmp_path / "policy"))
    fingerprints = [_fingerprint_engine(folder)]
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert _fingerprint_engine(folder) == fingerprints[0]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text(f"another {name}")
        fingerprints.append(_fingerprint_engine(folder))
    (folder / "tokenizer.json").unlink()  # some tokenizers have another file
    assert len({*fingerprints, _fingerprint_engine(folder)}) == 6
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"policy has no config\.json"):
        _fingerprint_engine(folder)


def test_the_salt_and_the_log_folder_survive_a_restart(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RLUF_USER_SALT", "RLUF_SERVE_SALT"):
        monkeypatch.delenv(variable, raising=False)
    settings = make_settings(model_folder, tmp_path)
    assert load_or_create_salt(settings) == load_or_create_salt(settings)
    assert len(load_or_create_salt(settings)) == 32
    assert (get_log_folder(settings) / "salt").stat().st_mode & 0o077 == 0
    assert get_log_folder(settings) == Path(get_feedback_root(settings)) / ".log"
    remote_settings = make_settings(model_folder, tmp_path, feedback_path="s3://bucket/log")
    assert get_log_folder(remote_settings).parent == tmp_path / "quickstart"
    monkeypatch.setenv("RLUF_SERVE_SALT", "legacy")
    assert load_or_create_salt(settings) == b"legacy"
    monkeypatch.setenv("RLUF_USER_SALT", "salt")
    assert load_or_create_salt(settings) == b"salt"


def test_a_salt_that_a_crash_left_empty_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RLUF_USER_SALT", "RLUF_SERVE_SALT"):
        monkeypatch.delenv(variable, raising=False)
    settings = Settings.model_validate({"run": {"root": str(tmp_path)}})
    salt_file = get_log_folder(settings) / "salt"
    salt_file.parent.mkdir(parents=True)
    salt_file.touch()
    assert len(load_or_create_salt(settings)) == 32
    assert load_or_create_salt(settings) == salt_file.read_bytes()
    assert salt_file.stat().st_mode & 0o077 == 0
    assert [path.name for path in salt_file.parent.iterdir()] == ["salt"]


async def test_a_scorer_replaces_models_between_batches_and_keeps_them_if_loading_fails(
    model_folder: Path, tmp_path: Path
) -> None:
    items = make_items(6)
    other_folder = write_models(tmp_path / "other", 5)
    first_settings, other_settings = make_settings(model_folder, tmp_path), make_settings(other_folder, tmp_path)
    first_config = build_scorer_config(first_settings, list_configured_reward_folders(first_settings))
    other_config = build_scorer_config(other_settings, list_configured_reward_folders(other_settings))
    scorer = ScorerDeployment()
    await scorer.reconfigure(first_config)
    await scorer.reconfigure({**first_config, "version": "broken", "models": {"love": {"path": str(tmp_path)}}})
    version, scores = await scorer.score_batch(items)
    assert version == first_config["version"]
    assert [value for value, *_ in scores["love"]] == pytest.approx(
        [expected["love"][0] for expected in score_offline(model_folder, items)], abs=1e-4
    )
    await scorer.reconfigure(other_config)
    served_versions = []
    async with asyncio.timeout(30):
        while version != other_config["version"]:
            version, scores = await scorer.score_batch(items)
            served_versions.append(version)
    assert [value for value, *_ in scores["love"]] == pytest.approx(
        [expected["love"][0] for expected in score_offline(other_folder, items)], abs=1e-4
    )
    assert set(served_versions) <= {first_config["version"], other_config["version"]}


class GatedModels:
    """Stand-in for LoadedModels whose constructor waits for a gate per version."""

    gates: dict[str, threading.Event]

    def __init__(self, scorer_config: Mapping[str, Any]) -> None:
        self.version, self.model_facts = scorer_config["version"], dict[str, Any]()
        GatedModels.gates.setdefault(self.version, threading.Event()).wait(20)


async def test_of_two_pending_scorer_changes_the_newest_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rluf.serve.deployments, "LoadedModels", GatedModels)
    GatedModels.gates = {}

    def open_gate(version: str) -> None:
        GatedModels.gates.setdefault(version, threading.Event()).set()

    open_gate("one")
    scorer = ScorerDeployment()
    await scorer.reconfigure({"version": "one"})
    for requested_versions, served_version in ((("two", "three"), "three"), (("four", "three"), "three")):
        for version in requested_versions:
            await scorer.reconfigure({"version": version})
        open_gate(requested_versions[1])
        await asyncio.sleep(0.1)
        open_gate(requested_versions[0])
        await asyncio.gather(*scorer._change_tasks)
        assert (await scorer.describe())["version"] == served_version
