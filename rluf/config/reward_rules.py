"""Pairs of settings of the reward models that do not go together, told as in rluf.config.rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rluf.config.settings import Settings


def losses(settings: Settings) -> str | None:
    """Pairs train with bradley_terry, single responses with a loss of labels."""
    for name, model in settings.reward.named.items():
        pairs = name == "helpfulness"
        if (model.loss == "bradley_terry") != pairs:
            rows, fit = ("pairs of responses", "bradley_terry") if pairs else ("single responses with a label", "bce")
            return f"reward.{name}.loss={model.loss} does not fit its data, {rows}; set reward.{name}.loss={fit}"
        if pairs and model.calibration == "isotonic":
            return (
                f"reward.{name}.loss={model.loss} learns differences, which reward.{name}.calibration=isotonic cannot "
                f"calibrate; set reward.{name}.calibration=platt"
            )
    return None


def untrained(settings: Settings) -> str | None:
    """No epochs and no probe would leave a head of random numbers."""
    for name, model in settings.reward.named.items():
        if model.epochs == 0 and not model.probe:
            return (
                f"reward.{name}.epochs=0 and reward.{name}.probe=false would train nothing; set "
                f"reward.{name}.probe=true or reward.{name}.epochs=1"
            )
        if model.lora_rank and (model.epochs == 0 or model.frozen_share == 1):
            return (
                f"reward.{name}.lora_rank={model.lora_rank} would put adapters where nothing trains "
                f"(reward.{name}.epochs={model.epochs}, reward.{name}.frozen_share={model.frozen_share:g}); set "
                f"reward.{name}.lora_rank=0, or epochs above 0 and frozen_share below 1"
            )
    return None


def debiased(settings: Settings) -> str | None:
    """Who reacts, and how readily, is for P[Love] to learn around; the others learn from raters and pairs."""
    for name, model in settings.reward.named.items():
        wrong = [what for what in model.debias if what in ("users", "propensity") and name != "love"]
        if wrong:
            return (
                f"reward.{name}.debias={list(model.debias)}: {wrong[0]} is about who reacts, and reward.{name}.loss="
                f"{model.loss} learns from raters; set debias without it"
            )
    return None


def members(settings: Settings) -> str | None:
    """An ensemble's first member is on the section's own backbone; one on another gets a fitted head and no more."""
    for name, model in settings.reward.named.items():
        if not model.members[0].own:
            return (
                f"reward.{name}.layers={list(model.layers)} begins with another backbone than reward.{name}.backbone="
                f"{model.backbone}; put a number of its own layers first, or set reward.{name}.backbone to the other"
            )
        others = [f"{member.backbone}:{member.layers}" for member in model.members if not member.own]
        if others and settings.reward.heads and model is settings.reward.of_head(settings.reward.heads[0]):
            return (
                f"reward.heads={list(settings.reward.heads)} share one backbone, but reward.{name}.layers="
                f"{list(model.layers)} adds {others[0]}; leave numbers alone in layers, or set reward.heads=[]"
            )
    return None


def fused(settings: Settings) -> str | None:
    """One head over several members is fitted, not trained, and has no spread."""
    for name, model in settings.reward.named.items():
        if not model.fuse:
            continue
        if len(model.members) < 2:
            return (
                f"reward.{name}.fuse=true joins what several members read, but reward.{name}.layers="
                f"{list(model.layers)} makes one; name several there, or set reward.{name}.fuse=false"
            )
        if model.epochs or not model.probe:
            return (
                f"reward.{name}.fuse=true fits one head over members that stay as they are, but reward.{name}.epochs="
                f"{model.epochs} and reward.{name}.probe={str(model.probe).lower()}; set epochs=0 and probe=true, or "
                f"reward.{name}.fuse=false"
            )
        if settings.objectives.pessimism:
            return (
                f"objectives.pessimism={settings.objectives.pessimism:g} takes off how far members disagree, which "
                f"reward.{name}.fuse=true leaves undefined; set one of them to its default"
            )
    return None


def heads(settings: Settings) -> str | None:
    """Heads of one backbone are several, each once, trained together; elastic workers cannot share out an optimiser."""
    reward = settings.reward
    if reward.heads and len(set(reward.heads)) < max(2, len(reward.heads)):
        return f"reward.heads={list(reward.heads)} must name two heads or more, each once; set it to [] for none"
    if set(reward.only) & set(reward.heads) and not set(reward.heads) <= set(reward.only):
        return (
            f"reward.only={list(reward.only)} leaves out heads of the model that reward.heads={list(reward.heads)} "
            "train together; set reward.only=[] for all of them, or reward.heads=[]"
        )
    if not isinstance(reward.workers, int):
        fewest, most = reward.workers
        if fewest > most:
            return f"reward.workers={list(reward.workers)} has its fewest above its most; set the smaller first"
        if reward.zero_stage:
            return (
                f"reward.workers={list(reward.workers)} may change in mid-training, but reward.zero_stage="
                f"{reward.zero_stage} cuts the optimiser's state by their number; set reward.zero_stage=0 or one number"
            )
    return None


RULES: tuple[Callable[[Settings], str | None], ...] = (losses, untrained, debiased, members, fused, heads)
