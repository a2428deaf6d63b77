"""The whole service on a real Ray Serve: same scores, model swaps, killed replicas, durable feedback."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from rluf.config.settings import Settings
from rluf.serve.client import RewardClient
from tests.serve.conftest import OBJECTIVES, TOKEN, find_free_port, make_items, score_offline, write_models
from tests.shared_ray import SharedRay

pytestmark = pytest.mark.slow

ITEMS = make_items(16)


def list_replica_pids(deployment_name: str) -> list[int]:
    """Process ids of a deployment's replicas in the Ray started by this process."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:rluf:{deployment_name}"):
                pids.append(process.pid)
    return pids


@dataclass
class Service:
    """A running service, its settings, and the expected love scores of its two model versions."""

    settings: Settings
    service_url: str
    folders: dict[str, Path]
    expected_values: dict[str, list[float]] = field(default_factory=dict)

    def deploy(self, name: str, **serve_overrides: object) -> None:
        from rluf.serve.__main__ import start_service

        values = self.settings.model_dump(mode="json")
        for objective in OBJECTIVES:
            values["objectives"][objective] = {"path": str(self.folders[name] / objective), "weight": 0.3}
        values["serve"] |= serve_overrides
        start_service(Settings.model_validate(values))

    def versions(self) -> dict[str, str]:
        with RewardClient(self.service_url, token=TOKEN) as client:
            return {model.role: model.version for model in client.list_models() if model.kind == "reward"}


@pytest.fixture(scope="module")
def service(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, shared_ray: SharedRay) -> Iterator[Service]:
    from ray import serve

    folder, port = tmp_path_factory.mktemp("service"), find_free_port()
    os.environ["RLUF_SERVE_TOKEN"] = TOKEN
    settings = Settings.model_validate(
        {
            "name": "served",
            "run": {"root": str(folder)},
            "cluster": {"threads_per_actor": 1},
            "serve": {
                "port": port,
                "reaction_window_s": 600,
                "feedback_path": str(folder / "log"),
            },
        }
    )
    other_folder = write_models(folder / "other", 7)
    service = Service(settings, f"http://127.0.0.1:{port}", {"first": model_folder, "other": other_folder})
    service.expected_values = {
        name: [scores["love"][0] for scores in score_offline(path, ITEMS)] for name, path in service.folders.items()
    }
    with shared_ray.connect({"RLUF_SERVE_TOKEN": TOKEN}):
        service.deploy("first")
        yield service
        serve.shutdown()
    del os.environ["RLUF_SERVE_TOKEN"]


class LoadGenerator(threading.Thread):
    """Sends requests without a pause; records (version, item index, value) of replies and the status of rejections."""

    def __init__(self, service_url: str) -> None:
        super().__init__(daemon=True)
        self.service_url, self.is_running = service_url, True
        self.replies: list[tuple[str, int, float]] = []
        self.rejections: list[int] = []

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=self.service_url, headers=headers, timeout=60) as http_client:
            item_index = 0
            while self.is_running:
                item_index = (item_index + 1) % len(ITEMS)
                messages, response_text, is_truncated, *_ = ITEMS[item_index]
                body = {"messages": messages, "response": response_text}
                body["finish_reason"] = "length" if is_truncated else "stop"
                reply = http_client.post("/v1/score", json=body)
                if reply.status_code == 200:
                    body = reply.json()
                    self.replies.append((body["model_version"], item_index, body["scores"]["love"]["value"]))
                else:
                    self.rejections.append(reply.status_code)

    def stop(self) -> None:
        self.is_running = False
        self.join(30)


def find_wrong_replies(load: LoadGenerator, expected_values: dict[str, list[float]]) -> list[tuple[str, int, float]]:
    """Replies that differ from the offline score of the version that they name."""
    return [reply for reply in load.replies if abs(expected_values[reply[0]][reply[1]] - reply[2]) > 1e-4]


