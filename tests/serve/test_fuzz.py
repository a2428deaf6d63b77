"""Requests that nobody thought of: schemathesis makes them from our own OpenAPI schema, fitting and unfitting ones.

RLUF_FUZZ sets how many an operation and kind (2 by default; RLUF_FUZZ=40 sends over a thousand).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from rluf.reward.model import RewardModel
from rluf.serve.app import make_app
from rluf.serve.store import FeedbackStore
from tests.serve.conftest import Here, rules

EXAMPLES = int(os.environ.get("RLUF_FUZZ", "2"))
ANSWERS = (200, 400, 403, 404, 405, 409, 413, 422)


def check(case: Any) -> int:
    answer = case.call()
    assert answer.status_code in ANSWERS, f"{answer.status_code} {answer.text}"
    if answer.status_code == 200:
        case.validate_response(answer, checks=[schemathesis.checks.response_schema_conformance])
    else:
        error = answer.json()["error"]
        assert error["code"] == answer.status_code
        assert 5 < len(error["message"]) <= 300
    return int(answer.status_code)


@pytest.mark.slow
def test_no_request_crashes_the_service_and_answers_keep_to_the_schema(
    loaded: dict[str, RewardModel], tmp_path: Path
) -> None:
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", settle_s=1)
    store.start()
    for_all = dataclasses.replace(rules(), hosts=None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(Here(loaded, store, for_all)))
    seen: list[int] = []
    for found in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not found.ok().body:
                continue

            @given(case=found.ok().as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def probe(case: Any) -> None:
                seen.append(check(case))

            probe()
    assert len(seen) > 10 * EXAMPLES
    assert {200, 422} <= set(seen)
