"""Losses against hand-computed numbers and independent formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rluf.algorithms.losses import (
    METRIC_SUM_NAMES,
    POLICY_LOSSES,
    compute_importance_weights,
    compute_kl_to_go,
    compute_loss_metrics,
    compute_policy_loss,
    compute_reference_kl,
    estimate_kl,
    estimate_negative_entropy,
    find_policy_loss,
    update_kl_coef,
)
from rluf.algorithms.packing import PackedBatch
from rluf.algorithms.policy_model import compute_target_logprobs
from rluf.config.policy import AlgorithmSettings
from rluf.errors import SettingsError


def to_logprobs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def make_batch(advantages: list[float], loss_weights: list[float], rollout_logprobs: Tensor) -> PackedBatch:
    count = len(advantages)
    index = torch.arange(count)
    return PackedBatch(
        input_ids=index[None],
        position_ids=index[None],
        sequence_token_index=index[None],
        token_output_index=index,
        flat_token_index=index,
        flat_output_index=index,
        sequence_starts=torch.tensor([0, count], dtype=torch.int32),
        prompt_token_index=index[None],
        response_token_index=index[None],
        split_output_index=index,
        logit_index=index,
        target_ids=index,
        sequence_index=torch.zeros(count, dtype=torch.int64),
        advantages=torch.tensor(advantages),
        loss_weights=torch.tensor(loss_weights),
        rollout_logprobs=rollout_logprobs,
    )


def compute_token_loss(
    name: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: list[float],
    *,
    sequence_index: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    algorithm = AlgorithmSettings(clip=(0.2, 0.3))
    index = torch.tensor(sequence_index or [0] * len(advantages))
    return POLICY_LOSSES[name](logprobs, old_logprobs, torch.tensor(advantages), index, algorithm)


def test_clip_is_asymmetric_and_pessimistic() -> None:
    # ratios 2, 0.5, 2, 0.5 with advantages +1, +1, -1, -1; clips at 0.8 and 1.3
    new, old = to_logprobs(0.4, 0.1, 0.4, 0.1), to_logprobs(0.2, 0.2, 0.2, 0.2)
    loss, clipped = compute_token_loss("ppo", new, old, [1.0, 1.0, -1.0, -1.0])
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 2.0, 0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_clipped_tokens_have_no_gradient() -> None:
    new = to_logprobs(0.4, 0.1, 0.4, 0.1).requires_grad_()
    loss, clipped = compute_token_loss("ppo", new, to_logprobs(0.2, 0.2, 0.2, 0.2), [1.0, 1.0, -1.0, -1.0])
    loss.sum().backward()
    assert new.grad is not None
    assert (new.grad == 0).tolist() == clipped.tolist()
    assert new.grad.tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0])


def test_kl_estimators() -> None:
    # l = log(0.5 / 0.25) = log 2
    new, reference = to_logprobs(0.5), to_logprobs(0.25)
    assert estimate_kl(new, reference, "k1").item() == pytest.approx(math.log(2))
    assert estimate_kl(new, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert estimate_kl(new, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    with pytest.raises(SettingsError, match="'k4'"):
        estimate_kl(new, reference, "k4")


def test_k1_and_k3_agree_with_the_exact_kl_on_average() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    exact = (policy * (policy / reference).log()).sum()
    for name in ("k1", "k3"):
        assert (policy * estimate_kl(policy.log(), reference.log(), name)).sum() == pytest.approx(exact.item())


def test_gradient_of_k2_on_policy_is_that_of_the_exact_kl_and_k1_has_none() -> None:
    reference = torch.tensor([0.5, 0.3, 0.2]).log()
    logits = torch.tensor([0.3, -0.2, 0.4], requires_grad=True)
    gradients = {}
    for name in ("exact", "k1", "k2"):
        logprobs = logits.log_softmax(-1)
        if name == "exact":
            value = (logprobs.exp() * (logprobs - reference)).sum()
        else:
            value = (logprobs.exp().detach() * estimate_kl(logprobs, reference, name)).sum()
        gradients[name] = torch.autograd.grad(value, logits)[0]
    assert torch.allclose(gradients["k2"], gradients["exact"], atol=1e-6)
    assert torch.allclose(gradients["k1"], torch.zeros(3), atol=1e-6)


def test_importance_weights_are_capped_and_have_no_gradient() -> None:
    learner = to_logprobs(0.3, 0.2, 0.1).requires_grad_()
    weights = compute_importance_weights(
        learner, to_logprobs(0.1, 0.2, 0.2), torch.tensor([0, 0, 1]), correction="token", ratio_cap=2.0
    )
    assert weights.tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # ratios 3, 1 in the first response (product 3); 0.4, 1.5 in the second (product 0.6); cap 2
        ("token", [2.0, 1.0, 0.4, 1.5]),
        ("mask", [0.0, 1.0, 0.0, 1.5]),
        ("sequence", [2.0, 2.0, 0.6, 0.6]),
        ("sequence_mask", [0.0, 0.0, 0.6, 0.6]),
    ],
)
def test_importance_corrections(correction: str, expected: list[float]) -> None:
    learner, engine = to_logprobs(0.3, 0.2, 0.08, 0.3), to_logprobs(0.1, 0.2, 0.2, 0.2)
    sequence_index = torch.tensor([0, 0, 1, 1])
    weights = compute_importance_weights(learner, engine, sequence_index, correction=correction, ratio_cap=2.0)
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)


def test_unknown_correction_is_refused() -> None:
    with pytest.raises(SettingsError, match="'tokens'"):
        compute_importance_weights(
            to_logprobs(0.1), to_logprobs(0.1), torch.tensor([0]), correction="tokens", ratio_cap=2.0
        )


def make_stale_tokens() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Logprobs, old logprobs and advantages of 60 tokens in 7 responses of random length, and their sequence index."""
    generator = torch.Generator().manual_seed(7)
    old_logprobs = -5 * torch.rand(60, generator=generator, dtype=torch.float64)
    logprobs = old_logprobs + torch.randn(60, generator=generator, dtype=torch.float64) * 0.4
    sequence_index = sorted(torch.randint(0, 7, (60,), generator=generator).tolist())
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)[torch.tensor(sequence_index)]
    return logprobs.requires_grad_(), old_logprobs, advantages, sequence_index


