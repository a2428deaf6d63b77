"""The simulate command: refuses before it samples, and samples real responses through the rollout actor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import resolve_model
from rluf.simulate.__main__ import sample, simulate
from rluf.simulate.prompts import load_prompts
from rluf.simulate.styles import traffic
from rluf.utils.paths import cache_dir

SETTINGS = Settings.model_validate(
    {
        "name": "test",
        "model": {"path": "tiny"},
        "cluster": {"threads": 1},
        "rollout": {"concurrency": 16, "kv_cache_gib": 0.05, "max_response_tokens": 8},
    }
)


def test_a_folder_with_other_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        simulate(SETTINGS, tmp_path)


@pytest.mark.slow
def test_responses_come_back_in_the_order_they_were_asked_for(local_ray: None) -> None:
    orders = [order for order in traffic(load_prompts()[::24], 7) if order.style.name == "plain"]
    served = asyncio.run(sample(SETTINGS, resolve_model("tiny", cache_dir(SETTINGS)), orders))
    wanted = [order.prompt.id for order in orders for _ in range(order.responses)]
    assert [response.prompt.id for response in served] == wanted
    assert {response.style for response in served} == {"plain"}
    assert any(not response.finished for response in served)
