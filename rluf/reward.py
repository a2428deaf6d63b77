"""Train reward models: P[Love] from reactions, helpfulness from pairs, safety from labels; each with a reward card.

Prepares the log first, unless that was done before, and writes one checkpoint folder an objective.
python -m rluf.reward --config configs/reward/love.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard, parse

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.reward")


def train_rewards(
    settings: Settings, jobs: Mapping[str, tuple[Path, Path]], *, thorough: bool = False
) -> dict[str, dict[str, Any]]:
    """Train several objectives, objective -> (data, out), on the same workers; returns their cards.

    Ray must be initialised. Saves a worker start (some 15 s) for each objective after the first. `thorough` adds
    slices, the robustness table and a page to the cards. Raises DataError, ModelError, ResourceError, StallError;
    nothing half-written stays.
    """
    from rluf.engine.train_reward import train_rewards as train

    return train(settings, jobs, thorough=thorough)


def chosen_objectives(settings: Settings) -> tuple[str, ...]:
    """What the command trains: reward.only, else every objective whose source is a model."""
    named = settings.objectives.named
    return settings.reward.only or tuple(name for name, objective in named.items() if objective.source == "model")


def headline(card: Mapping[str, Any]) -> str:
    """One line on a reward card: ranking with interval, the length floor beside it, calibration."""
    pairs = "pair_accuracy" in card
    figure = card["pair_accuracy" if pairs else "auroc"]
    floor = card["length_floor_accuracy" if pairs else "length_floor_auroc"]
    return (
        f"{card['objective']}: {'pair accuracy' if pairs else 'AUROC'} {figure['mean']:.3f} "
        f"({figure['low']:.3f} to {figure['high']:.3f}) on {card['n']} test rows, by length alone {floor:.3f}; "
        f"log-loss {card['log_loss']:.4f}, ECE {card['ece']:.4f}, length r {card['score_length_r']:+.2f}; "
        f"{card['training']['tokens_per_second']:.0f} tokens/s, {card['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    settings = parse("rluf.reward", __doc__ or "", arguments).settings

    def run() -> None:
        from cluster.connect import connected
        from rluf.inputs import check_inputs, prepared
        from rluf.paths import new_run_folder
        from rluf.tracking.console import setup_logging

        check_inputs(settings)
        folder = new_run_folder(settings)
        setup_logging(folder / "run.log")
        (folder / "config.json").write_text(settings.model_dump_json(indent=2), encoding="utf-8")
        with connected(settings):
            data = prepared(settings)
            names = chosen_objectives(settings)
            jobs = {name: (data.folder, folder / name) for name in names}
            cards = train_rewards(settings, jobs, thorough=True)
        for card in cards.values():
            logger.info("%s", headline(card))
        logger.info("reward models: %s", folder)

    guard(run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
