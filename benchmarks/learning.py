"""Weights, floors, pessimism and updates per batch, each on a case whose right value is known.

weights: the effective weight of an objective over 50 draws of the prompts of the reference sample, from the base
answers of a finished run (`--run`): how many times the largest exceeds the smallest, and its mean as a share of the
weight that is set. `first batch` is the rule of earlier releases (12 prompts, deviation over all responses); the rules
after `reference sample` were tried in its place (`list_other_scales`). floors: the multiplier of a policy exactly at
its floor, and of one below it. updates: share of the possible gain that a table policy with a known optimum reaches
with 25 batches of 12 x 4, by learning rate and updates per batch, 6 seeds. options: what single options of the learner
are worth on that policy (see `measure_options`). pessimism: AUROC of the love signal of an ensemble of probes (MiniLM,
2, 4 and 6 layers) on dev rows of a prepared data set (`--data`), by aggregation.uncertainty_penalty.
The last line is JSON.

Usage: python benchmarks/learning.py [--run RUN_FOLDER] [--data PREPARED_DATA_FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import torch
from lab.table_policy import (
    LENGTH,
    VOCABULARY,
    SignalFunction,
    TablePolicy,
    make_aggregator,
    score_target_tokens,
    train,
)
from torch import nn

from rluf.config.policy import AlgorithmSettings
from rluf.config.settings import Settings
from rluf.models.weight_average import WeightAverage
from rluf.objectives.aggregator import PRIOR_DEGREES, LagrangeMultipliers, RewardNormalizer, compute_signal
from rluf.reward.export import export_models
from rluf.reward.fit import HeadData, train_ensemble
from rluf.reward.metrics import auroc
from rluf.reward.model import RewardModel
from rluf.train.controller import REFERENCE_PROMPTS
from rluf.types import ANSWERS_FILE, ScoringItem
from rluf.utils.stats import logit

DRAWS, FIRST_BATCH_PROMPTS, SAMPLES = 50, 12, 4
DEVIATION_BIAS = 0.9213
"""Expected standard deviation of SAMPLES normal numbers of standard deviation 1."""
BASE_ARMS = ("base", "base_repeat")
FLOOR_STEPS, FLOOR_RUNS = 100, 300
BETWEEN_PROMPTS = 0.6
"""Share of a score's variance that is between prompts, in the simulation of floors."""
LEARNING_RATES = (0.03, 0.1, 0.3)
UPDATES = ((1, 1), (4, 1), (1, 4), (4, 2))
"""(mini-batches, epochs) of a batch."""
PENALTIES = (0.0, 0.5, 1.0, 2.0, 3.0)


def list_other_scales(variances: np.ndarray) -> dict[str, float]:
    """Scales by other rules than the product's, from the variance of the responses to each prompt [prompts].

    `heavier prior`: four times PRIOR_DEGREES. `effective degrees`: the prior against the degrees of freedom that the
    spread of the variances leaves (Satterthwaite, 1946). `log space`: the same, the mean taken of logarithms. `mean
    deviation`: from the mean of the prompts' deviations, which few prompts of large variance move less.
    """
    degrees, mean_variance = len(variances) * (SAMPLES - 1), float(variances.mean())
    effective = min(degrees, 2 * mean_variance**2 * len(variances) / float(variances.var()))

    def shrink(variance: float, degrees: float, prior_degrees: float = PRIOR_DEGREES) -> float:
        return math.sqrt((degrees * variance + prior_degrees) / (degrees + prior_degrees))

    return {
        "heavier prior": shrink(mean_variance, degrees, 4 * PRIOR_DEGREES),
        "effective degrees": shrink(mean_variance, effective),
        "log space": mean_variance ** (effective / (effective + PRIOR_DEGREES) / 2),
        "mean deviation": shrink((float(np.sqrt(variances).mean()) / DEVIATION_BIAS) ** 2, degrees),
    }


