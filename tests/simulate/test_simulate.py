"""The simulate command: refuses early, and samples real responses through the rollout actors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import resolve_model
from rluf.simulate.__main__ import sample_responses, simulate_log
from rluf.simulate.prompts import load_prompts
from rluf.simulate.styles import plan_traffic
from rluf.utils.paths import resolve_cache_folder

SETTINGS = Settings.model_validate(
    {
        "name": "test",
        "model": {"path": "tiny"},
        "cluster": {"threads_per_actor": 1},
        "rollout": {"concurrency": 16, "kv_cache_gib": 0.05, "max_response_tokens": 8},
    }
)


def test_a_folder_with_other_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        simulate_log(SETTINGS, tmp_path)


@pytest.mark.slow
def test_responses_are_returned_in_the_order_of_the_requests(local_ray: None) -> None:
    orders = [order for order in plan_traffic(load_prompts()[::24], 7) if order.model_version.name == "plain"]
    responses = asyncio.run(sample_responses(SETTINGS, resolve_model("tiny", resolve_cache_folder(SETTINGS)), orders))
    expected_ids = [order.prompt.id for order in orders for _ in range(order.response_count)]
    assert [response.prompt.id for response in responses] == expected_ids
    assert {response.model_version for response in responses} == {"plain"}
    assert any(not response.is_finished for response in responses)
