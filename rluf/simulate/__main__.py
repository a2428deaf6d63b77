"""Simulate a feedback log: users with known preferences react to real responses of the base model.

Writes feedback, preferences, safety and prompts files that rluf.prepare reads like any other log.
python -m rluf.simulate --config configs/simulate.yaml

Sub-commands:
python -m rluf.simulate rescore --log FOLDER [...]     the same from the first responses of an earlier log
python -m rluf.simulate judge --data FILE.jsonl[.gz]   agreement of the reader behind the users with labels or pairs
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import CommandOptions, CommandParser, parse_command_line, run_command

if TYPE_CHECKING:
    from rluf.config.settings import Settings
    from rluf.simulate.log import ServedResponse
    from rluf.simulate.styles import ServingOrder
    from rluf.train.actor_calls import ActorGroups
    from rluf.types import Prompt

logger = logging.getLogger("rluf.simulate")


def simulate_log(
    settings: Settings, output_folder: Path, earlier_log: Path | None = None, response_count: int | None = None
) -> dict[str, int]:
    """Write a log to `output_folder`; result and errors as in write_simulated_log. Ray must be initialized."""
    from rluf.models.hub import resolve_model
    from rluf.simulate.pipeline import write_simulated_log
    from rluf.utils.paths import resolve_cache_folder

    # Not resolve_policy: each served version has a system message and examples of its own.
    model_path = resolve_model(settings.model.path, resolve_cache_folder(settings))

    def sample_orders(orders: Sequence[ServingOrder]) -> list[ServedResponse]:
        return asyncio.run(sample_responses(settings, model_path, orders))

    return write_simulated_log(settings, output_folder, sample_orders, earlier_log, response_count)


async def sample_responses(
    settings: Settings, model_path: Path, orders: Sequence[ServingOrder]
) -> list[ServedResponse]:
    """Sample the responses of the model versions, in the order of `orders`."""
    from rluf.models.hub import load_tokenizer, render_prompt
    from rluf.train.actor_supervisor import ActorSupervisor
    from rluf.types import Prompt

    tokenizer = load_tokenizer(model_path, trust_remote_code=settings.model.trust_remote_code)
    prompts: list[Prompt] = []
    for order in orders:
        messages = order.model_version.build_messages(order.prompt)
        prompt_id = f"{order.prompt.id}/{order.model_version.name}"
        prompts.append(Prompt(prompt_id, messages, render_prompt(tokenizer, messages), order.prompt.topic, "train"))
    max_prompt_tokens = max(len(prompt.token_ids) for prompt in prompts)
    rollout_settings = settings.rollout.model_copy(update={"max_prompt_tokens": max_prompt_tokens})
    engine_settings = settings.model_copy(update={"rollout": rollout_settings})
    async with ActorSupervisor(engine_settings, model_path, {}, with_learners=False) as supervisor:
        responses_by_prompt = await supervisor.run_monitored(
            generate_responses(engine_settings, supervisor.actor_groups, list(zip(orders, prompts, strict=True)))
        )
    return [response for prompt in prompts for response in responses_by_prompt[prompt.id]]


async def generate_responses(
    settings: Settings, actor_groups: ActorGroups, ordered_prompts: Sequence[tuple[ServingOrder, Prompt]]
) -> dict[str, list[ServedResponse]]:
    """Generate on all rollout actors, limited to the concurrency of their engines; responses by prompt id."""
    import ray

    from rluf.simulate.log import ServedResponse
    from rluf.tracking.console import PhaseProgress
    from rluf.train.actor_calls import call_with_timeout
    from rluf.types import Group

    slots = asyncio.Semaphore(settings.rollout.concurrency * len(actor_groups.rollout_actors))
    responses_by_prompt: dict[str, list[ServedResponse]] = {}
    with PhaseProgress("sample responses", len(ordered_prompts), unit="prompts") as progress:

        async def generate_for_prompt(order_index: int, order: ServingOrder, prompt: Prompt) -> None:
            actor = actor_groups.rollout_actors[order_index % len(actor_groups.rollout_actors)]
            generate = actor.handle.generate_group.options(num_returns=2)
            async with slots:
                reference, info = generate.remote(
                    prompt, order.response_count, settings.seed, order.model_version.temperature
                )
                await call_with_timeout(info, settings.timeouts.call_s, f"{actor} ({prompt.id})")
            # ray.get blocks; a thread keeps the event loop free for the other prompts.
            group: Group = await asyncio.to_thread(ray.get, reference)
            responses_by_prompt[prompt.id] = [
                ServedResponse(order.prompt, order.model_version.name, sample.text, sample.finish_reason == "stop")
                for sample in group.samples
            ]
            progress.advance()

        await asyncio.gather(*(generate_for_prompt(index, *pair) for index, pair in enumerate(ordered_prompts)))
    return responses_by_prompt


COMMAND_OPTIONS = CommandOptions(lambda _: None, subcommands=("rescore", "judge"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, and an error is one message on stderr."""
    argument_list = list(sys.argv[1:] if arguments is None else arguments)
    if argument_list[:1] == ["judge"]:
        from rluf.simulate import judge

        return judge.main(argument_list[1:])
    args = argparse.Namespace(log=None, responses=None)
    if argument_list[:1] == ["rescore"]:
        parser = CommandParser("rluf.simulate rescore", add_help=False, allow_abbrev=False)
        parser.add_argument("--log", type=Path, required=True, metavar="FOLDER", help="folder of a simulated log")
        parser.add_argument("--responses", type=int, metavar="N", help="use N of its first responses; default: all")
        args, argument_list = parser.parse_known_args(argument_list[1:])
        if args.responses is not None and args.responses < 2:
            parser.error(f"argument --responses: expected 2 or more, got {args.responses}")
    options = replace(
        COMMAND_OPTIONS, check=lambda tree: import_module("rluf.simulate.inputs").check_simulation(tree, args.log)
    )
    settings = parse_command_line("simulate", __doc__ or "", argument_list, options).settings

    def run() -> None:
        options.check(settings)  # before Ray starts
        from cluster.connect import ray_connection
        from rluf.tracking.console import setup_logging
        from rluf.utils.paths import resolve_runs_root

        setup_logging()
        folder = resolve_runs_root(settings) / settings.name / "log"
        with ray_connection():
            counts = simulate_log(settings, folder, args.log, args.responses)
        logger.info("%s: rows written: %s", folder, " ".join(f"{kind}={count}" for kind, count in counts.items()))

    return run_command(run)


if __name__ == "__main__":
    raise SystemExit(main())