def measure_weights(run_folder: Path) -> dict[str, dict[str, list[float]]]:
    """Effective weights in DRAWS draws of prompts without an objective of their own, by objective and rule.

    Largest over smallest, and the mean as a share of the weight that is set.
    """
    scores_by_prompt: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    own_topics = Settings().aggregation.topic_objectives
    for line in (run_folder / ANSWERS_FILE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["arm"] in BASE_ARMS and row["topic"] not in own_topics:
            scores_by_prompt[row["prompt_id"]].append(row["scores"])
    prompts = list(scores_by_prompt.values())
    results = {}
    for objective in prompts[0][0]:
        signals = [[logit(scores[objective]) for scores in rows[:SAMPLES]] for rows in prompts if len(rows) >= SAMPLES]
        rng = np.random.default_rng(0)
        draws = [
            [signals[index] for index in rng.integers(0, len(signals), REFERENCE_PROMPTS)] for _ in range(20 * DRAWS)
        ]
        rules = {
            "first batch": [float(np.std(draw[:FIRST_BATCH_PROMPTS])) for draw in draws],
            "reference sample": [
                RewardNormalizer.fit({objective: draw}, logit_objectives=[objective]).sd[objective] for draw in draws
            ],
        }
        for other_scales in (list_other_scales(np.var(draw, axis=1, ddof=1)) for draw in draws):
            for rule, scale in other_scales.items():
                rules.setdefault(rule, []).append(scale)
        within_sd = RewardNormalizer.fit({objective: signals}).statistics[objective].within_sd
        # The effective weight is inverse to the scale; the median over 20 sets of DRAWS draws.
        results[objective] = {
            rule: [
                round(float(np.median([max(scales[i::20]) / min(scales[i::20]) for i in range(20)])), 2),
                round(within_sd * float(np.mean(np.reciprocal(scales))), 2),
            ]
            for rule, scales in rules.items()
        }
    return results


def simulate_floor(distance: float) -> dict[str, float]:
    """Multiplier after FLOOR_STEPS steps of 12 prompts of a policy `distance` deviations above its floor."""
    rng, last = np.random.default_rng(0), []
    step_error, zero_error = (
        math.sqrt(BETWEEN_PROMPTS / count + (1 - BETWEEN_PROMPTS) / (SAMPLES * count))
        for count in (FIRST_BATCH_PROMPTS, REFERENCE_PROMPTS)
    )
    for _ in range(FLOOR_RUNS):
        multipliers, zero = LagrangeMultipliers({"safety": 0.0}), rng.normal() * zero_error
        for _ in range(FLOOR_STEPS):
            mean = distance - zero + rng.normal() * step_error
            multipliers.update({"safety": mean}, {"safety": step_error}, {"safety": zero_error})
        last.append(multipliers.values["safety"])
    return {"mean": fmean(last), "p90": float(np.quantile(last, 0.9))}


def measure_updates() -> dict[str, dict[str, float]]:
    """Share of the possible gain of a table policy, by learning rate and updates per batch."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for learning_rate in LEARNING_RATES:
        for mini_batches, epochs in UPDATES:
            shares = []
            for seed in range(6):
                algorithm = AlgorithmSettings(kl_coef=0.0, mini_batches=mini_batches, epochs=epochs)
                policy = TablePolicy(seed, learning_rate, prompt_count=12, groups_per_prompt=1, sample_count=4)
                history = train(policy, algorithm, make_aggregator("linear", 1.0, 0.0), score_target_tokens, 25)
                start = 1 / 6  # a uniform policy hits one token of six
                shares.append((history[-1]["love"] - start) / (1 - start))
            results.setdefault(f"{learning_rate:g}", {})[f"{mini_batches}x{epochs}"] = fmean(shares)
    return results


OPTION_SEEDS, OPTION_STEPS, REWARD_NOISE = 12, 40, 0.5


def score_with_hack(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """A proxy of love: target tokens as in score_target_tokens, and half as much again for another token."""
    love = score_target_tokens(prompt, tokens)["love"]
    overrated_token = (prompt + 1) % VOCABULARY  # never a target: those of a prompt are an even distance away
    love += 1.5 * sum(token == overrated_token for token in tokens) / LENGTH
    return {"love": love, "helpfulness": 0.0, "safety": 0.0}


def score_with_noise(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Target tokens as in score_target_tokens, with as much noise as a reward model has on single replies."""
    love = score_target_tokens(prompt, tokens)["love"]
    return {"love": love + REWARD_NOISE * float(torch.randn(())), "helpfulness": 0.0, "safety": 0.0}


def measure_options() -> dict[str, dict[str, float]]:
    """Worth of single options with a noisy reward, mean of OPTION_SEEDS seeds, as expected share of target tokens.

    ends: the last policy and its average (learner.ema_decay 0.9), at a constant learning rate of 0.3 and with a linear
    decay, after a short and a long run. entropy: the last policy by algorithm.entropy_coef at that rate. budget: with a
    proxy reward that overrates a token, the policy at the end of training by algorithm.kl_budget. refresh: the last
    policy after a long run by algorithm.kl_coef and algorithm.reference_refresh_steps (0: never), with either reward.
    """
    results: dict[str, dict[str, float]] = {"ends": {}, "entropy": {}, "budget": {}, "refresh": {}}
    for steps in (OPTION_STEPS, 5 * OPTION_STEPS):
        for label, has_decay in (("constant", False), ("decay", True)):
            runs = [_train_table(seed, 0.3, steps, has_decay=has_decay) for seed in range(OPTION_SEEDS)]
            for end in ("last", "average"):
                results["ends"][f"{steps} steps, {label}, {end}"] = fmean(run[end] for run in runs)
    for entropy_coef in (0.0, 0.01, 0.03, 0.1, 0.3):
        runs = [_train_table(seed, 0.3, entropy_coef=entropy_coef) for seed in range(OPTION_SEEDS)]
        results["entropy"][f"{entropy_coef:g}"] = fmean(run["last"] for run in runs)
    for budget in (math.inf, 1.2, 0.8, 0.4, 0.2, 0.1):
        runs = [_train_table(seed, 0.1, score=score_with_hack, budget=budget) for seed in range(OPTION_SEEDS)]
        results["budget"][f"{budget:g}"] = fmean(run["last"] for run in runs)
    for label, score in (("honest", score_with_noise), ("proxy", score_with_hack)):
        for kl_coef in (0.1, 0.5):
            for refresh_steps in (0, 100, 50, 20):
                runs = [
                    _train_table(seed, 0.3, 5 * OPTION_STEPS, score=score, kl_coef=kl_coef, refresh_steps=refresh_steps)
                    for seed in range(OPTION_SEEDS)
                ]
                mean = fmean(run["last"] for run in runs)
                results["refresh"][f"{label}, kl_coef {kl_coef:g}, {refresh_steps} steps"] = mean
    return results


def _train_table(
    seed: int,
    learning_rate: float,
    steps: int = OPTION_STEPS,
    *,
    score: SignalFunction = score_with_noise,
    has_decay: bool = False,
    budget: float = math.inf,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    refresh_steps: int = 0,
) -> dict[str, float]:
    """Expected share of target tokens of the last policy and of the average of all."""
    algorithm = AlgorithmSettings(kl_coef=kl_coef, entropy_coef=entropy_coef)
    policy = TablePolicy(seed, learning_rate, prompt_count=4, groups_per_prompt=1, sample_count=4)
    module = nn.ParameterList([nn.Parameter(policy.logits.data)])  # shares memory with the table
    average = WeightAverage(module, 0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(policy.optimizer, 1.0, 0.0, steps)

    step_numbers = itertools.count(1)

    def is_over_budget() -> bool:
        average.update(module)
        if refresh_steps and next(step_numbers) % refresh_steps == 0:
            policy.refresh_reference()
        if has_decay:
            scheduler.step()
        return math.log(VOCABULARY) - _measure_entropy(policy.logits) > budget  # KL to the uniform policy

    train(policy, algorithm, make_aggregator("linear", 1.0, 0.0), score, steps, is_done=is_over_budget)
    result = {"last": _measure_love(policy.logits)}
    average.copy_to(module)
    return {**result, "average": _measure_love(policy.logits)}


def _measure_entropy(logits: torch.Tensor) -> float:
    logprobs = logits.detach().log_softmax(-1)
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())


def _measure_love(logits: torch.Tensor) -> float:
    """Expected share of target tokens."""
    probabilities = logits.detach().softmax(-1)
    prompts, length = probabilities.shape[:2]
    targets = torch.tensor([[(prompt + 2 * i) % VOCABULARY for i in range(length)] for prompt in range(prompts)])
    return float(probabilities.gather(-1, targets[..., None]).mean())


def measure_pessimism(data_folder: Path) -> dict[str, float]:
    """AUROC of the love signal on dev rows, by uncertainty penalty."""
    section = {
        "backbone": "minilm", "linear_probe": True, "epochs": 0, "frozen_share": 1,
        "ensemble": {"members": [{"layers": layers} for layers in (2, 4, 6)]},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.model_validate({"reward": {"love": section}})
        train_rows, dev_rows = (
            pq.read_table(data_folder / "love" / f"{split}.parquet").to_pylist() for split in ("train", "dev")
        )
        members = train_ensemble(settings, [HeadData("love", train_rows, dev_rows, data_folder / "love")], math.inf)
        outputs = {"love": (data_folder / "love", Path(folder))}
        export_models(settings, outputs, members, time.monotonic(), full_card=False)
        model = RewardModel.load(Path(folder), batch_tokens=8192)
        scores = model.score([ScoringItem(row["messages"], row["response"]) for row in dev_rows], "love")
    labels, weights = (np.asarray([float(row[key]) for row in dev_rows]) for key in ("label", "weight"))
    return {
        f"{penalty:g}": float(auroc(np.asarray([compute_signal(s, penalty) for s in scores]), labels, weights))
        for penalty in PENALTIES
    }


def main() -> None:
    """Run every part whose input is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run, for weights")
    parser.add_argument("--data", type=Path, help="prepared data set, for pessimism")
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "floors": {f"{distance:+g} sd": simulate_floor(distance) for distance in (0.0, 0.1, 0.25, -0.25, -1.0)},
        "updates": measure_updates(),
        "options": measure_options(),
    }
    if arguments.run is not None:
        results["weights"] = measure_weights(arguments.run)
    if arguments.data is not None:
        results["pessimism"] = measure_pessimism(arguments.data)
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
