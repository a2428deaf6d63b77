"""Train reward models: P[Love] from reactions, helpfulness from pairs, safety from labels; each with a reward card.

Prepares the log first, unless that was done before, and writes one checkpoint folder an objective.
With --curve each is also trained on an eighth, a quarter and half of its rows, for the card's learning curve.
python -m rluf.reward --config configs/reward/love.yaml
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.reward")
CURVE = (0.125, 0.25, 0.5)
"""Shares of the training rows that --curve adds."""


def chosen_objectives(settings: Settings) -> tuple[str, ...]:
    """What the command trains: reward.only, else every objective whose source is a model, and reward.heads."""
    named = settings.objectives.named
    models = tuple(name for name, objective in named.items() if objective.source == "model")
    return settings.reward.only or tuple(dict.fromkeys((*models, *settings.reward.heads)))


def headline(card: Mapping[str, Any]) -> str:
    """One line on a reward card: ranking with interval, the length floor beside it, calibration.

    What a test split of one label, or of one user, cannot tell is told as such.
    """

    def told(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    pairs = "pair_accuracy" in card
    figure = card["pair_accuracy" if pairs else "auroc"]
    floor = card["length_floor_accuracy" if pairs else "length_floor_auroc"]
    return (
        f"{card['objective']}: {'pair accuracy' if pairs else 'AUROC'} {told(figure['mean'], '.3f')} "
        f"({told(figure['low'], '.3f')} to {told(figure['high'], '.3f')}) on {card['n']} test rows, by length alone "
        f"{told(floor, '.3f')}; log-loss {told(card['log_loss'], '.4f')}, ECE {told(card['ece'], '.4f')}, length r "
        f"{told(card['score_length_r'], '+.2f')}; {card['training']['tokens_per_second']:.0f} tokens/s, "
        f"{card['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    curve = CURVE if "--curve" in given else ()
    settings = parse("rluf.reward", __doc__ or "", [word for word in given if word != "--curve"]).settings

    def run() -> None:
        from cluster.connect import connected
        from rluf.artifacts import check_inputs, prepared
        from rluf.reward.ray_trainer import train_rewards
        from rluf.tracking.console import setup_logging
        from rluf.utils.paths import new_run_folder, runs_root

        check_inputs(settings)
        names = chosen_objectives(settings)
        latest = runs_root(settings) / settings.name / "latest"
        before = {n: (latest / n).resolve() for n in names if (latest / n / "reward_card.json").is_file()}
        folder = new_run_folder(settings)
        setup_logging(folder / "run.log")
        (folder / "config.json").write_text(settings.model_dump_json(indent=2), encoding="utf-8")
        with connected(settings):
            data = prepared(settings)
            jobs = {name: (data.folder, folder / name) for name in names}
            cards = train_rewards(settings, jobs, thorough=True, before=before, curve=curve)
        for card in cards.values():
            logger.info("%s", headline(card))
        logger.info("reward models: %s", folder)

    guard(run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
