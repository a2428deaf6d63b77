"""The reward actor on a real Ray: models, judges, batching, clear errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.reward import RewardActor
from rluf.config.settings import Settings
from rluf.errors import ModelError, SettingsError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import build_text_encoder, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.types import Group, Prompt, Sample, ScoringItem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_folder = tmp_path_factory.mktemp("reward")
    folder = work_folder / "model"
    backbone = resolve_model("tiny-encoder", work_folder / "cache")
    model = load_classifier(backbone, require_all_weights=False, seed=1)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    build_text_encoder(model, backbone, 96).tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 96).save(folder)
    return folder


@pytest.fixture
def start_actor(local_ray: None) -> Iterator[Any]:
    """Start a reward actor as the driver does; ended after the test."""
    actors: list[Any] = []

    def start(objective: str, settings: Settings, path: Path | None) -> Any:
        remote_class = ray.remote(num_cpus=0.2, max_concurrency=64)(RewardActor)
        folders = {objective: None if path is None else str(path)}
        actors.append(remote_class.remote(settings.model_dump_json(), folders))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


def make_group(index: int, texts: tuple[str, ...]) -> Group:
    prompt = Prompt(f"p{index}", ({"role": "user", "content": f"Question {index}?"},), (1, 2), "chat", "train")
    samples = tuple(Sample(prompt.id, (1, 2), (3,), (-0.1,), ((0, 0),), "stop", text) for text in texts)
    return Group(prompt, samples, 0)


def test_concurrent_groups_are_batched_with_the_scores_of_single_groups(reward_folder: Path, start_actor: Any) -> None:
    actor = start_actor("love", Settings(), reward_folder)
    report = ray.get(actor.start.remote())
    assert (report["objective"], report["source"]) == ("love", "model")
    groups = [make_group(index, ("", "yes " * index, f"text {index}")) for index in range(12)]
    results = ray.get([actor.score_group.remote(group) for group in groups])
    model = RewardModel.load(reward_folder, batch_tokens=512)
    for group, scores in zip(groups, results, strict=True):
        expected = model.score([ScoringItem(group.prompt.messages, sample.text) for sample in group.samples], "love")
        for field in ("raw_logit", "value"):
            assert [getattr(score, field) for score in scores["love"]] == pytest.approx(
                [getattr(score, field) for score in expected], abs=1e-4
            )
    health = ray.get(actor.get_health.remote())
    assert health["scored"] == 36
    assert health["batches"] <= 12
    assert health["waiting"] == 0


def test_a_bad_folder_and_an_unknown_judge_are_clear_errors_and_judges_score(tmp_path: Path, start_actor: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ray.get(start_actor("love", Settings(), tmp_path).start.remote())
    overrides = {"objectives": {"safety": {"weight": 0.2, "source": "judge", "path": "refusal"}}}
    actor = start_actor("safety", Settings.model_validate(overrides), None)
    scores = ray.get(actor.score_group.remote(make_group(0, ("Hello!", "I cannot help with that."))))
    assert [score.value for score in scores["safety"]] == [1.0, 0.0]
    overrides["objectives"]["safety"]["path"] = "unknown"
    with pytest.raises(SettingsError, match="repetition"):
        ray.get(start_actor("safety", Settings.model_validate(overrides), None).start.remote())


async def test_scores_that_are_not_numbers_name_the_objective(reward_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_folder, tmp_path / "model"))
    model = load_classifier(folder, require_all_weights=True)
    torch.nn.init.constant_(model.classifier.weight, torch.nan)
    model.save_pretrained(str(folder))
    actor = RewardActor(Settings().model_dump_json(), {"love": str(folder)})
    with pytest.raises(ModelError, match=r"objective love: 2 of 2 scores are not finite, the first nan"):
        await actor.score_group(make_group(0, ("good", "bad")))
