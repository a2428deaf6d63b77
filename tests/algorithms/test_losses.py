"""Losses against numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rluf.algorithms.batch import Batch
from rluf.algorithms.logprobs import chosen_logprobs
from rluf.algorithms.losses import (
    LOSSES,
    SUMS,
    adapted,
    drifts_of,
    importance_weights,
    kl_estimate,
    kl_to_go,
    metrics,
    policy_loss,
)
from rluf.config.policy import AlgorithmSettings
from rluf.errors import SettingsError


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def batch_of(advantages: list[float], weights: list[float], rollout: Tensor) -> Batch:
    count = len(advantages)
    index = torch.arange(count)
    return Batch(
        input_ids=index[None],
        position_ids=index[None],
        rows=index[None],
        places=index,
        keep=index,
        targets=index,
        sequences=torch.zeros(count, dtype=torch.int64),
        advantages=torch.tensor(advantages),
        loss_weights=torch.tensor(weights),
        rollout_logprobs=rollout,
    )


def surrogate(
    name: str,
    new: Tensor,
    old: Tensor,
    advantages: list[float],
    *,
    sequences: list[int] | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    algorithm = AlgorithmSettings(clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)
    numbers = torch.tensor(sequences or [0] * len(advantages))
    return LOSSES[name](new, old, torch.tensor(advantages), numbers, algorithm)


def test_clip_is_asymmetric_and_keeps_the_pessimistic_side() -> None:
    # ratios 2, 0.5, 2, 0.5 with advantages +1, +1, -1, -1; clips at 0.8 and 1.3
    new, old = logs(0.4, 0.1, 0.4, 0.1), logs(0.2, 0.2, 0.2, 0.2)
    loss, clipped = surrogate("ppo", new, old, [1.0, 1.0, -1.0, -1.0])
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 2.0, 0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_clipped_tokens_have_no_gradient() -> None:
    new = logs(0.4, 0.1, 0.4, 0.1).requires_grad_()
    loss, clipped = surrogate("ppo", new, logs(0.2, 0.2, 0.2, 0.2), [1.0, 1.0, -1.0, -1.0])
    loss.sum().backward()
    assert new.grad is not None
    assert (new.grad == 0).tolist() == clipped.tolist()
    assert new.grad.tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0])


def test_kl_estimators() -> None:
    # l = log(0.5 / 0.25) = log 2
    new, reference = logs(0.5), logs(0.25)
    assert kl_estimate(new, reference, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(new, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(new, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    with pytest.raises(SettingsError, match="'k4'"):
        kl_estimate(new, reference, "k4")


def test_k1_and_k3_agree_with_the_exact_kl_on_average() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    exact = (policy * (policy / reference).log()).sum()
    for name in ("k1", "k3"):
        assert (policy * kl_estimate(policy.log(), reference.log(), name)).sum() == pytest.approx(exact.item())


def test_gradient_of_k2_on_policy_is_that_of_the_exact_kl_and_k1_has_none() -> None:
    reference = torch.tensor([0.5, 0.3, 0.2]).log()
    logits = torch.tensor([0.3, -0.2, 0.4], requires_grad=True)
    found = {}
    for name in ("exact", "k1", "k2"):
        logprobs = logits.log_softmax(-1)
        if name == "exact":
            value = (logprobs.exp() * (logprobs - reference)).sum()
        else:
            value = (logprobs.exp().detach() * kl_estimate(logprobs, reference, name)).sum()
        found[name] = torch.autograd.grad(value, logits)[0]
    assert torch.allclose(found["k2"], found["exact"], atol=1e-6)
    assert torch.allclose(found["k1"], torch.zeros(3), atol=1e-6)


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    learner = logs(0.3, 0.2, 0.1).requires_grad_()
    weights = importance_weights(learner, logs(0.1, 0.2, 0.2), torch.tensor([0, 0, 1]), kind="token", cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # ratios 3, 1 in the first response (product 3); 0.4, 1.5 in the second (product 0.6); cap 2
        ("token", [2.0, 1.0, 0.4, 1.5]),
        ("mask", [0.0, 1.0, 0.0, 1.5]),
        ("sequence", [2.0, 2.0, 0.6, 0.6]),
        ("sequence_mask", [0.0, 0.0, 0.6, 0.6]),
        ("off", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_kinds_of_importance_correction(kind: str, expected: list[float]) -> None:
    learner, engine = logs(0.3, 0.2, 0.08, 0.3), logs(0.1, 0.2, 0.2, 0.2)
    found = importance_weights(learner, engine, torch.tensor([0, 0, 1, 1]), kind=kind, cap=2.0)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_unknown_correction_is_refused() -> None:
    with pytest.raises(SettingsError, match="'tokens'"):
        importance_weights(logs(0.1), logs(0.1), torch.tensor([0]), kind="tokens", cap=2.0)


def stale() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Logprobs, old ones and advantages of 60 tokens in 7 responses of random length."""
    draw = torch.Generator().manual_seed(7)
    old = -5 * torch.rand(60, generator=draw, dtype=torch.float64)
    new = old + torch.randn(60, generator=draw, dtype=torch.float64) * 0.4
    numbers = sorted(torch.randint(0, 7, (60,), generator=draw).tolist())
    gains = torch.randn(7, generator=draw, dtype=torch.float64)[torch.tensor(numbers)]
    return new.requires_grad_(), old, gains, numbers


