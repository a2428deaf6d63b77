"""From settings to what is deployed, and the scorer that changes its models; without Ray."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import rluf.serve.deployments
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.serve.application import (
    _policy,
    _shape,
    candidate_folders,
    chosen_models,
    feedback_root,
    given_folders,
    log_folder,
    salt_of,
)
from rluf.serve.deployments import Scorer
from rluf.serve.policy_deployment import Policy
from rluf.utils.paths import cache_dir
from tests.serve.conftest import OBJECTIVES, offline, some_items, write_models


def settings(folder: Path, root: Path, **serve: object) -> Settings:
    objectives = {name: {"path": str(folder / name), "weight": 0.3} for name in OBJECTIVES}
    return Settings.model_validate({"run": {"root": str(root)}, "objectives": objectives, "serve": serve})


def test_a_version_names_the_files_and_facts_come_from_the_cards(models: Path, tmp_path: Path) -> None:
    chosen = settings(models, tmp_path)
    first = chosen_models(chosen, given_folders(chosen))
    assert first["facts"]["love"]["mean_value"] == 0.25
    assert first["facts"]["love"]["max_tokens"] == 96
    copied = settings(shutil.copytree(models, tmp_path / "copy"), tmp_path)
    assert chosen_models(copied, given_folders(copied))["version"] == first["version"]
    (tmp_path / "copy" / "love" / "calibration.json").write_text('{"scale": 2.0}')
    assert chosen_models(copied, given_folders(copied))["version"] != first["version"]
    shutil.rmtree(tmp_path / "copy" / "love")
    with pytest.raises(ModelError, match=r"copy/love holds no config\.json"):
        chosen_models(copied, given_folders(copied))


def test_a_judge_is_served_too_and_a_missing_model_is_named(models: Path, tmp_path: Path) -> None:
    tree = settings(models, tmp_path).model_dump(mode="json")
    tree["objectives"]["safety"] = {"source": "judge", "judge": "refusal", "weight": 0.2}
    judged = Settings.model_validate(tree)
    chosen = chosen_models(judged, given_folders(judged))
    assert chosen["models"]["safety"] == {"judge": "refusal"}
    tree["objectives"]["love"]["path"] = None
    bare = Settings.model_validate(tree)
    with pytest.raises(ModelError, match=r"objectives\.love\.path"):
        chosen_models(bare, given_folders(bare))


def test_a_candidate_is_what_its_folder_holds(models: Path, tmp_path: Path) -> None:
    assert candidate_folders(settings(models, tmp_path)) is None
    shutil.copytree(models / "love", tmp_path / "new" / "love")
    assert candidate_folders(settings(models, tmp_path, candidate=str(tmp_path / "new"))) == {
        "love": tmp_path / "new" / "love"
    }
    with pytest.raises(ModelError, match=r"serve\.candidate"):
        candidate_folders(settings(models, tmp_path, candidate=str(tmp_path / "nothing")))


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LONG = ["rollout.max_prompt_tokens=1024", "rollout.max_response_tokens=512", "algorithm.micro_batch_tokens=8192"]


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        *((config, []) for config in CONFIGS),
        (None, LONG),
        (None, ["rollout.concurrency=2", "algorithm.samples_per_prompt=2"]),
    ],
)
def test_a_policy_replica_takes_whatever_settings_the_driver_took(config: Path | None, overrides: list[str]) -> None:
    chosen = load_settings(config, overrides).settings
    folder = resolve_model("tiny", cache_dir(chosen))
    (told,) = _policy(chosen, "some", folder, "1")._bound_deployment.init_args
    found = Policy(told)._settings
    assert (found.model, found.rollout, found.cluster, found.seed) == (
        chosen.model, chosen.rollout, chosen.cluster, chosen.seed
    )  # fmt: skip
    assert found.policy_dtype == chosen.policy_dtype
    assert found.publish.engine == "shm"


def test_an_engine_starts_anew_for_whatever_it_reads_once_and_not_for_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_model("tiny", cache_dir(Settings())), tmp_path / "policy"))
    seen = [_shape(folder)]
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert _shape(folder) == seen[0]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text(f"another {name}")
        seen.append(_shape(folder))
    (folder / "tokenizer.json").unlink()  # some tokenizers have another file
    assert len({*seen, _shape(folder)}) == 6
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"policy holds no config\.json"):
        _shape(folder)


def test_salt_and_log_last(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLUF_SERVE_SALT", raising=False)
    chosen = settings(models, tmp_path)
    assert salt_of(chosen) == salt_of(chosen)
    assert len(salt_of(chosen)) == 32
    assert (log_folder(chosen) / "salt").stat().st_mode & 0o077 == 0
    assert log_folder(chosen) == Path(feedback_root(chosen)) / ".log"
    far = settings(models, tmp_path, feedback="s3://bucket/log")
    assert log_folder(far).parent == tmp_path / "quickstart"
    monkeypatch.setenv("RLUF_SERVE_SALT", "given")
    assert salt_of(chosen) == "given"


async def test_a_scorer_changes_over_between_batches_and_keeps_what_it_has_when_it_cannot(
    models: Path, tmp_path: Path
) -> None:
    items = some_items(6)
    other = write_models(tmp_path / "other", 5)
    chosen = {
        name: chosen_models(s, given_folders(s))
        for name, s in (("first", settings(models, tmp_path)), ("other", settings(other, tmp_path)))
    }
    scorer = Scorer()
    await scorer.reconfigure(chosen["first"])
    await scorer.reconfigure({**chosen["first"], "version": "broken", "models": {"love": {"path": str(tmp_path)}}})
    version, found = await scorer.score(items)
    assert version == chosen["first"]["version"]
    assert [value for value, _, _ in found["love"]] == pytest.approx(
        [one["love"][0] for one in offline(models, items)], abs=1e-4
    )
    await scorer.reconfigure(chosen["other"])
    seen = []
    async with asyncio.timeout(30):
        while version != chosen["other"]["version"]:
            version, found = await scorer.score(items)
            seen.append(version)
    assert [value for value, _, _ in found["love"]] == pytest.approx(
        [one["love"][0] for one in offline(other, items)], abs=1e-4
    )
    assert set(seen) <= {chosen["first"]["version"], chosen["other"]["version"]}


class Loaded:
    """Reward models that take as long to load as their gate is shut."""

    gates: dict[str, threading.Event]

    def __init__(self, chosen: Mapping[str, Any]) -> None:
        self.version, self.facts = chosen["version"], dict[str, Any]()
        Loaded.gates.setdefault(self.version, threading.Event()).wait(20)


async def test_of_two_scorer_changes_the_last_asked_for_is_served_however_long_the_first_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rluf.serve.deployments, "Models", Loaded)
    Loaded.gates = {}

    def opened(name: str) -> None:
        Loaded.gates.setdefault(name, threading.Event()).set()

    opened("one")
    scorer = Scorer()
    await scorer.reconfigure({"version": "one"})
    for asked, kept in ((("two", "three"), "three"), (("four", "three"), "three")):
        for version in asked:
            await scorer.reconfigure({"version": version})
        opened(asked[1])
        await asyncio.sleep(0.1)
        opened(asked[0])
        await asyncio.gather(*scorer._changes)
        assert (await scorer.describe())["version"] == kept