def pad_responses(values: Tensor, sequence_index: list[int]) -> tuple[Tensor, Tensor]:
    """[responses, longest] of flat values, and the mask."""
    rows = [values[torch.tensor(sequence_index) == row] for row in range(7)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True).bool()
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def test_dual_clip_equals_verl() -> None:
    logprobs, old_logprobs, advantages, sequence_index = make_stale_tokens()
    logprobs = logprobs + 1.0  # ratios above 3
    ratio = (logprobs - old_logprobs).exp()
    clipped_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.3))
    expected = torch.where(advantages < 0, torch.minimum(-advantages * 3.0, clipped_loss), clipped_loss)
    token_loss, _ = compute_token_loss(
        "ppo", logprobs, old_logprobs, advantages.tolist(), sequence_index=sequence_index
    )
    assert torch.allclose(token_loss, expected, atol=1e-6)
    assert (token_loss != clipped_loss).any()


def test_gspo_equals_trl_and_verl_in_value_and_gradient() -> None:
    """TRL: importance_sampling_level="sequence" with the mean over sequences, on a padded batch."""
    logprobs, old_logprobs, advantages, sequence_index = make_stale_tokens()
    log_ratio, mask = pad_responses(logprobs - old_logprobs, sequence_index)
    ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).exp()
    response_advantages = pad_responses(advantages, sequence_index)[0][:, 0]
    expected = -torch.min(ratio * response_advantages, ratio.clamp(0.8, 1.3) * response_advantages).mean()
    expected_gradient = torch.autograd.grad(expected, logprobs)[0]
    token_loss, _ = compute_token_loss(
        "gspo", logprobs, old_logprobs, advantages.tolist(), sequence_index=sequence_index
    )
    token_weights = 1 / (7 * mask.sum(1)[torch.tensor(sequence_index)])
    assert (token_loss * token_weights).sum().item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(
        torch.autograd.grad((token_loss * token_weights).sum(), logprobs)[0], expected_gradient, atol=1e-6
    )