def padded(values: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """[responses, longest] of flat values, and the mask."""
    rows = [values[torch.tensor(numbers) == n] for n in range(7)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True).bool()
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def test_dual_clip_equals_verl() -> None:
    new, old, gains, numbers = stale()
    ratio = (new - old).exp()
    first = torch.maximum(-gains * ratio, -gains * ratio.clamp(0.8, 1.3))
    expected = torch.where(gains < 0, torch.minimum(-gains * 1.2, first), first)
    found, _ = surrogate("ppo", new, old, gains.tolist(), sequences=numbers, dual_clip=1.2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found != surrogate("ppo", new, old, gains.tolist(), sequences=numbers)[0]).any()


def test_gspo_equals_trl_and_verl_in_value_and_gradient() -> None:
    """TRL: importance_sampling_level="sequence" with the mean over sequences, on a padded batch."""
    new, old, gains, numbers = stale()
    table, mask = padded(new - old, numbers)
    ratio = ((table * mask).sum(1) / mask.sum(1)).exp()
    advantage = padded(gains, numbers)[0][:, 0]
    expected = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage).mean()
    slope = torch.autograd.grad(expected, new)[0]
    found, _ = surrogate("gspo", new, old, gains.tolist(), sequences=numbers)
    weights = 1 / (7 * mask.sum(1)[torch.tensor(numbers)])
    assert (found * weights).sum().item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(torch.autograd.grad((found * weights).sum(), new)[0], slope, atol=1e-6)


def test_cispo_equals_verl_in_value_and_gradient() -> None:
    new, old, gains, numbers = stale()
    ratio = (new - old).exp()
    expected = -ratio.clamp(0.8, 1.3).detach() * gains * new
    slope = torch.autograd.grad(expected.sum(), new)[0]
    found, cut = surrogate("cispo", new, old, gains.tolist(), sequences=numbers)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(found.sum(), new)[0], slope, atol=1e-6)
    assert (slope[cut] != 0).all() and cut.any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    new, _, gains, numbers = stale()
    sizes = torch.tensor([numbers.count(n) for n in numbers])
    found, _ = surrogate(name, new, new.detach(), gains.tolist(), sequences=numbers)
    gradient = torch.autograd.grad((found / sizes).sum(), new)[0]
    assert torch.allclose(gradient, -gains / sizes, atol=1e-6)


def test_kl_still_to_come_lowers_the_advantage_of_each_token() -> None:
    # k1 of the engine: 0.1, 0.2, -0.3 in one response, 0.5 in another; still to come: 0.0, -0.1, -0.3 and 0.5
    rollout, drift = torch.tensor([-1.0, -2.0, -1.5, -0.5]), torch.tensor([0.1, 0.2, -0.3, 0.5])
    batch = batch_of([1.0, 1.0, 1.0, 2.0], [1.0] * 4, rollout)
    batch = dataclasses.replace(batch, sequences=torch.tensor([0, 0, 0, 1]))
    assert kl_to_go(rollout - drift, batch).tolist() == pytest.approx([0.0, -0.1, -0.3, 0.5], abs=1e-6)
    first, second = drifts_of(rollout - drift, batch)
    assert (first.kl, first.togo, first.togo_squared) == pytest.approx((0.0, -0.4, 0.1), abs=1e-6)
    assert (second.kl, second.togo, second.togo_squared) == pytest.approx((0.5, 0.5, 0.25), abs=1e-6)
    learner = rollout.clone().requires_grad_()
    policy_loss(learner, rollout - drift, batch, AlgorithmSettings(), kl_coef=0.0, slope=2.0).loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([-1.0, -1.2, -1.6, -1.0], abs=1e-6)


def test_adaptive_kl_equals_verl() -> None:
    # verl's AdaptiveKLController: clip(kl / target - 1, -0.2, 0.2), times n / horizon
    assert adapted(0.1, 5.0, 0.1, 1000) == pytest.approx(0.1 * (1 + 0.2 * 1000 / 10_000))
    assert adapted(0.1, 0.0, 0.1, 1000) == pytest.approx(0.1 * (1 - 0.2 * 1000 / 10_000))
    assert adapted(0.1, 0.11, 0.1, 500) == pytest.approx(0.1 * (1 + 0.1 * 500 / 10_000))
    assert adapted(0.1, 5.0, None, 1000) == 0.1


