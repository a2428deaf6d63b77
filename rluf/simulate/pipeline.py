"""Steps of a simulated log: first responses, the users' reactions and second turns, and the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rluf.config.settings import Settings
from rluf.simulate.ground_truth import load_reader
from rluf.simulate.log import (
    ServedResponse,
    build_log,
    build_prompt_rows,
    check_output_folder,
    read_first_turns,
    select_evenly,
    write_log,
)
from rluf.simulate.prompts import load_prompts
from rluf.simulate.styles import MODEL_VERSIONS, ServingOrder, plan_traffic
from rluf.utils.paths import resolve_cache_folder

logger = logging.getLogger(__name__)

OrderSampler = Callable[[Sequence[ServingOrder]], list[ServedResponse]]
"""Samples the responses of serving orders, in their order."""


def write_simulated_log(
    settings: Settings,
    output_folder: Path,
    sample_orders: OrderSampler,
    earlier_log: Path | None = None,
    response_count: int | None = None,
) -> dict[str, int]:
    """Write a log to `output_folder`; returns the number of rows by kind.

    The model answers the training prompts, unless the first turns of an earlier log are used (`response_count` of them,
    None for all), and all second turns.
    Raises DataError if the folder contains other files, ModelError, ResourceError; no partial log remains.
    """
    check_output_folder(output_folder)
    prompts = load_prompts()
    versions = {version.name: version for version in MODEL_VERSIONS}

    def answer_second_turns(requests: Sequence[ServedResponse]) -> list[ServedResponse]:
        return sample_orders([ServingOrder(r.prompt, versions[r.model_version], 1) for r in requests])

    if earlier_log is None:
        first_responses = sample_orders(plan_traffic(prompts, settings.simulate.log_rows))
    else:
        first_responses = read_first_turns(earlier_log, [prompt for prompt in prompts if prompt.split == "train"])
        first_responses = select_evenly(first_responses, response_count or len(first_responses))
    reader = load_reader(resolve_cache_folder(settings))
    log = build_log(first_responses, settings.simulate, settings.seed, reader, answer_second_turns)
    log |= {"prompts": build_prompt_rows(prompts)}
    write_log(log, output_folder)
    love_count = sum(row["reaction"] == "love" for row in log["feedback"])
    logger.info(
        "%s: first_responses=%d events=%d loved=%d", output_folder, len(first_responses), len(log["feedback"]),
        love_count,
    )  # fmt: skip
    return {kind: len(rows) for kind, rows in log.items()}
