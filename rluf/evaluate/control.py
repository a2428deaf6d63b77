"""The control arm: the base policy, sharpened to the entropy of the aligned policy.

Training lowers the entropy of a policy, and a sharper base is more fluent too. The control tells both apart: what
aligned gains over it is not sharpening. The base answers at a few temperatures before training, since afterwards its
weights are no longer in the engines; the control mixes the two whose entropies bracket that of aligned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rluf.types import BASE_ARM, CONTROL_ARM, REPEAT_ARM, PolicyAnswer, mean_token_entropy

logger = logging.getLogger(__name__)


def build_control_arm(answers: Sequence[PolicyAnswer], target_entropy: float | None, seed: int) -> list[PolicyAnswer]:
    """Responses of the base at `target_entropy` (nats per token), one of each prompt's draws at two temperatures.

    `answers` of other arms are ignored. A policy that samples at the warmer temperature with probability w and at
    the cooler one with 1 - w has entropy w H_warm + (1 - w) H_cool; w is chosen so that this is the target. Outside the
    measured range the nearest draw is the control; `arms.control.entropy` in summary.json shows how near. Empty without
    draws at other temperatures or without a target.
    """
    draws: dict[float, list[PolicyAnswer]] = {}
    for answer in answers:
        # Further draws only: responses of the base arm would stand on both sides of its comparison with the control.
        if answer.arm.startswith(f"{BASE_ARM}_") and answer.temperature is not None:
            draws.setdefault(answer.temperature, []).append(answer)
    if target_entropy is None or len(draws) < 2:
        return []
    entropies = {temperature: mean_token_entropy(answers) or 0.0 for temperature, answers in draws.items()}
    by_entropy = sorted(draws, key=entropies.__getitem__)
    cooler = [temperature for temperature in by_entropy if entropies[temperature] <= target_entropy]
    cool = cooler[-1] if cooler else by_entropy[0]
    warm = next((temperature for temperature in by_entropy if entropies[temperature] > target_entropy), by_entropy[-1])
    entropy_gap = entropies[warm] - entropies[cool]
    warm_share = 0.0 if entropy_gap <= 0 else (target_entropy - entropies[cool]) / entropy_gap
    warm_share = min(max(warm_share, 0.0), 1.0)
    logger.info("control: entropy=%.3f temperatures=%g,%g warm_share=%.2f", target_entropy, cool, warm, warm_share)
    # One uniform number per response position: both temperatures have the same prompts in the same order.
    is_warm = np.random.default_rng([seed, 86_028_121]).random(len(draws[cool])) < warm_share
    return [
        replace(warm_answer if chosen else cool_answer, arm=CONTROL_ARM)
        for cool_answer, warm_answer, chosen in zip(draws[cool], draws[warm], is_warm, strict=True)
    ]


def describe_base_draw(temperature_factor: float) -> str:
    """Arm name of a further draw of the base at this multiple of rollout.temperature."""
    return REPEAT_ARM if temperature_factor == 1.0 else f"{BASE_ARM}_t{temperature_factor:g}"
