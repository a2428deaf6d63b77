"""Counterfactual training rows and the measurement of whether a model reads the prompt."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rluf.reward import counterfactuals
from rluf.reward.calibration import Calibration, compute_prior_shift
from rluf.reward.counterfactuals import (
    MAX_LOOP_WORDS,
    MAX_TRIGRAM_OVERLAP,
    compute_trigram_overlap,
    find_generic_rows,
    make_training_copies,
    measure_prompt_fit,
    should_measure_prompt_fit,
)
from rluf.reward.debias import fit_nuisance_offsets
from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.losses import compute_step_loss, weighted_bce_loss
from rluf.reward.model import RewardModel
from rluf.reward.text import EncodedItem
from tests.reward.test_model import write_checkpoint

SUBJECTS = ("used cars", "lentil soup", "quantum theory", "guitar strings", "winter boots", "tax returns")


def build_rows(count: int, *, loved_share: float = 0.5) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for index in range(count):
        subject = SUBJECTS[index % len(SUBJECTS)]
        rows.append({
            "id": str(index), "user_id": f"u{index % 17}", "weight": 3.0,
            "messages": [{"role": "user", "content": f"{index // len(SUBJECTS)}: {subject}?"}],
            "response": f"Here is what I know about {subject}, part {index} of a longer story.",
            "label": int(rng.random() < loved_share), "finish_reason": None if index % 5 else "length",
        })  # fmt: skip
    return rows


def test_copies_are_labeled_worse_and_keep_user_and_weight_of_their_source() -> None:
    rows = build_rows(120)
    copies, counterfactuals = make_training_copies(rows, is_pairwise=False, seed=1)
    assert len(copies) == len(counterfactuals) > 50
    for copy, made in zip(copies, counterfactuals, strict=True):
        source = rows[made.source_index]
        assert source["label"] == 1
        assert copy["label"] == 0
        assert [copy[key] for key in ("id", "user_id", "weight", "messages")] == [
            source[key] for key in ("id", "user_id", "weight", "messages")
        ]
        assert copy["response"] == made.response != source["response"]
    assert copies == make_training_copies(rows, is_pairwise=False, seed=1)[0]
    kinds = {made.kind for made in counterfactuals}
    assert kinds == {"mismatched", "generic", "echo", "cut", "loop"}


def test_mismatched_responses_answer_another_prompt() -> None:
    rows = build_rows(120)
    _, counterfactuals = make_training_copies(rows, is_pairwise=False, seed=1, rates={"mismatched": 2.0})
    for made in counterfactuals:
        prompt, other_prompt = (rows[i]["messages"][-1]["content"] for i in (made.source_index, made.partner_index))
        assert compute_trigram_overlap(prompt, other_prompt) < MAX_TRIGRAM_OVERLAP
        assert made.response == rows[made.partner_index]["response"]
        assert rows[made.partner_index]["label"] == 1
        assert made.is_truncated == (made.partner_index % 5 == 0)


def test_prompts_that_ask_for_the_same_lend_each_other_no_response() -> None:
    rows = build_rows(40)
    for index, row in enumerate(rows):
        row["messages"] = [{"role": "user", "content": f"What is the weather like today?{'!' * (index % 3)}"}]
    assert make_training_copies(rows, is_pairwise=False, seed=1, rates={"mismatched": 2.0}) == ([], [])


def test_a_cut_copy_is_the_start_of_a_finished_response_and_marked() -> None:
    rows = build_rows(60)
    copies, counterfactuals = make_training_copies(rows, is_pairwise=False, seed=1, rates={"cut": 1.0})
    assert copies
    for copy, made in zip(copies, counterfactuals, strict=True):
        source = rows[made.source_index]
        assert source["finish_reason"] is None  # responses that the log says were cut are not cut again
        assert source["response"].startswith(copy["response"])
        assert len(copy["response"]) < len(source["response"])
        assert copy["finish_reason"] == "length"


def test_a_loop_repeats_the_last_words_and_lengths_of_cuts_and_loops_balance() -> None:
    rows = build_rows(240, loved_share=1.0)
    copies, counterfactuals = make_training_copies(rows, is_pairwise=False, seed=1, rates={"cut": 1.0, "loop": 1.0})
    word_ratios: dict[str, list[float]] = {"cut": [], "loop": []}
    for copy, made in zip(copies, counterfactuals, strict=True):
        words, source_words = copy["response"].split(), rows[made.source_index]["response"].split()
        word_ratios[made.kind].append(len(words) / len(source_words))
        if made.kind == "loop":
            assert copy["finish_reason"] == "stop" and words[0] == source_words[0]
            period = next(n for n in range(1, len(words)) if words[-n:] == words[-2 * n : -n])
            assert period <= MAX_LOOP_WORDS
    assert np.mean(word_ratios["cut"]) < 0.7
    assert np.mean(word_ratios["cut"]) + np.mean(word_ratios["loop"]) == pytest.approx(2.0, abs=0.5)


def test_in_pairs_the_chosen_response_wins_against_the_counterfactual() -> None:
    rows = [{**row, "group": row["id"], "chosen": row["response"], "rejected": "No."} for row in build_rows(60)]
    copies, counterfactuals = make_training_copies(rows, is_pairwise=True, seed=1)
    assert 20 < len(copies) < 100
    for copy, made in zip(copies, counterfactuals, strict=True):
        assert copy["chosen"] == rows[made.source_index]["chosen"]
        assert copy["rejected"] == made.response
        assert copy["rejected_finish_reason"] == ("length" if made.is_truncated else "stop")


def test_the_generic_response_is_the_one_that_resembles_those_to_other_prompts() -> None:
    specific = [
        f"{subject} are about {subject} and {word}." for subject in SUBJECTS for word in ("one", "two", "three")
    ]
    prompts = [subject for subject in SUBJECTS for _ in range(3)]
    generic = "That is so kind of you to say, thank you."
    for index in (0, 4, 8, 12):
        specific[index] = f"That is so kind of you to say about {prompts[index]}, thank you."
    responses, prompts = [*specific, generic], [*prompts, "hello"]
    (found_row,) = find_generic_rows(prompts, responses)
    assert found_row in (0, 4, 8, 12, len(responses) - 1)
    assert find_generic_rows(["a", "b"], ["?", "!"]) == []


def build_split_with_copies() -> EncodedSplit:
    """Four rows of the log, a sign-off copy of row 1 and counterfactual copies of rows 1 and 3."""
    labels = np.asarray([0.0, 1, 0, 1, 1, 0, 0])
    return EncodedSplit(
        is_pairwise=False,
        sequences=[EncodedItem((index,), 0) for index in range(7)],
        labels=labels,
        weights=np.asarray([4.0, 1, 4, 3, 1, 1, 3]),
        clusters=["a", "b", "a", "b", "b", "b", "b"],
        response_lengths=np.asarray([10.0, 20, 30, 40, 35, 5, 80]),
        copy_sources=np.asarray([1, 1, 3]),
        counterfactual_count=2,
    )


def test_copies_change_neither_class_weights_nor_base_rate() -> None:
    split = build_split_with_copies()
    log_rows = split.select_originals()
    assert (len(log_rows), log_rows.labels.tolist(), log_rows.clusters) == (4, [0, 1, 0, 1], ["a", "b", "a", "b"])
    assert split.loss_weights.tolist() == [1.0, 0.5, 1.0, 1.5, 0.5, 0.5, 1.5]
    assert split.loss_weights[:4].tolist() == log_rows.loss_weights.tolist()
    assert compute_prior_shift(log_rows.labels, log_rows.weights) == pytest.approx(math.log(4 / 8))


def test_a_copy_has_the_offset_of_its_source_at_its_own_length() -> None:
    rng = np.random.default_rng(0)
    count = 400
    lengths, user_ids = rng.integers(5, 400, count).astype(float), [f"u{i % 40}" for i in range(count)]
    labels = (rng.random(count) < 1 / (1 + np.exp(4 - np.log1p(lengths)))).astype(float)
    rows = [EncodedItem((index,), 0) for index in range(count)]
    log_rows = EncodedSplit(False, rows, labels, np.ones(count), user_ids, lengths)
    sources = np.asarray([3, 3, 7])
    split = EncodedSplit(
        False, [*rows, *rows[:3]], np.append(labels, [0, 0, 0]), np.ones(count + 3), [*user_ids, *user_ids[:3]],
        np.append(lengths, [lengths[3], 10.0, lengths[7]]), copy_sources=sources, counterfactual_count=3,
    )  # fmt: skip
    offsets = fit_nuisance_offsets(split, ["length", "users"])
    log_offsets = fit_nuisance_offsets(log_rows, ["length", "users"])
    assert offsets[:count] == pytest.approx(log_offsets)
    assert offsets[[count, count + 2]] == pytest.approx(log_offsets[[3, 7]])
    assert offsets[count + 1] != pytest.approx(log_offsets[3], abs=1e-3)


@pytest.mark.parametrize(
    ("head", "is_pairwise", "debias", "expected"),
    [
        ("love", False, (), True), ("thumbs", False, (), True), ("helpfulness", True, (), True),
        ("safety", False, (), False), ("continued", False, (), False), ("warmth", False, ("counterfactuals",), True),
    ],
)  # fmt: skip
def test_safety_need_not_fit_the_prompt(head: str, is_pairwise: bool, debias: tuple[str, ...], expected: bool) -> None:
    assert should_measure_prompt_fit(head, is_pairwise=is_pairwise, debias=debias) is expected


class PromptReader:
    """Stands for a model that scores by the words that response and prompt share, or by the response's length."""

    def __init__(self, *, reads_prompt: bool) -> None:
        self.reads_prompt, self.calibration, self.encoder = reads_prompt, Calibration("love"), self

    def encode(self, items: list[Any]) -> list[Any]:
        return items

    def compute_raw_logits(self, items: list[Any]) -> list[float]:
        return [
            len(set(item.messages[-1]["content"].rstrip("?").split()) & set(item.response.replace(",", "").split()))
            - (5.0 if item.is_truncated else 0.0)
            if self.reads_prompt
            else float(len(item.response))
            for item in items
        ]


