"""Errors of vLLM are reported with their whole message and the innermost cause."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from rluf.backends.vllm.engine import describe_memory_advice, format_cause


class Picky(BaseModel):
    size: int = 0

    @model_validator(mode="after")
    def check(self) -> Picky:
        raise ValueError("chunked prefill is required for this model")


def test_the_reason_of_a_validation_error_is_kept() -> None:
    try:
        Picky()
    except ValidationError as error:
        message = format_cause(error)
    assert "chunked prefill is required for this model" in message
    assert "errors.pydantic.dev" not in message and "input_value" not in message


def test_the_innermost_cause_is_named() -> None:
    try:
        try:
            raise KeyError("lm_head.weight")
        except KeyError as cause:
            raise RuntimeError("core failed\nsee the log") from cause
    except RuntimeError as error:
        assert format_cause(error) == "RuntimeError: core failed see the log, caused by KeyError: 'lm_head.weight'"
    assert format_cause(MemoryError()) == "MemoryError: no message"


def make_error(kind: str) -> BaseException:
    error, cause = RuntimeError("core failed"), KeyError("lm_head.weight")
    if kind == "group":
        return ExceptionGroup("unhandled errors in a TaskGroup", [cause])
    if kind == "handled":
        error.__context__, error.__suppress_context__ = cause, True  # raise ... from None
    if kind == "context":
        error.__context__ = cause
    if kind == "circle":
        error.__cause__, cause.__cause__ = cause, error
    if kind == "itself":
        error.__cause__ = error
    if kind == "group inside":
        error.__cause__ = ExceptionGroup("several", [ValueError("outer"), cause])
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "group",
            "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception), caused by KeyError: 'lm_head.weight'",
        ),
        ("handled", "RuntimeError: core failed"),
        ("context", "RuntimeError: core failed, caused by KeyError: 'lm_head.weight'"),
        ("circle", "RuntimeError: core failed, caused by KeyError: 'lm_head.weight'"),
        ("itself", "RuntimeError: core failed"),
        ("group inside", "RuntimeError: core failed, caused by ValueError: outer"),
    ],
)
def test_the_cause_is_found_in_every_kind_of_chain(kind: str, expected: str) -> None:
    assert format_cause(make_error(kind)) == expected


@pytest.mark.parametrize(
    ("reason", "cpu_advice", "gpu_advice"),
    [
        ("MemoryError: no message", "lower rollout.kv_cache_gib", "lower rollout.gpu_memory_share"),
        (
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "lower rollout.kv_cache_gib",
            "lower rollout.gpu_memory_share",
        ),
        ("OSError: [Errno 12] Cannot allocate memory", "lower rollout.kv_cache_gib", "lower rollout.gpu_memory_share"),
        (
            "ValueError: Free memory on device (3.1/23.5 GiB) on startup is less than desired GPU memory utilization",
            "lower rollout.kv_cache_gib",
            "lower rollout.gpu_memory_share",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            "raise rollout.kv_cache_gib",
            "raise rollout.gpu_memory_share",
        ),
        (
            "ValueError: To serve at least one request (257), (0.2 GiB KV cache is needed, which is larger than the "
            "available KV cache memory (0.1 GiB)",
            "raise rollout.kv_cache_gib",
            "raise rollout.gpu_memory_share",
        ),
        ("KeyError: 'model.layers.0.memory.weight'", "", ""),
        ("ValueError: /models/memory-7b has no tokenizer", "", ""),
        ("RuntimeError: Engine core initialization failed", "", ""),
    ],
)
def test_advice_about_memory_fits_the_error_and_the_device(reason: str, cpu_advice: str, gpu_advice: str) -> None:
    for advice, on_gpu in ((cpu_advice, False), (gpu_advice, True)):
        answer = describe_memory_advice(reason, on_gpu=on_gpu)
        assert answer.startswith(f"; {advice}") if advice else not answer
