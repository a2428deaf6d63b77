"""Make a log: simulated users read real responses of the base model and put hearts on some.

Writes feedback, preferences, safety and prompts files that rluf.prepare reads like any other log.
python -m rluf.simulate --config configs/simulate.yaml simulate.output=runs/simulated
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings
    from rluf.simulate.log import Served
    from rluf.simulate.styles import Order
    from rluf.train.actor_groups import Crew
    from rluf.types import Prompt

logger = logging.getLogger("rluf.simulate")


def simulate(settings: Settings, out: Path) -> dict[str, int]:
    """Write a log to the folder `out`; returns rows by kind. Ray must be initialised.

    Raises DataError when `out` holds other files, ModelError, ResourceError, StallError; nothing half-written stays.
    """
    from rluf.models.hub import resolve_model
    from rluf.simulate.log import build_log, check_folder, prompt_rows, write_log
    from rluf.simulate.prompts import load_prompts
    from rluf.simulate.styles import traffic
    from rluf.utils.paths import cache_dir

    check_folder(out)
    prompts = load_prompts()
    orders = traffic(prompts, settings.simulate.responses_per_prompt)
    model = resolve_model(settings.model.path, cache_dir(settings))
    served = asyncio.run(sample(settings, model, orders))
    log = build_log(served, settings.simulate, settings.seed) | {"prompts": prompt_rows(prompts)}
    write_log(log, out)
    hearts = sum(row["reaction"] == "love" for row in log["feedback"])
    logger.info("%d responses of %d model versions, %d of %d events loved", len(served),
                len({order.style.name for order in orders}), hearts, len(log["feedback"]))  # fmt: skip
    return {kind: len(rows) for kind, rows in log.items()}


async def sample(settings: Settings, model: Path, orders: Sequence[Order]) -> list[Served]:
    """Responses of the model versions to their prompts, in the order of `orders`.

    An engine samples at one temperature, so versions take turns by temperature on fresh engines.
    """
    from rluf.models.hub import load_tokenizer, render_prompt
    from rluf.train.actor_groups import Supervisor
    from rluf.types import Prompt

    tokenizer = load_tokenizer(model)
    prompts: list[Prompt] = []
    for order in orders:
        messages = order.style.messages(order.prompt)
        name = f"{order.prompt.id}/{order.style.name}"
        prompts.append(Prompt(name, messages, render_prompt(tokenizer, messages), order.prompt.topic, "train"))
    longest = max(len(prompt.token_ids) for prompt in prompts)
    answers: dict[str, list[Served]] = {}
    for temperature in sorted({order.style.temperature for order in orders}):
        turn = [pair for pair in zip(orders, prompts, strict=True) if pair[0].style.temperature == temperature]
        rollout = settings.rollout.model_copy(update={"temperature": temperature, "max_prompt_tokens": longest})
        tuned = settings.model_copy(update={"rollout": rollout})
        async with Supervisor(tuned, model, {}, learners=False) as supervisor:
            answers |= await supervisor.run(serve(tuned, supervisor.crew, turn))
    return [response for prompt in prompts for response in answers[prompt.id]]


async def serve(settings: Settings, crew: Crew, turn: Sequence[tuple[Order, Prompt]]) -> dict[str, list[Served]]:
    """Spread the prompts over the rollout actors, as many at once as their engines hold; answers by prompt id."""
    import ray

    from rluf.simulate.log import Served
    from rluf.tracking.console import Progress
    from rluf.train.actor_groups import within
    from rluf.types import Group

    room = asyncio.Semaphore(settings.rollout.concurrency * len(crew.rollouts))
    answers: dict[str, list[Served]] = {}
    with Progress(f"sample at temperature {settings.rollout.temperature:g}", len(turn), unit="prompts") as progress:

        async def ask(number: int, order: Order, prompt: Prompt) -> None:
            member = crew.rollouts[number % len(crew.rollouts)]
            generate = member.handle.generate.options(num_returns=2)
            async with room:
                reference, info = generate.remote(prompt, order.responses, settings.seed)
                await within(info, settings.rollout.deadline_s, f"{member} ({prompt.id})")
            group: Group = await asyncio.to_thread(ray.get, reference)
            answers[prompt.id] = [
                Served(order.prompt, order.style.name, sample.text, sample.finish_reason == "stop")
                for sample in group.samples
            ]
            progress.advance()

        await asyncio.gather(*(ask(number, *pair) for number, pair in enumerate(turn)))
    return answers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    settings = parse("simulate", __doc__ or "", arguments).settings

    def run() -> None:
        from cluster.connect import connected
        from rluf.tracking.console import setup_logging

        setup_logging()
        out = Path(settings.simulate.output).expanduser().resolve()
        with connected(settings):
            counts = simulate(settings, out)
        logger.info("log: %s (%s)", out, ", ".join(f"{number} {kind}" for kind, number in counts.items()))

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