def test_cispo_equals_verl_in_value_and_gradient() -> None:
    logprobs, old_logprobs, advantages, sequence_index = make_stale_tokens()
    ratio = (logprobs - old_logprobs).exp()
    expected = -ratio.clamp(0.8, 1.3).detach() * advantages * logprobs
    expected_gradient = torch.autograd.grad(expected.sum(), logprobs)[0]
    token_loss, is_clipped = compute_token_loss(
        "cispo", logprobs, old_logprobs, advantages.tolist(), sequence_index=sequence_index
    )
    assert torch.allclose(token_loss, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(token_loss.sum(), logprobs)[0], expected_gradient, atol=1e-6)
    assert (expected_gradient[is_clipped] != 0).all() and is_clipped.any()


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    logprobs, _, advantages, sequence_index = make_stale_tokens()
    lengths = torch.tensor([sequence_index.count(row) for row in sequence_index])
    token_loss, _ = compute_token_loss(
        name, logprobs, logprobs.detach(), advantages.tolist(), sequence_index=sequence_index
    )
    gradient = torch.autograd.grad((token_loss / lengths).sum(), logprobs)[0]
    assert torch.allclose(gradient, -advantages / lengths, atol=1e-6)


def test_kl_to_go_lowers_the_advantage_of_each_token() -> None:
    # k1 of the engine: 0.1, 0.2, -0.3 in one response, 0.5 in another; to go: 0.0, -0.1, -0.3 and 0.5
    rollout, token_kl = torch.tensor([-1.0, -2.0, -1.5, -0.5]), torch.tensor([0.1, 0.2, -0.3, 0.5])
    batch = make_batch([1.0, 1.0, 1.0, 2.0], [1.0] * 4, rollout)
    batch = dataclasses.replace(batch, sequence_index=torch.tensor([0, 0, 0, 1]))
    assert compute_kl_to_go(rollout - token_kl, batch).tolist() == pytest.approx([0.0, -0.1, -0.3, 0.5], abs=1e-6)
    first, second = compute_reference_kl(rollout - token_kl, batch)
    assert (first.kl_sum, first.kl_to_go_sum, first.kl_to_go_squared_sum) == pytest.approx((0.0, -0.4, 0.1), abs=1e-6)
    assert (second.kl_sum, second.kl_to_go_sum, second.kl_to_go_squared_sum) == pytest.approx(
        (0.5, 0.5, 0.25), abs=1e-6
    )
    learner = rollout.clone().requires_grad_()
    compute_policy_loss(
        learner, rollout - token_kl, batch, AlgorithmSettings(), kl_coef=0.0, kl_to_go_coef=2.0
    ).loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([-1.0, -1.2, -1.6, -1.0], abs=1e-6)


def test_adaptive_kl_equals_verl() -> None:
    # verl's AdaptiveKLController: clip(kl / target - 1, -0.2, 0.2), times n / horizon
    assert update_kl_coef(0.1, 5.0, 0.1, 1000, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 1000 / 10_000))
    assert update_kl_coef(0.1, 0.0, 0.1, 1000, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 1000 / 10_000))
    assert update_kl_coef(0.1, 0.11, 0.1, 500, 10_000) == pytest.approx(0.1 * (1 + 0.1 * 500 / 10_000))
    assert update_kl_coef(0.1, 5.0, None, 1000, 10_000) == 0.1


