"""Errors of vLLM are reported with their whole message and the innermost cause."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError, model_validator

from rluf.backends.vllm.engine import format_cause


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