def test_a_model_that_reads_the_prompt_prefers_the_response_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    rows = build_rows(240)
    with caplog.at_level(logging.WARNING):
        readers: dict[bool, Any] = {flag: PromptReader(reads_prompt=flag) for flag in (True, False)}
        reports = {
            flag: measure_prompt_fit(reader, rows, is_pairwise=False, seed=0) for flag, reader in readers.items()
        }
    shares, blind_shares = reports[True]["shares"], reports[False]["shares"]
    assert set(shares) == {"mismatched", "generic", "echo", "cut", "loop", "flattery"}
    assert shares["mismatched"]["mean"] > 0.8
    assert abs(blind_shares["mismatched"]["mean"] - 0.5) < 0.15
    assert shares["mismatched"]["low"] < shares["mismatched"]["mean"] <= shares["mismatched"]["high"] <= 1
    assert blind_shares["mismatched"]["n"] > 90
    assert "mismatched" in reports[False]["below_minimum"]
    assert "mismatched" not in reports[True]["below_minimum"]
    assert "mismatched 0." in caplog.text


def test_a_long_comparison_shows_its_progress(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counterfactuals, "LOG_INTERVAL_S", -1.0)
    reader: Any = PromptReader(reads_prompt=True)
    with caplog.at_level(logging.INFO):
        measure_prompt_fit(reader, build_rows(240), is_pairwise=False, seed=0)
    assert "prompt fit, kind=mismatched (1 of 6) responses=" in caplog.text
    assert "kind=flattery (6 of 6)" in caplog.text