@pytest.mark.parametrize(("prompts", "samples"), [(12, 4), (1, 2), (256, 16)])
def test_the_default_horizon_reaches_a_far_target_within_a_run_of_any_batch_size(prompts: int, samples: int) -> None:
    algorithm = AlgorithmSettings(prompts_per_step=prompts, samples_per_prompt=samples)
    kl_coef = 0.02
    for _ in range(14):
        kl_coef = update_kl_coef(kl_coef, 0.5, 0.1, prompts * samples, algorithm.kl_horizon_samples)
    assert kl_coef == pytest.approx(0.02 * 1.02**14)
    explicit = AlgorithmSettings(kl_horizon=prompts * samples)
    assert update_kl_coef(0.1, 0.5, 0.1, prompts * samples, explicit.kl_horizon_samples) == pytest.approx(0.12)


@pytest.mark.parametrize(("sample_count", "horizon"), [(48, 1), (48, 9), (1024, 100), (48, 48)])
def test_a_short_horizon_changes_the_coefficient_by_at_most_a_fifth(sample_count: int, horizon: int) -> None:
    assert update_kl_coef(0.05, 0.0, 0.1, sample_count, horizon) == pytest.approx(0.04)
    assert update_kl_coef(0.05, 9.0, 0.1, sample_count, horizon) == pytest.approx(0.06)


@pytest.mark.parametrize("log_ratio", [-800.0, -30.0, -3.0, -1e-4, 0.0, 5.0, 800.0])
def test_k3_is_bounded_in_value_and_gradient(log_ratio: float) -> None:
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    value = estimate_kl(logprobs, torch.zeros(1), "k3")
    value.backward()
    assert 0.0 <= value.item() <= 10.0
    assert logprobs.grad is not None and abs(logprobs.grad.item()) <= 12.0
    if abs(log_ratio) < 2:
        assert value.item() == pytest.approx(math.expm1(-log_ratio) + log_ratio, abs=1e-6)


