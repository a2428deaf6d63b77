"""The reward actor in a real Ray: models, judges, micro-batching, clear errors."""

from __future__ import annotations

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
from rluf.reward.backbone import encoder_for, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.types import Group, Prompt, Sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    backbone = resolve_model("tiny-encoder", folder / "cache")
    model = load_classifier(backbone, trained=False, seed=1)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    encoder_for(model, backbone, 96).tokenizer.save_pretrained(str(folder / "model"))
    model.save_pretrained(str(folder / "model"))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 96).save(folder / "model")
    return folder / "model"


@pytest.fixture
def actors(local_ray: None) -> Iterator[Any]:
    """Start a reward actor as the driver does; ended after the test."""
    started: list[Any] = []

    def start(objective: str, settings: Settings, path: Path | None) -> Any:
        remote = ray.remote(num_cpus=0.2, max_concurrency=64)(RewardActor)
        started.append(remote.remote(settings.model_dump_json(), {objective: None if path is None else str(path)}))
        return started[-1]

    yield start
    for actor in started:
        ray.kill(actor)


def _group(number: int, texts: tuple[str, ...]) -> Group:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": f"Question {number}?"},), (1, 2), "chat", "train")
    samples = tuple(Sample(prompt.id, (1, 2), (3,), (-0.1,), ((0, 0),), "stop", text) for text in texts)
    return Group(prompt, samples, 0)


def test_groups_are_scored_in_order_together_and_as_alone(checkpoint: Path, actors: Any) -> None:
    actor = actors("love", Settings(), checkpoint)
    ready = ray.get(actor.ready.remote())
    assert (ready["objective"], ready["source"]) == ("love", "model")
    groups = [_group(number, ("", "yes " * number, f"text {number}")) for number in range(12)]
    found = ray.get([actor.score.remote(group) for group in groups])
    model = RewardModel.load(checkpoint, batch_tokens=512)
    for group, scores in zip(groups, found, strict=True):
        alone = model.score([(group.prompt.messages, sample.text) for sample in group.samples], "love")
        assert [score.raw for score in scores["love"]] == pytest.approx([score.raw for score in alone], abs=1e-4)
        assert [score.value for score in scores["love"]] == pytest.approx([score.value for score in alone], abs=1e-4)
    health = ray.get(actor.health.remote())
    assert health["scored"] == 36
    assert health["batches"] <= 12
    assert health["waiting"] == 0


def test_bad_folder_and_unknown_judge_raise_our_errors_and_judges_score(tmp_path: Path, actors: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ray.get(actors("love", Settings(), tmp_path).ready.remote())
    judged = {"objectives": {"safety": {"weight": 0.2, "source": "judge", "judge": "refusal"}}}
    actor = actors("safety", Settings.model_validate(judged), None)
    scores = ray.get(actor.score.remote(_group(0, ("Hello!", "I cannot help with that."))))
    assert [score.verdict for score in scores["safety"]] == [True, False]
    judged["objectives"]["safety"]["judge"] = "nobody"
    with pytest.raises(SettingsError, match="repetition"):
        ray.get(actors("safety", Settings.model_validate(judged), None).ready.remote())