def test_prompt_fit_is_measured_with_a_real_model(tmp_path: Path) -> None:
    path = write_checkpoint("tiny-encoder", tmp_path / "cache", tmp_path / "m", Calibration("love", max_tokens=64))
    model = RewardModel.load(path, batch_tokens=2048)
    report = measure_prompt_fit(model, build_rows(40), is_pairwise=False, seed=0)
    assert all(0 <= share["low"] <= share["mean"] <= share["high"] <= 1 for share in report["shares"].values())


def test_a_comparison_of_copies_cancels_out_for_a_model_that_ignores_the_prompt() -> None:
    # Two good rows with logits that depend on the text only, and each one's text under the other's prompt.
    text_logits = torch.tensor([0.3, -0.2], requires_grad=True)
    rows, copies, sources = text_logits, text_logits.flip(0), text_logits
    logits = torch.cat([rows, copies, sources])
    labels, weights = torch.tensor([1.0, 1, 0, 0]), torch.ones(4)
    loss = compute_step_loss(weighted_bce_loss, logits, labels, weights, [2, 3])
    comparison = np.log1p(np.exp(-0.5)) + np.log1p(np.exp(0.5))
    label_loss = np.log1p(np.exp(-0.3)) + np.log1p(np.exp(0.2))
    assert float(loss.detach()) == pytest.approx((comparison + label_loss) / 4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss - weighted_bce_loss(rows, labels[:2], weights[:2]) / 2, text_logits)
    # Equal texts get opposite gradients from the two prompts: the mean logit does not move.
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)
    only_copies = compute_step_loss(weighted_bce_loss, logits[2:], labels[2:], weights[2:], [0, 1])
    assert float(only_copies.detach()) == pytest.approx(comparison / 2, abs=1e-6)


def test_only_copies_of_a_labeled_split_are_compared_with_their_sources() -> None:
    split = build_split_with_copies()
    assert split.find_contrasts([0, 4, 6, 5]) == [(2, 3), (3, 1)]
