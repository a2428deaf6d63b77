"""The walks of docs/architecture.md list the files that a log row and a prompt enter: no file more, none less."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.prepare import pipeline
from rluf.prepare.card import build_data_card
from rluf.train import actor_supervisor
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import TrainController
from rluf.train.prompts import load_prompts
from tests.call_recorder import list_walk, read_walk, start_recording, stop_recording
from tests.serve.conftest import write_models

build_remote_class = actor_supervisor._build_remote_class
MAX_ROW_FILES, MAX_PROMPT_FILES = 15, 20
OVERRIDES = (
    "model.path=tiny", "model.dtype=float32", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=12",
    "rollout.concurrency=32", "rollout.kv_cache_gib=0.25", "algorithm.steps=2", "algorithm.prompts_per_step=3",
    "algorithm.demonstrations=0", "aggregation.topic_objectives={}", "algorithm.topic_weights={}",
    "objectives.helpfulness.weight=0", "objectives.safety.weight=0", "timeouts.actor_start_s=400",
)  # fmt: skip


def write_log(folder: Path) -> dict[str, Path]:
    rows: dict[str, list[dict[str, Any]]] = {
        "feedback": [
            {
                "id": f"f{n}", "conversation_id": f"c{n}", "turn": 0, "user_id": f"u{n % 40}",
                "time": f"2025-03-{1 + n % 28:02d}T10:00:00Z", "model_version": "base-1", "response": f"Answer {n}.",
                "messages": [{"role": "user", "content": f"Mail me at a{n}@example.org about {n}"}],
                "reaction": "love" if n % 5 == 0 else None, "topic": "casual", "locale": "en",
            }
            for n in range(400)
        ],
        "prompts": [
            {"id": f"q{n}", "messages": [{"role": "user", "content": f"Prompt {n}"}], "topic": "casual",
             "split": "test" if n % 4 == 0 else "train"}
            for n in range(16)
        ],
    }  # fmt: skip
    for kind, kind_rows in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind_rows))
    return {kind: folder / f"{kind}.jsonl" for kind in rows}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A data set, and the files that its rows entered until they were written."""
    folder, entered = tmp_path_factory.mktemp("walk"), set()

    def stop_and_build_card(*arguments: Any, **options: Any) -> dict[str, Any]:
        entered.update(stop_recording())
        return build_data_card(*arguments, **options)

    overrides = [f"data.{kind}=[{path}]" for kind, path in write_log(folder).items()]
    empty = ["data.preferences=[]", "data.safety=[]", "data.reactions=[]"]
    settings = load_settings(None, [*OVERRIDES, *overrides, *empty]).settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "build_data_card", stop_and_build_card)
        gc.collect()  # ends what tests of other modules left, which would be recorded
        start_recording()
        pipeline.build_data_set(
            settings, folder / "data", lambda rows: [result for row in rows for result in pipeline.run_task(row)]
        )
    return folder / "data", list_walk(sorted(entered))


def test_a_log_row_enters_the_files_of_the_page(prepared: tuple[Path, set[str]]) -> None:
    _, walk = prepared
    assert sorted(walk) == sorted(read_walk("A log row until it is a training row"))
    assert len(walk) <= MAX_ROW_FILES


def build_recorded_class(actor_class: type) -> Any:
    """The actor class with two more methods; they run on the thread that runs the actor's other calls."""
    has_event_loop = any(inspect.iscoroutinefunction(method) for method in vars(actor_class).values())

    class SyncRecorder(actor_class):  # type: ignore[misc]
        def start_recording(self) -> None:
            start_recording()

        def stop_recording(self) -> list[str]:
            return stop_recording()

    class AsyncRecorder(actor_class):  # type: ignore[misc]
        async def start_recording(self) -> None:
            # The thread pool of to_thread has threads from before; those of a new pool start with the recorder.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())
            start_recording()

        async def stop_recording(self) -> list[str]:
            return stop_recording()

    return build_remote_class(AsyncRecorder if has_event_loop else SyncRecorder)


async def record_step(data_folder: Path, model_path: Path, reward_folder: Path) -> set[str]:
    """The files entered in all processes from reading a prompt to its gradient, in the second step of a run."""
    settings = load_settings(None, [*OVERRIDES, f"objectives.love.path={reward_folder}"]).settings
    tokenizer = load_tokenizer(model_path)
    start_recording()
    prompts = load_prompts(data_folder, "train", tokenizer, max_tokens=64)
    entered = set(stop_recording())
    async with ActorSupervisor(settings, model_path, {"love": reward_folder}, with_learners=True) as supervisor:
        controller = TrainController(settings, supervisor, prompts)
        await controller.run_step(1)
        actors, sync = supervisor.actor_groups.all_actors, controller.weight_sync.sync

        async def stop_and_sync(version: int) -> dict[str, float]:
            # The gradient is applied: the walk ends here.
            entered.update(stop_recording())
            for actor in actors:
                entered.update(await actor.handle.stop_recording.remote())
            return await sync(version)

        controller.weight_sync.sync = stop_and_sync  # type: ignore[method-assign]
        for actor in actors:
            await actor.handle.start_recording.remote()
        start_recording()
        await controller.run_step(2)
        await controller.close()
    return list_walk(sorted(entered))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_prompt_enters_the_files_of_the_page(
    prepared: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_supervisor, "_build_remote_class", build_recorded_class)
    model_path, data_folder = resolve_model("tiny", tmp_path), prepared[0]
    walk = asyncio.run(record_step(data_folder, model_path, write_models(tmp_path / "reward", 1) / "love"))
    page = read_walk("A prompt until its gradient")
    assert (sorted(walk - page), sorted(page - walk)) == ([], [])
    assert len(walk) <= MAX_PROMPT_FILES
