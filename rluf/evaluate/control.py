"""The control arm: the base policy, sharpened to the entropy of the aligned policy.

Training lowers the entropy of a policy, and a sharper base is more fluent too. The control tells both apart: what
aligned gains over it is not sharpening. The base answers at a few temperatures before training, since afterwards its
weights are no longer in the engines; the control mixes the two whose entropies bracket that of aligned.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rluf.types import BASE_ARM, CONTROL_ARM, REPEAT_ARM, PolicyAnswer, compute_mean_token_entropy

logger = logging.getLogger(__name__)


def build_control_arm(answers: Sequence[PolicyAnswer], target_entropy: float | None, seed: int) -> list[PolicyAnswer]:
    """Responses of the base at `target_entropy` (nats per token), sampled at two temperatures.

    `answers` of other policies are ignored. A policy that samples at the warmer temperature with probability w and at
    the cooler one with 1 - w has entropy w H_warm + (1 - w) H_cool; w is chosen so that this is the target. Each prompt
    has as many responses as the temperature with more draws; fewer draws of the other one repeat, which the interval,
    clustered by prompt, takes into account. The base arm is one of the draws, so the control is for comparisons with
    other arms only. Outside the measured range the nearest temperature is the control; `arms.control.entropy` in
    summary.json shows how near. Empty without draws at other temperatures or without a target.
    """
    draws = _group_base_draws(answers)
    if target_entropy is None or len(draws) < 2:
        return []
    entropies = {
        temperature: compute_mean_token_entropy(list(itertools.chain.from_iterable(by_prompt.values()))) or 0.0
        for temperature, by_prompt in draws.items()
    }
    by_entropy = sorted(draws, key=entropies.__getitem__)
    cooler = [temperature for temperature in by_entropy if entropies[temperature] <= target_entropy]
    cool = cooler[-1] if cooler else by_entropy[0]
    warm = next((temperature for temperature in by_entropy if entropies[temperature] > target_entropy), by_entropy[-1])
    entropy_gap = entropies[warm] - entropies[cool]
    warm_share = 0.0 if entropy_gap <= 0 else (target_entropy - entropies[cool]) / entropy_gap
    warm_share = min(max(warm_share, 0.0), 1.0)
    logger.info("control: entropy=%.3f temperatures=%g,%g warm_share=%.2f", target_entropy, cool, warm, warm_share)
    rng = np.random.default_rng([seed, 86_028_121])
    control = []
    for prompt_id, cool_answers in draws[cool].items():
        warm_answers = draws[warm][prompt_id]
        count = max(len(cool_answers), len(warm_answers))
        for position, is_warm in enumerate(rng.random(count) < warm_share):
            source = warm_answers if is_warm else cool_answers
            control.append(replace(source[position % len(source)], arm=CONTROL_ARM))
    return control


def _group_base_draws(answers: Sequence[PolicyAnswer]) -> dict[float, dict[str, list[PolicyAnswer]]]:
    """Responses of the base by temperature and prompt. Every draw has all prompts."""
    draws: dict[float, dict[str, list[PolicyAnswer]]] = {}
    for answer in answers:
        if answer.temperature is not None and (answer.arm == BASE_ARM or answer.arm.startswith(f"{BASE_ARM}_")):
            draws.setdefault(answer.temperature, {}).setdefault(answer.prompt_id, []).append(answer)
    return draws


def describe_base_draw(temperature_factor: float) -> str:
    """Arm name of a further draw of the base at this multiple of rollout.temperature."""
    return REPEAT_ARM if temperature_factor == 1.0 else f"{BASE_ARM}_t{temperature_factor:g}"
