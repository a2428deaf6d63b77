"""Real replies for the tests of monitors and alarms."""

from __future__ import annotations

import gzip
import json

import pytest

from rluf.evaluate.monitors import MonitorSample
from rluf.utils.paths import find_sample_log


@pytest.fixture(scope="session")
def base_replies() -> dict[str, list[MonitorSample]]:
    """Six or more replies to each prompt of the sample log, by two versions of its base policy."""
    with gzip.open(find_sample_log("feedback"), "rt", encoding="utf-8") as stream:
        rows = [row for row in map(json.loads, stream) if row["model_version"] in ("base-plain", "base-cool")]
    replies: dict[str, list[MonitorSample]] = {}
    for row in rows:
        prompt, text = row["messages"][-1]["content"], row["response"]
        sample = MonitorSample(prompt, tuple(row["messages"]), text, len(text.split()), row["topic"], "stop")
        replies.setdefault(prompt, []).append(sample)
    return {prompt: samples for prompt, samples in replies.items() if len(samples) >= 6}
