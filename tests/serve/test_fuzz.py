"""Generated requests: schemathesis builds valid and invalid ones from the service's OpenAPI schema.

RLUF_FUZZ is the number per operation and kind (default 2; RLUF_FUZZ=40 sends over a thousand).
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
from tests.serve.conftest import LocalBackend, make_rules

EXAMPLES = int(os.environ.get("RLUF_FUZZ", "2"))
EXPECTED_STATUSES = (200, 400, 403, 404, 405, 409, 413, 422)


def check_response(case: Any) -> int:
    response = case.call()
    assert response.status_code in EXPECTED_STATUSES, f"{response.status_code} {response.text}"
    if response.status_code == 200:
        case.validate_response(response, checks=[schemathesis.checks.response_schema_conformance])
    else:
        error = response.json()["error"]
        assert error["code"] == response.status_code
        assert 5 < len(error["message"]) <= 300
    return int(response.status_code)


@pytest.mark.slow
def test_no_request_crashes_the_service_and_replies_match_the_schema(
    reward_models: dict[str, RewardModel], tmp_path: Path
) -> None:
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", reaction_window_s=1)
    store.start()
    rules = dataclasses.replace(make_rules(), allowed_hosts=None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(LocalBackend(reward_models, store, rules)))
    statuses: list[int] = []
    for operation in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.ok().body:
                continue

            @given(case=operation.ok().as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def send_request(case: Any) -> None:
                statuses.append(check_response(case))

            send_request()
    assert len(statuses) > 10 * EXAMPLES
    assert {200, 422} <= set(statuses)
