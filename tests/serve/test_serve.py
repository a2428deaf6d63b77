"""The whole service on a real Ray Serve: same scores, hot swap, dead replicas, feedback that lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from rluf.config.settings import Settings
from rluf.errors import SettingsError
from rluf.reward.text import Item
from rluf.serve.client import RewardClient
from tests.serve.conftest import OBJECTIVES, TOKEN, offline, some_items, write_models

pytestmark = pytest.mark.slow

ITEMS = some_items(16)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def replicas(name: str) -> list[int]:
    """Process ids of a deployment's replicas, on this process's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:rluf:{name}"):
                found.append(process.pid)
    return found


@dataclass
class Service:
    """A running service, its settings, and what its two versions of models answer."""

    settings: Settings
    url: str
    folders: dict[str, Path]
    truth: dict[str, list[float]] = field(default_factory=dict)

    def deploy(self, name: str, **changed: object) -> None:
        from rluf.serve.__main__ import serve

        models = {o: {"path": str(self.folders[name] / o), "weight": 0.3} for o in OBJECTIVES}
        told = self.settings.model_dump(mode="json")
        told["objectives"] |= models
        told["serve"] |= changed
        serve(Settings.model_validate(told))

    def versions(self) -> dict[str, str]:
        with RewardClient(self.url, token=TOKEN) as client:
            return {model.role: model.version for model in client.models() if model.kind == "reward"}


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import ray
    from ray import serve

    folder, port = tmp_path_factory.mktemp("service"), free_port()
    os.environ["RLUF_SERVE_TOKEN"] = TOKEN
    settings = Settings.model_validate(
        {
            "name": "served",
            "run": {"root": str(folder)},
            "cluster": {"threads": 1},
            "serve": {"port": port, "settle_s": 600, "rotate_s": 1, "deadline_s": 20, "feedback": str(folder / "log")},
        }
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    other = write_models(folder / "other", 7)
    found = Service(settings, f"http://127.0.0.1:{port}", {"first": models, "other": other})
    found.truth = {name: [one["love"][0] for one in offline(path, ITEMS)] for name, path in found.folders.items()}
    found.deploy("first")
    yield found
    del os.environ["RLUF_SERVE_TOKEN"]
    serve.shutdown()
    ray.shutdown()


class Load(threading.Thread):
    """Clients that ask without a pause; keeps (version, item, value) of each answer and the status of each refusal."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.going = url, True
        self.answers: list[tuple[str, int, float]] = []
        self.refused: list[int] = []

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60) as http:
            number = 0
            while self.going:
                number = (number + 1) % len(ITEMS)
                messages, response = ITEMS[number]
                told = http.post("/v1/score", json={"messages": messages, "response": response})
                if told.status_code == 200:
                    body = told.json()
                    self.answers.append((body["model_version"], number, body["scores"]["love"]["value"]))
                else:
                    self.refused.append(told.status_code)

    def end(self) -> None:
        self.going = False
        self.join(30)


def wrong(load: Load, truth: dict[str, list[float]]) -> list[tuple[str, int, float]]:
    """Answers that are not what the offline scorer gives for the version that they name."""
    return [(v, i, value) for v, i, value in load.answers if abs(truth[v][i] - value) > 1e-4]


def test_served_scores_equal_the_offline_scorer(service: Service) -> None:
    with RewardClient(service.url, token=TOKEN) as client:
        found = client.score_batch(ITEMS)
        one = client.score(*ITEMS[2])
    assert [reply.scores["love"].value for reply in found] == pytest.approx(service.truth["first"], abs=1e-4)
    assert one.scores["love"].value == pytest.approx(service.truth["first"][2], abs=1e-4)


def test_new_models_change_over_without_a_failed_request(service: Service) -> None:
    first = service.versions()["live"]
    load = Load(service.url)
    load.start()
    gateway = replicas("gateway")
    service.deploy("other")
    deadline = time.monotonic() + 60
    while service.versions()["live"] == first and time.monotonic() < deadline:
        time.sleep(0.1)
    second = service.versions()["live"]
    service.deploy("other", candidate=str(service.folders["first"]), canary_share=0.5)
    while "candidate" not in service.versions() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    load.end()
    assert load.refused == []
    assert wrong(load, {first: service.truth["first"], second: service.truth["other"]}) == []
    assert {version for version, _, _ in load.answers} == {first, second}
    assert service.versions() == {"live": second, "candidate": first}
    assert replicas("gateway") == gateway
    with RewardClient(service.url, token=TOKEN) as client:
        twice = [[client.score(*item).model_version for item in ITEMS] for _ in range(2)]
    assert twice[0] == twice[1]  # a conversation stays with its version
    assert set(twice[0]) == {first, second}


def test_a_killed_scorer_costs_time_but_no_answer_and_a_killed_ledger_no_row(service: Service) -> None:
    versions = service.versions()
    names = {versions["live"]: service.truth["other"]}
    names[versions.get("candidate", versions["live"])] = service.truth["first"]
    load = Load(service.url)
    load.start()
    (victim,) = replicas("scorer-live")
    os.kill(victim, signal.SIGKILL)
    record = {
        "conversation_id": "c", "turn": 0, "user_id": "ann", "time": "2026-01-31T12:00:00Z", "model_version": "m",
        "messages": [{"role": "user", "content": "Hi"}], "response": "Hello",
    }  # fmt: skip
    acknowledged, refused = set(), []
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        for number in range(30):
            if number == 10:
                (victim,) = replicas("ledger")
                os.kill(victim, signal.SIGKILL)
            body = {"id": f"row-{number}", "reaction": "love", "record": {**record, "conversation_id": f"c{number}"}}
            told = http.post("/v1/feedback", json=body)
            if told.status_code == 200:
                acknowledged.add(f"row-{number}")
            else:
                refused.append(told.status_code)
                time.sleep(0.2)
    load.end()
    assert set(load.refused) | set(refused) <= {429, 503}
    assert wrong(load, names) == []
    assert len(acknowledged) >= 10
    stored = b"".join(file.read_bytes() for file in (Path(str(service.settings.serve.feedback)) / ".log").glob("*.wal"))
    assert [id_ for id_ in sorted(acknowledged) if f'"{id_}"'.encode() not in stored] == []


def test_a_killed_gateway_comes_back_and_our_client_waits_for_it(service: Service) -> None:
    (victim,) = replicas("gateway")
    os.kill(victim, signal.SIGKILL)
    with RewardClient(service.url, token=TOKEN, attempts=20) as client:
        value = client.score(*ITEMS[2]).scores["love"].value
    assert min(abs(value - truth[2]) for truth in service.truth.values()) < 1e-4
    assert replicas("gateway") != [victim]


def test_the_train_loop_scores_with_the_service(service: Service) -> None:
    import ray

    from actors.reward import RewardActor
    from rluf.types import Group, Prompt, Sample

    told = {"objectives": {"love": {"source": "serve", "path": service.url, "weight": 1.0}}}
    actor = ray.remote(num_cpus=0.1, max_concurrency=8)(RewardActor).remote(
        Settings.model_validate(told).model_dump_json(), {"love": None}
    )
    item: Item = ITEMS[3]
    sample = Sample("p", (1,), (2,), (-0.1,), ((0, 0),), "stop", item[1])
    group = Group(Prompt("p", tuple(item[0]), (1,), "chat", "train"), (sample,), 0)
    (score,) = ray.get(actor.score.remote(group))["love"]
    assert min(abs(score.value - truth[3]) for truth in service.truth.values()) < 1e-4
    ray.kill(actor)


def test_beyond_this_machine_token_and_salt_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    from rluf.serve.application import check_secrets

    monkeypatch.delenv("RLUF_SERVE_TOKEN", raising=False)
    monkeypatch.delenv("RLUF_SERVE_SALT", raising=False)
    far = Settings.model_validate({"serve": {"host": "0.0.0.0"}})
    check_secrets(Settings())
    for name in ("RLUF_SERVE_TOKEN", "RLUF_SERVE_SALT"):
        with pytest.raises(SettingsError, match=name):
            check_secrets(far)
        monkeypatch.setenv(name, "x")
    check_secrets(far)