def score_as_user(service: Service, index: int) -> str:
    """Model version that scores an item for this user."""
    item = ITEMS[index % len(ITEMS)]
    answer = httpx.post(
        f"{service.service_url}/v1/score",
        json={"messages": list(item.messages), "response": item.response, "user": f"user-{index}"},
        headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


def test_served_scores_equal_offline_scores(service: Service) -> None:
    with RewardClient(service.service_url, token=TOKEN) as client:
        batch_replies = client.score_batch(ITEMS)
        single_reply = client.score(ITEMS[2].messages, ITEMS[2].response)
    assert [reply.scores["love"].value for reply in batch_replies] == pytest.approx(
        service.expected_values["first"], abs=1e-4
    )
    assert single_reply.scores["love"].value == pytest.approx(service.expected_values["first"][2], abs=1e-4)


def test_new_models_replace_the_old_ones_without_a_failed_request(service: Service) -> None:
    first = service.versions()["live"]
    load = LoadGenerator(service.service_url)
    load.start()
    gateway_pids = list_replica_pids("gateway")
    service.deploy("other")
    deadline = time.monotonic() + 60
    while service.versions()["live"] == first and time.monotonic() < deadline:
        time.sleep(0.1)
    second = service.versions()["live"]
    service.deploy("other", candidate=str(service.folders["first"]), canary_share=0.5)
    while "candidate" not in service.versions() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    load.stop()
    assert load.rejections == []
    assert (
        find_wrong_replies(load, {first: service.expected_values["first"], second: service.expected_values["other"]})
        == []
    )
    assert {version for version, _, _ in load.replies} == {first, second}
    assert service.versions() == {"live": second, "candidate": first}
    assert list_replica_pids("gateway") == gateway_pids
    served_versions = [[score_as_user(service, index) for index in range(16)] for _ in range(2)]
    assert served_versions[0] == served_versions[1]  # a user stays with a version
    assert set(served_versions[0]) == {first, second}


def test_a_killed_scorer_loses_no_reply_and_a_killed_feedback_writer_no_row(service: Service) -> None:
    versions = service.versions()
    expected_values = {versions["live"]: service.expected_values["other"]}
    expected_values[versions.get("candidate", versions["live"])] = service.expected_values["first"]
    load = LoadGenerator(service.service_url)
    load.start()
    (victim,) = list_replica_pids("scorer-live")
    os.kill(victim, signal.SIGKILL)
    record = {
        "conversation_id": "c", "turn": 0, "user_id": "ann", "time": "2026-01-31T12:00:00Z", "model_version": "m",
        "messages": [{"role": "user", "content": "Hi"}], "response": "Hello",
    }  # fmt: skip
    acknowledged, rejections = set(), []
    with httpx.Client(
        base_url=service.service_url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
    ) as http_client:
        for number in range(30):
            if number == 10:
                (victim,) = list_replica_pids("feedback-writer")
                os.kill(victim, signal.SIGKILL)
            body = {"id": f"row-{number}", "reaction": "love", "record": {**record, "conversation_id": f"c{number}"}}
            response = http_client.post("/v1/feedback", json=body)
            if response.status_code == 200:
                acknowledged.add(f"row-{number}")
            else:
                rejections.append(response.status_code)
                time.sleep(0.2)
    load.stop()
    assert set(load.rejections) | set(rejections) <= {429, 503}
    assert find_wrong_replies(load, expected_values) == []
    assert len(acknowledged) >= 10
    log_bytes = b"".join(
        path.read_bytes()
        for path in (Path(str(service.settings.serve.feedback_path)) / ".log").glob("open_rows.sqlite3*")
    )
    assert [row_id for row_id in sorted(acknowledged) if f'"{row_id}"'.encode() not in log_bytes] == []


def test_a_killed_gateway_restarts_and_the_client_waits_for_it(service: Service) -> None:
    (victim,) = list_replica_pids("gateway")
    os.kill(victim, signal.SIGKILL)
    with RewardClient(service.service_url, token=TOKEN, max_attempts=20) as client:
        value = client.score(ITEMS[2].messages, ITEMS[2].response).scores["love"].value
    assert min(abs(value - expected[2]) for expected in service.expected_values.values()) < 1e-4
    assert list_replica_pids("gateway") != [victim]


def test_the_train_loop_scores_with_the_service(service: Service) -> None:
    import ray

    from actors.reward import RewardActor
    from rluf.types import Group, Prompt, Sample

    values = {"objectives": {"love": {"source": "serve", "path": service.service_url, "weight": 1.0}}}
    actor = ray.remote(num_cpus=0.1, max_concurrency=8)(RewardActor).remote(
        Settings.model_validate(values).model_dump_json(), {"love": None}
    )
    item = ITEMS[3]
    sample = Sample("p", (1,), (2,), (-0.1,), ((0, 0),), "length" if item.is_truncated else "stop", item.response)
    group = Group(Prompt("p", tuple(item.messages), (1,), "chat", "train"), (sample,), 0)
    (score,) = ray.get(actor.score_group.remote(group))["love"]
    assert min(abs(score.value - expected[3]) for expected in service.expected_values.values()) < 1e-4
    ray.kill(actor)