@pytest.mark.parametrize("loss_name", ["ppo", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("log_ratio", [100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("algorithm", [{"max_staleness": 1}, {"epochs": 2}, {}])
def test_no_ratio_makes_loss_gradient_or_metrics_infinite(
    loss_name: str, advantage: float, log_ratio: float, algorithm: dict[str, int]
) -> None:
    rollout_logprobs = torch.tensor([-1.0 - max(0.0, log_ratio), -1.0])
    logprobs = torch.tensor([-1.0 + min(0.0, log_ratio), -1.0], requires_grad=True)
    result = compute_policy_loss(
        logprobs,
        torch.tensor([-1.0, -1.0]),
        make_batch([advantage, advantage], [0.5, 0.5], rollout_logprobs),
        AlgorithmSettings.model_validate(algorithm),
        loss_name=loss_name,
        start_logprobs=rollout_logprobs,
    )
    result.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all() and result.loss.isfinite()
    metrics = compute_loss_metrics(result.metric_sums, float(result.max_ratio))
    assert all(map(math.isfinite, metrics.values())), metrics


@pytest.mark.parametrize(
    ("correction", "share"),
    # ratios 1.5 and 1.5, their product 2.25: capped as a product only
    [("token", 0.0), ("sequence", 1.0), ("mask", 0.0), ("sequence_mask", 1.0), ("geometric", 0.0),
     ("geometric_mask", 1.0), ("off", 0.0)],
)  # fmt: skip
def test_the_capped_share_counts_what_the_correction_bounds_or_leaves_out(correction: str, share: float) -> None:
    algorithm = AlgorithmSettings.model_validate({"importance_correction": correction})
    batch = make_batch([1.0, 1.0], [0.5, 0.5], to_logprobs(0.2, 0.2))
    result = compute_policy_loss(to_logprobs(0.3, 0.3), None, batch, algorithm)
    assert compute_loss_metrics(result.metric_sums, 1.0)["ratio_capped_fraction"] == share


def test_geometric_corrections_do_not_degenerate_with_the_length_of_a_response() -> None:
    """Engine noise of mismatch_kl 0.0022: the product drops most of a long response's weight, the mean does not."""
    generator = torch.Generator().manual_seed(0)
    for length in (40, 400, 1000):
        noise = 0.066 * torch.randn(200 * length, generator=generator) - 0.0022
        index = torch.arange(200).repeat_interleave(length)

        def weigh(correction: str, noise: Tensor = noise, index: Tensor = index) -> Tensor:
            zeros = torch.zeros_like(noise)
            return compute_importance_weights(noise, zeros, index, correction=correction, ratio_cap=2.0)

        geometric, masked = weigh("geometric"), weigh("geometric_mask")
        assert geometric.min() > 0.95 and geometric.max() < 1.05
        assert (masked == 0).float().mean() < 0.01
    assert (weigh("sequence") < 0.1).float().mean() > 0.1
    far = torch.cat([torch.full((10,), 0.2), torch.zeros(10)])
    index = torch.arange(2).repeat_interleave(10)
    far_weights = compute_importance_weights(far, torch.zeros(20), index, correction="geometric_mask", ratio_cap=2.0)
    assert far_weights.tolist() == [0.0] * 10 + [1.0] * 10


def test_the_entropy_bonus_has_the_gradient_of_the_entropy_on_average() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, requires_grad=True)
    probabilities = logits.softmax(0)
    entropy = -(probabilities * probabilities.log()).sum()
    (expected,) = torch.autograd.grad(-entropy, logits)
    tokens = torch.multinomial(probabilities.detach(), 200_000, replacement=True)
    is_sampled = torch.ones(len(tokens), dtype=torch.bool)
    surrogate = estimate_negative_entropy(logits.log_softmax(0)[tokens], is_sampled).mean()
    (estimate,) = torch.autograd.grad(surrogate, logits)
    assert torch.allclose(estimate, expected, atol=0.01)
    assert not estimate_negative_entropy(torch.randn(3), torch.zeros(3, dtype=torch.bool)).any()


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "reinforce"])
def test_old_and_behavior_policy_are_decoupled_where_a_batch_has_several_updates(loss: str) -> None:
    """The ratio is relative to the learner at the start of the step, the correction to the engine."""
    rollout, start = torch.tensor([-2.0, -1.0, -0.5]), torch.tensor([-1.9, -1.2, -0.5])
    current = torch.tensor([-1.8, -1.1, -0.4], requires_grad=True)
    batch = dataclasses.replace(
        make_batch([1.0, 1.0, -1.0], [0.25, 0.25, 0.5], rollout), sequence_index=torch.tensor([0, 0, 1])
    )
    algorithm = AlgorithmSettings(kl_coef=0.0, epochs=2, max_staleness=2)
    result = compute_policy_loss(current, None, batch, algorithm, loss_name=loss, start_logprobs=start)
    ratio, correction = (current.detach() - start).exp(), (start - rollout).exp()
    if loss == "gspo":
        mean = (current.detach() - start)[:2].mean()
        ratio = torch.stack([mean, mean, (current.detach() - start)[2]]).exp()
    if loss == "reinforce":
        expected = -batch.advantages * current.detach() * (current.detach() - rollout).exp()
    elif loss == "cispo":
        expected = -batch.advantages * current.detach() * ratio * correction
    else:
        expected = -batch.advantages * ratio * correction
    assert result.loss.item() == pytest.approx(float((batch.loss_weights * expected).sum()), rel=1e-5)
    assert "kl" not in compute_loss_metrics(result.metric_sums, 1.0, has_reference=False)


def test_gspo_on_stale_batches_does_not_clip_the_engines_rounding() -> None:
    """M8: at a narrow clip range the engine's rounding alone would exceed it."""
    torch.manual_seed(0)
    rollout = -torch.rand(400) - 1.0
    learner = (rollout + 0.066 * torch.randn(400)).requires_grad_()
    batch = make_batch([1.0] * 400, [1 / 400] * 400, rollout)
    batch = dataclasses.replace(batch, sequence_index=torch.arange(400) // 40)
    algorithm = AlgorithmSettings(clip=(3e-4, 4e-4), max_staleness=1, kl_coef=0.0, loss="gspo")
    result = compute_policy_loss(learner, None, batch, algorithm, loss_name="gspo")
    assert compute_loss_metrics(result.metric_sums, 1.0)["clip_share"] == 0.0
    engine_ratio = algorithm.model_copy(update={"old_policy": "engine"})
    result = compute_policy_loss(learner, None, batch, engine_ratio, loss_name="gspo")
    assert compute_loss_metrics(result.metric_sums, 1.0)["clip_share"] > 0.2


def test_synchronous_loss_has_ratio_one_and_uses_the_engine_only_for_correction() -> None:
    # weights 1/3, capped corrections 2 (of 3), 1, 0.5; KL to itself is 0
    learner = to_logprobs(0.3, 0.2, 0.1).requires_grad_()
    batch = make_batch([1.0, -1.0, 2.0], [1 / 3] * 3, to_logprobs(0.1, 0.2, 0.2))
    result = compute_policy_loss(learner, learner.detach(), batch, AlgorithmSettings())
    assert result.loss.item() == pytest.approx(-(2 * 1 - 1 + 0.5 * 2) / 3)
    result.loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([-2 / 3, 1 / 3, -1 / 3])
    metrics = compute_loss_metrics(result.metric_sums, float(result.max_ratio))
    assert metrics["clip_share"] == 0.0
    assert metrics["ratio_max"] == pytest.approx(3.0)
    assert metrics["ratio_mean"] == pytest.approx(1.5)
    assert metrics["effective_sample_size"] == pytest.approx(4.5**2 / (3 * (9 + 1 + 0.25)))
    assert metrics["mismatch_kl"] == pytest.approx(((3 - 1 - math.log(3)) + (0.5 - 1 - math.log(0.5))) / 3)
    assert metrics["ratio_capped_fraction"] == pytest.approx(1 / 3)
    assert metrics["entropy"] == pytest.approx(-math.log(0.3 * 0.2 * 0.1) / 3)


def test_stale_loss_clips_against_the_engine() -> None:
    learner = to_logprobs(0.3, 0.2).requires_grad_()
    batch = make_batch([1.0, 1.0], [0.5, 0.5], to_logprobs(0.1, 0.2))
    result = compute_policy_loss(learner, learner.detach(), batch, AlgorithmSettings(max_staleness=1))
    assert result.loss.item() == pytest.approx(-(1.2 + 1.0) / 2)
    assert compute_loss_metrics(result.metric_sums, 0.0)["clip_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_demonstration_gets_the_gradient_of_its_mean_log_likelihood(staleness: int) -> None:
    learner, reference = to_logprobs(0.3, 0.2, 0.1).requires_grad_(), to_logprobs(0.1, 0.1, 0.1)
    batch = make_batch([0.0, 1.0, 1.0], [1 / 3] * 3, torch.tensor([math.log(0.3), math.nan, math.nan]))
    batch = dataclasses.replace(batch, sequence_index=torch.tensor([0, 1, 1]))
    result = compute_policy_loss(learner, reference, batch, AlgorithmSettings(max_staleness=staleness, kl_coef=0.0))
    result.loss.backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([0.0, -1 / 3, -1 / 3])
    metrics = compute_loss_metrics(result.metric_sums, float(result.max_ratio))
    assert metrics["demonstration_nll"] == pytest.approx(-math.log(0.2 * 0.1) / 2)
    assert metrics["kl_sequence"] == pytest.approx(math.log(3))  # the sample only: 1 sample of 1 token
    assert (metrics["ratio_max"], metrics["effective_sample_size"]) == (1.0, 1.0)
    assert result.metric_sums[METRIC_SUM_NAMES.index("response_tokens")] == 1


def test_kl_term_and_kl_metrics() -> None:
    learner, reference = to_logprobs(0.5, 0.5), to_logprobs(0.25, 0.5)
    batch = make_batch([0.0, 0.0], [0.5, 0.5], learner)
    result = compute_policy_loss(learner, reference, batch, AlgorithmSettings(kl_coef=0.1))
    k3 = 0.5 - 1 + math.log(2)
    assert result.loss.item() == pytest.approx(0.1 * k3 / 2)
    metrics = compute_loss_metrics(result.metric_sums, 1.0)
    assert metrics["kl"] == pytest.approx(k3 / 2)
    assert metrics["kl_sequence"] == pytest.approx(math.log(2))


def test_tokens_without_weight_have_no_effect() -> None:
    learner = to_logprobs(0.3).requires_grad_()
    result = compute_policy_loss(
        learner, to_logprobs(0.01), make_batch([0.0], [0.0], to_logprobs(1e-9)), AlgorithmSettings()
    )
    assert result.metric_sums.tolist() == [0.0] * len(METRIC_SUM_NAMES)
    assert result.max_ratio.item() == 0.0
    result.loss.backward()
    assert learner.grad is not None and learner.grad.item() == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_target_logprobs_equal_log_softmax_with_its_gradient(temperature: float) -> None:
    torch.manual_seed(0)
    target_ids = torch.randint(0, 50, (700,))
    weights = torch.randn(700)
    logits = torch.randn(700, 50, requires_grad=True)
    expected = (logits / temperature).log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
    expected_gradient = torch.autograd.grad((weights * expected).sum(), logits)[0]
    logprobs = compute_target_logprobs(logits, target_ids, temperature)
    assert torch.allclose(logprobs, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad((weights * logprobs).sum(), logits)[0], expected_gradient, atol=1e-6)


def test_target_logprobs_of_bfloat16_logits_are_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50).bfloat16().requires_grad_()
    logprobs = compute_target_logprobs(logits, torch.arange(5))
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, logits.float().log_softmax(-1).diagonal(), atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def own_loss(logprobs: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return -logprobs, torch.zeros_like(logprobs)


BAD_LOSSES = {
    "one tensor": lambda logprobs, *_: -logprobs,
    "mean": lambda logprobs, *_: (-logprobs.mean(), torch.zeros_like(logprobs)),
    "column": lambda logprobs, *_: (-logprobs[:, None], torch.zeros_like(logprobs)),
    "one clip": lambda logprobs, *_: (-logprobs, torch.zeros(())),
    "float": lambda logprobs, *_: (1.0, 0.0),
    "nothing": lambda logprobs, *_: None,
    "detached": lambda logprobs, *_: (-logprobs.detach(), torch.zeros_like(logprobs)),
    "three": lambda logprobs, *_: (-logprobs, torch.zeros_like(logprobs), 0),
}


def test_a_loss_can_be_a_plugin() -> None:
    logprobs = to_logprobs(0.5, 0.25).requires_grad_()
    arguments = (logprobs, logprobs.detach(), torch.ones(2), torch.zeros(2), AlgorithmSettings())
    token_loss, _ = find_policy_loss(f"{__name__}:own_loss")(*arguments)
    assert token_loss.tolist() == (-logprobs).tolist()


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_plugin_that_returns_anything_else_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "own_loss", BAD_LOSSES[kind])
    logprobs = to_logprobs(0.5, 0.25).requires_grad_()
    arguments = (logprobs, logprobs.detach(), torch.ones(2), torch.zeros(2), AlgorithmSettings())
    with pytest.raises(SettingsError, match=r"own_loss': expected two tensors of shape \[2\], the loss of each token"):
        find_policy_loss(f"{__name__}:own_loss")(*arguments)
