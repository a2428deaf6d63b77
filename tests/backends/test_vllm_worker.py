"""Weight receiving inside a vLLM worker: loaded, checked, and problems recorded instead of raised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rluf.backends.vllm import worker
from rluf.backends.weight_transfer import RECEIVED_TRANSPORTS
from rluf.backends.weight_transfer.shm import ShmSender

WEIGHTS = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5)}


class RecordingModel(torch.nn.Module):  # type: ignore[misc]
    """A model that records the weights that are loaded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded.update(weights)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.CheckedTransferEngine:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    # The layerwise reload of vLLM needs one of its own models.
    monkeypatch.setattr(worker, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(worker, "finalize_layerwise_reload", lambda model, config: None)
    model_config = SimpleNamespace(model=str(tmp_path), hf_config=SimpleNamespace(tie_word_embeddings=False))
    vllm_config: Any = SimpleNamespace(parallel_config=None, model_config=model_config)
    config: Any = SimpleNamespace(backend="rluf_shm")
    return worker.CheckedTransferEngine(config, vllm_config, torch.device("cpu"), RecordingModel())


def connect(engine: worker.CheckedTransferEngine, sender: ShmSender) -> None:
    engine.init_transfer_engine(engine.parse_init_info({"transfer_info": sender.begin(1)}))
    engine.start_weight_update()


def receive(engine: worker.CheckedTransferEngine, sender: ShmSender, weights: dict[str, torch.Tensor]) -> None:
    bucket_info = sender.send_bucket(list(weights.items()))
    engine.receive_weights(engine.parse_update_info({"bucket_info": bucket_info}))


def test_every_transport_is_registered_with_vllm() -> None:
    for transport in RECEIVED_TRANSPORTS:
        assert WeightTransferEngineFactory._registry[f"rluf_{transport}"]() is worker.CheckedTransferEngine


def test_a_complete_update_is_loaded(engine: worker.CheckedTransferEngine) -> None:
    sender = ShmSender()
    connect(engine, sender)
    for name, tensor in WEIGHTS.items():
        receive(engine, sender, {name: tensor})
    engine.finish_weight_update()
    assert engine.problem is None
    assert all(torch.equal(engine.model.loaded[name], tensor) for name, tensor in WEIGHTS.items())
    engine.shutdown()
    sender.close()


def test_problems_are_recorded_and_the_rest_is_skipped(engine: worker.CheckedTransferEngine) -> None:
    sender = ShmSender()
    connect(engine, sender)
    receive(engine, sender, {"c.weight": torch.zeros(2)})
    assert "c.weight, which the engine's checkpoint does not contain" in str(engine.problem)
    receive(engine, sender, WEIGHTS)
    engine.finish_weight_update()
    assert engine.model.loaded == {} and "c.weight" in str(engine.problem)
    engine.start_weight_update()
    receive(engine, sender, {"a.weight": WEIGHTS["a.weight"]})
    engine.finish_weight_update()
    assert "1 of 2 tensors were not sent: b.weight" in str(engine.problem)
    sender.close()


def test_a_learner_on_another_machine_is_a_recorded_problem(engine: worker.CheckedTransferEngine) -> None:
    engine.init_transfer_engine(engine.parse_init_info({"transfer_info": {"machine": "other"}}))
    assert "runs on another machine or container" in str(engine.problem)


def test_a_rejected_bucket_is_received_where_the_sender_waits_for_it(engine: worker.CheckedTransferEngine) -> None:
    """As with NCCL, whose broadcast needs every rank."""
    sender = ShmSender()
    connect(engine, sender)
    received: list[Any] = []

    class WaitedForReceiver:
        receives_rejected = True

        def list_tensors(self, bucket_info: Any) -> list[Any]:
            return [("unknown", (1,))]

        def receive_bucket(self, bucket_info: Any, load_weights: Any) -> None:
            received.append(load_weights([("unknown", torch.zeros(1))]))

    engine._receiver = WaitedForReceiver()  # type: ignore[assignment]
    engine.receive_weights(engine.parse_update_info({"bucket_info": {}}))
    assert received == [None] and engine.model.loaded == {} and "unknown" in str(engine.problem)
    sender.close()


@pytest.mark.parametrize("executor", [worker.RlufUniProcExecutor, worker.RlufMultiprocExecutor])
def test_the_watch_of_the_parent_starts_before_the_model_is_loaded(
    executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only at import, when the core does not know its parent yet; with one GPU and with several per engine."""
    calls: list[str] = []
    monkeypatch.setattr(worker, "exit_with_parent", lambda: calls.append("watch"))
    monkeypatch.setattr(executor.__base__, "_init_executor", lambda self: calls.append("load"))
    executor._init_executor(object.__new__(executor))
    assert calls == ["watch", "load"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("head_path", "is_loaded"),
    [("", False), ("lm_head", True), ("language_model.lm_head", True), ("score_head", False)],
)
def test_a_tied_head_is_loaded_where_the_engines_model_has_one(
    model_type: str, head_path: str, is_loaded: bool, engine: worker.CheckedTransferEngine, tmp_path: Path
) -> None:
    """Gemma has none in vLLM, which refuses the weight; the learner sends it all the same."""
    embedding_name = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[model_type]
    embedding = {embedding_name: torch.randn(3, 4)}
    save_file(embedding, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    engine.model_config.hf_config.tie_word_embeddings = True
    module = engine.model
    for name in head_path.split(".") if head_path else []:
        module.add_module(name, torch.nn.Module())
        module = module.get_submodule(name)
    sender = ShmSender()
    connect(engine, sender)
    receive(engine, sender, {**embedding, "lm_head.weight": embedding[embedding_name]})
    engine.finish_weight_update()
    assert engine.problem is None
    assert set(engine.model.loaded) == {*embedding, *(["lm_head.weight"] if is_loaded else [])}
    sender.close()
