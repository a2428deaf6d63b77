"""Responses of the base policy that later runs reuse: only for the same model, prompts and sampling."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from rluf.config.load import load_settings
from rluf.train.response_cache import ResponseCache
from rluf.types import Group, Prompt, Sample

PROMPTS = [
    Prompt(str(index), ({"role": "user", "content": "Hi"},), (3, 4 + index), "chat", "test") for index in range(3)
]
GROUPS = [
    Group(
        prompt,
        tuple(
            Sample(prompt.id, prompt.token_ids, (5, 6, sample), (-0.5, -1e-7, -2.25), ((0, 0),), "stop", "Grüße \ufffd")
            for sample in range(2)
        ),
        0,
    )
    for prompt in PROMPTS
]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def open_cache(model_folder: Path, *overrides: str) -> ResponseCache:
    settings = load_settings(None, [f"run.cache={model_folder.parent}", "model.dtype=float32", *overrides]).settings
    return ResponseCache.open(settings, model_folder)


def test_saved_responses_load_unchanged_and_in_the_order_of_the_prompts(model_folder: Path) -> None:
    cache = open_cache(model_folder)
    assert cache.load(PROMPTS, 2, 1, 0.6) is None
    cache.save(GROUPS, 2, 1, 0.6)
    assert open_cache(model_folder).load(PROMPTS, 2, 1, 0.6) == GROUPS


@pytest.mark.parametrize("arguments", [(1, 1, 0.6), (2, 2, 0.6), (2, 1, 0.7)])
def test_other_samples_seeds_and_temperatures_are_sampled(
    model_folder: Path, arguments: tuple[int, int, float]
) -> None:
    cache = open_cache(model_folder)
    cache.save(GROUPS, 2, 1, 0.6)
    assert cache.load(PROMPTS, *arguments) is None


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[:2],
        PROMPTS[::-1],
        [dataclasses.replace(PROMPTS[0], token_ids=(9,)), *PROMPTS[1:]],
        [dataclasses.replace(PROMPTS[0], id="other"), *PROMPTS[1:]],
    ],
)
def test_other_prompts_are_sampled(model_folder: Path, prompts: list[Prompt]) -> None:
    cache = open_cache(model_folder)
    cache.save(GROUPS, 2, 1, 0.6)
    assert cache.load(prompts, 2, 1, 0.6) is None


@pytest.mark.parametrize(
    "override",
    ["rollout.max_response_tokens=9", "rollout.stop=[END]", "model.dtype=bfloat16", "run.deterministic=true"],
)
def test_other_settings_of_the_engine_are_sampled(model_folder: Path, override: str) -> None:
    open_cache(model_folder).save(GROUPS, 2, 1, 0.6)
    assert open_cache(model_folder, override).load(PROMPTS, 2, 1, 0.6) is None


@pytest.mark.parametrize(
    "override", ["objectives.love.weight=0", "algorithm.kl_coef=0.1", "learner.learning_rate=1e-4"]
)
def test_objectives_and_learner_do_not_matter(model_folder: Path, override: str) -> None:
    open_cache(model_folder).save(GROUPS, 2, 1, 0.6)
    assert open_cache(model_folder, override).load(PROMPTS, 2, 1, 0.6) == GROUPS


@pytest.mark.parametrize("change", ["content", "touched", "added"])
def test_a_changed_model_is_sampled(model_folder: Path, change: str) -> None:
    open_cache(model_folder).save(GROUPS, 2, 1, 0.6)
    if change == "content":
        (model_folder / "model.safetensors").write_bytes(b"other weights")
    elif change == "touched":
        os.utime(model_folder / "model.safetensors", (1, 1))
    else:
        (model_folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    assert open_cache(model_folder).load(PROMPTS, 2, 1, 0.6) is None


@pytest.mark.parametrize("content", ["{", '{"samples": [{}]}\n' * 3, '{"rows": []}\n' * 3, "[]\n[]\n[]\n", ""])
def test_a_broken_file_is_sampled_again(model_folder: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(model_folder)
    cache.save(GROUPS, 2, 1, 0.6)
    (path,) = cache.folder.iterdir()
    path.write_text(content, "utf-8")
    with caplog.at_level(logging.WARNING):
        assert cache.load(PROMPTS, 2, 1, 0.6) is None
    cache.save(GROUPS, 2, 1, 0.6)
    assert cache.load(PROMPTS, 2, 1, 0.6) == GROUPS


def test_a_file_that_cannot_be_opened_is_sampled_again(model_folder: Path) -> None:
    cache = open_cache(model_folder)
    cache.save(GROUPS, 2, 1, 0.6)
    (path,) = cache.folder.iterdir()
    path.unlink()
    path.mkdir()
    assert cache.load(PROMPTS, 2, 1, 0.6) is None
