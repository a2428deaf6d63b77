"""Train reward models: P[Love] from reactions, helpfulness from pairs, safety from labels; each with a reward card.

Prepares the log first unless that was done before, and writes one checkpoint folder per objective.
With --curve each model is also trained on an eighth, a quarter and half of its rows, for the card's learning curve.
python -m rluf.reward --config configs/reward/love.yaml
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import CommandOptions, parse_command_line, run_command
from rluf.config.objectives import BUILTIN_OBJECTIVES

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.reward")
LEARNING_CURVE_SHARES = (0.125, 0.25, 0.5)
"""Shares of the training rows that --curve adds."""


def select_objectives(settings: Settings) -> tuple[str, ...]:
    """Objectives to train: reward.objectives, else all with source model and data, and the heads of the shared
    backbone."""
    from_models = tuple(
        name
        for name, objective in settings.objectives.by_objective.items()
        if objective.source == "model" and (name in BUILTIN_OBJECTIVES or settings.data.labels.get(name))
    )
    return settings.reward.objectives or tuple(dict.fromkeys((*from_models, *settings.reward.shared_backbone_heads)))


def format_card_summary(card: Mapping[str, Any]) -> str:
    """One-line summary of a reward card: ranking with interval, length baseline, calibration.

    Metrics that a test split of one label, or of one user, does not define are shown as unknown.
    """

    def format_number(value: float | None, format_spec: str) -> str:
        return "unknown" if value is None else format(value, format_spec)

    is_pairwise = "pair_accuracy" in card
    ranking = card["pair_accuracy" if is_pairwise else "auroc"]
    mean, low, high = (format_number(ranking[key], ".3f") for key in ("mean", "low", "high"))
    length_baseline = card["length_only_accuracy" if is_pairwise else "length_only_auroc"]
    return (
        f"{card['objective']}: {'pair accuracy' if is_pairwise else 'AUROC'} {mean} ({low} to {high}) "
        f"on {card['n']} test rows, by length alone {format_number(length_baseline, '.3f')}; "
        f"log-loss {format_number(card['log_loss'], '.4f')}, ECE {format_number(card['ece'], '.4f')}, "
        f"length r {format_number(card['score_length_r'], '+.2f')}; "
        f"{card['training']['tokens_per_second']:.0f} tokens/s, {card['seconds']:.0f} s"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--curve", action="store_true", help="train on shares of the data too, for the learning curve")


def _check_settings(settings: Settings) -> None:
    from rluf.artifacts import check_inputs

    check_inputs(settings, may_download=False, trained_objectives=select_objectives(settings))


COMMAND_OPTIONS = CommandOptions(_add_options, check=_check_settings)


def train_models(settings: Settings, curve_shares: Sequence[float] = ()) -> Path:
    """Train and report the models of select_objectives(); returns the run folder, with one folder for each.

    `curve_shares` are shares of the training rows for the learning curve. Raises RlufError.
    """
    # Imported here: --help and errors in the settings must not wait for torch and Ray.
    from cluster.connect import ray_connection
    from rluf.artifacts import check_inputs, prepare_data_artifact
    from rluf.reward.calibration import CARD_FILE
    from rluf.reward.ray_trainer import train_reward_models
    from rluf.tracking.console import setup_logging
    from rluf.utils.paths import create_run_folder, resolve_runs_root

    objectives = select_objectives(settings)
    check_inputs(settings, trained_objectives=objectives)
    latest_run = resolve_runs_root(settings) / settings.name / "latest"
    # Resolved before create_run_folder moves the link `latest` to the new run.
    earlier_models = {
        name: (latest_run / name).resolve() for name in objectives if (latest_run / name / CARD_FILE).is_file()
    }
    run_folder = create_run_folder(settings)
    setup_logging(run_folder / "run.log")
    (run_folder / "config.json").write_text(settings.model_dump_json(indent=2), encoding="utf-8")
    with ray_connection():
        data_artifact = prepare_data_artifact(settings)
        jobs = {name: (data_artifact.folder, run_folder / name) for name in objectives}
        cards = train_reward_models(
            settings, jobs, full_card=True, earlier_models=earlier_models, curve_shares=tuple(curve_shares)
        )
    for card in cards.values():
        logger.info("%s", format_card_summary(card))
    logger.info("reward models: written to %s", run_folder)
    return run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code; user errors become one message (see rluf.config.cli.run_command)."""
    command_line = parse_command_line("rluf.reward", __doc__ or "", arguments, COMMAND_OPTIONS)
    curve_shares = LEARNING_CURVE_SHARES if command_line.options.curve else ()
    return run_command(lambda: train_models(command_line.settings, curve_shares))


if __name__ == "__main__":
    raise SystemExit(main())