def test_synchronous_loss_has_ratio_one_and_uses_the_engine_only_for_correction() -> None:
    # weights 1/3, capped corrections 2 (of 3), 1, 0.5; KL to itself is 0
    learner = logs(0.3, 0.2, 0.1).requires_grad_()
    batch = batch_of([1.0, -1.0, 2.0], [1 / 3] * 3, logs(0.1, 0.2, 0.2))
    result = policy_loss(learner, learner.detach(), batch, AlgorithmSettings())
    assert result.loss.item() == pytest.approx(-(2 * 1 - 1 + 0.5 * 2) / 3)
    result.loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([-2 / 3, 1 / 3, -1 / 3])
    found = metrics(result.sums, float(result.peak))
    assert found["clip_share"] == 0.0
    assert found["ratio_max"] == pytest.approx(3.0)
    assert found["ratio_mean"] == pytest.approx(1.5)
    assert found["effective_sample_size"] == pytest.approx(4.5**2 / (3 * (9 + 1 + 0.25)))
    assert found["mismatch_kl"] == pytest.approx(((3 - 1 - math.log(3)) + (0.5 - 1 - math.log(0.5))) / 3)
    assert found["cap_share"] == pytest.approx(1 / 3)
    assert found["entropy"] == pytest.approx(-math.log(0.3 * 0.2 * 0.1) / 3)


def test_stale_loss_clips_against_the_engine() -> None:
    learner = logs(0.3, 0.2).requires_grad_()
    batch = batch_of([1.0, 1.0], [0.5, 0.5], logs(0.1, 0.2))
    result = policy_loss(learner, learner.detach(), batch, AlgorithmSettings(staleness=1))
    assert result.loss.item() == pytest.approx(-(1.2 + 1.0) / 2)
    assert metrics(result.sums, 0.0)["clip_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_demonstration_gets_the_gradient_of_its_mean_log_likelihood(staleness: int) -> None:
    learner, reference = logs(0.3, 0.2, 0.1).requires_grad_(), logs(0.1, 0.1, 0.1)
    batch = batch_of([0.0, 1.0, 1.0], [1 / 3] * 3, torch.tensor([math.log(0.3), math.nan, math.nan]))
    batch = dataclasses.replace(batch, sequences=torch.tensor([0, 1, 1]))
    result = policy_loss(learner, reference, batch, AlgorithmSettings(staleness=staleness, kl_coef=0.0))
    result.loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([0.0, -1 / 3, -1 / 3])
    found = metrics(result.sums, float(result.peak))
    assert found["demonstration_nll"] == pytest.approx(-math.log(0.2 * 0.1) / 2)
    assert found["kl_sequence"] == pytest.approx(math.log(3))  # the sample alone: 1 sample of 1 token
    assert (found["ratio_max"], found["effective_sample_size"]) == (1.0, 1.0)
    assert result.sums[SUMS.index("response_tokens")] == 1


def test_kl_term_and_kl_metrics() -> None:
    learner, reference = logs(0.5, 0.5), logs(0.25, 0.5)
    batch = batch_of([0.0, 0.0], [0.5, 0.5], learner)
    result = policy_loss(learner, reference, batch, AlgorithmSettings(kl_coef=0.1))
    k3 = 0.5 - 1 + math.log(2)
    assert result.loss.item() == pytest.approx(0.1 * k3 / 2)
    found = metrics(result.sums, 1.0)
    assert found["kl"] == pytest.approx(k3 / 2)
    assert found["kl_sequence"] == pytest.approx(math.log(2))


def test_tokens_without_weight_leave_no_trace() -> None:
    learner = logs(0.3).requires_grad_()
    result = policy_loss(learner, logs(0.01), batch_of([0.0], [0.0], logs(1e-9)), AlgorithmSettings())
    assert result.sums.tolist() == [0.0] * len(SUMS)
    assert result.peak.item() == 0.0
    result.loss.backward()
    assert learner.grad is not None and learner.grad.item() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chosen_logprobs_equal_log_softmax_with_its_gradient(temperature: float) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (700,))
    weights = torch.randn(700)
    logits = torch.randn(700, 50, requires_grad=True)
    expected = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    slope = torch.autograd.grad((weights * expected).sum(), logits)[0]
    found = chosen_logprobs(logits, targets, temperature)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad((weights * found).sum(), logits)[0], slope, atol=1e-6)


def test_chosen_logprobs_of_bfloat16_logits_are_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50).bfloat16().requires_grad_()
    found = chosen_logprobs(logits, torch.arange(5))
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.float().log_softmax(-1).diagonal(), atol=1e-6)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
