"""summary.json: everything a person or a program asks about a finished run, in one plain dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.gates import verdict
from rluf.evaluate.intervals import Estimate, clustered_mean, paired_bootstrap, relative_lift
from rluf.evaluate.monitors import Reply, compare

VERDICTS = {"love": "loved", "helpfulness": "helpful", "safety": "safe"}
"""Which of the users' verdicts stands for which objective."""
KEYS = {"love": "love_rate", "helpfulness": "helpfulness", "safety": "safety"}
"""Where the users' verdicts on an objective stand in the summary."""
OFFLINE_KEYS = {"love": "p_love"}
"""Where the reward model's mean stands under `offline`, when not under the objective's own name."""


class Reactions(Protocol):
    """What new users did: arrays [N] over the responses they read. `item` is the index of the response in its arm."""

    @property
    def user(self) -> NDArray[Any]:
        """User number; the arms' users are different people even where numbers are the same."""

    @property
    def item(self) -> NDArray[Any]:
        """Index of the response."""

    @property
    def loved(self) -> NDArray[Any]:
        """Whether the user put a heart."""

    @property
    def helpful(self) -> NDArray[Any]:
        """Whether it served the user."""

    @property
    def safe(self) -> NDArray[Any]:
        """Whether the user found it harmless."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy on the test prompts: its replies, calibrated scores [N] by objective, reactions if users judged."""

    replies: Sequence[Reply]
    scores: Mapping[str, Sequence[float]]
    reactions: Reactions | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the run itself tells.

    `phases` in seconds, `kl` in nats per token at the last step, `samples` and `tokens` generated in training,
    `versions` of packages or weights, `reused` by stage, `cards` are the reward cards by objective.
    """

    name: str
    seed: int
    phases: Mapping[str, float] = field(default_factory=dict)
    kl: float | None = None
    samples: int = 0
    tokens: int = 0
    versions: Mapping[str, Any] = field(default_factory=dict)
    reused: Mapping[str, Any] = field(default_factory=dict)
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def build_summary(
    facts: RunFacts, base: Arm, aligned: Arm, *, resamples: int, margin: float, seed: int
) -> dict[str, Any]:
    """The content of summary.json.

    With reactions in both arms: `love_rate`, `helpfulness`, `safety`, each {base, aligned, lift, lift_by_prompt}; base,
    aligned and lift have 95% intervals clustered by user, lift_by_prompt (the same verdicts) by a bootstrap over
    prompts and tells whether it would hold on other prompts. Always: `offline` with the reward models' means on the
    same prompts. The gates judge by the users where there are some, else by the reward models. A lift is null where
    it is undefined (base mean not positive). DataError when an arm is empty or the arms' prompts differ.
    """
    for name, arm in (("base", base), ("aligned", aligned)):
        if not arm.replies:
            raise DataError(f"the {name} policy gave no replies to compare; set evaluate.prompts to 2 or more")
    offline, lifts = _offline(base, aligned, resamples=resamples, seed=seed)
    summary: dict[str, Any] = {"name": facts.name, "seed": facts.seed}
    judged_by = "reward models"
    if base.reactions is not None and aligned.reactions is not None:
        judged_by = "simulated users"
        online, lifts = _online(base, base.reactions, aligned, aligned.reactions, resamples=resamples, seed=seed)
        summary |= online
    monitors = compare(base.replies, aligned.replies)
    alarms = [name for name, one in monitors["items"].items() if one["alarm"]]
    summary |= {
        "offline": offline,
        "gates": verdict(lifts, margin=margin, judged_by=judged_by, alarms=alarms),
        "monitors": monitors,
        "evaluated": {
            "prompts": len({reply.prompt_id for reply in base.replies}),
            "responses": {"base": len(base.replies), "aligned": len(aligned.replies)},
            "users": {name: _users(arm.reactions) for name, arm in (("base", base), ("aligned", aligned))},
        },
        "phases": dict(facts.phases),
        "kl": facts.kl,
        "samples": facts.samples,
        "tokens": facts.tokens,
        "versions": dict(facts.versions),
        "reused": dict(facts.reused),
        "reward_cards": {name: key_numbers(card) for name, card in facts.cards.items()},
    }
    return summary


def key_numbers(card: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The plain numbers of a card, nested ones with dotted names (test.auroc); lists and texts are left out."""
    found: dict[str, float] = {}
    for key, value in card.items():
        if isinstance(value, Mapping):
            found |= key_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def _users(reactions: Reactions | None) -> int:
    return 0 if reactions is None else len(np.unique(reactions.user))


def _online(
    base: Arm, before: Reactions, aligned: Arm, after: Reactions, *, resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, Estimate | None]]:
    summary: dict[str, Any] = {}
    lifts: dict[str, Estimate | None] = {}
    prompts = [
        np.asarray([reply.prompt_id for reply in arm.replies])[reactions.item]
        for arm, reactions in ((base, before), (aligned, after))
    ]
    for objective, key in KEYS.items():
        first, second = (np.asarray(getattr(one, VERDICTS[objective]), dtype=np.float64) for one in (before, after))
        lifts[objective] = relative_lift(first, before.user, second, after.user)
        summary[key] = {
            "base": clustered_mean(first, before.user, rate=True).as_dict(),
            "aligned": clustered_mean(second, after.user, rate=True).as_dict(),
            "lift": _plain(lifts[objective]),
            "lift_by_prompt": _plain(_by_prompt(first, second, prompts, resamples=resamples, seed=seed)),
        }
    return summary, lifts


def _by_prompt(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    prompts: Sequence[NDArray[Any]],
    *,
    resamples: int,
    seed: int,
) -> Estimate | None:
    """The lift on prompts that users of both arms read; None with fewer than two of them."""
    shared = np.intersect1d(prompts[0], prompts[1])
    if len(shared) < 2:
        return None
    keep = [np.isin(labels, shared) for labels in prompts]
    return paired_bootstrap(
        first[keep[0]], prompts[0][keep[0]], second[keep[1]], prompts[1][keep[1]], resamples=resamples, seed=seed
    ).lift


def _offline(
    base: Arm, aligned: Arm, *, resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, Estimate | None]]:
    summary: dict[str, Any] = {}
    lifts: dict[str, Estimate | None] = {}
    prompts = [[reply.prompt_id for reply in arm.replies] for arm in (base, aligned)]
    for objective in base.scores:
        found = paired_bootstrap(
            base.scores[objective], prompts[0], aligned.scores[objective], prompts[1], resamples=resamples, seed=seed
        )
        lifts[objective] = found.lift
        summary[OFFLINE_KEYS.get(objective, objective)] = {
            "base": found.base.as_dict(),
            "aligned": found.aligned.as_dict(),
            "difference": found.difference.as_dict(),
            "lift": _plain(found.lift),
        }
    return summary, lifts


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate.as_dict()
