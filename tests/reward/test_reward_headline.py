"""The summary line that python -m rluf.reward prints for each model."""

from rluf.reward.__main__ import card_summary_line

CARD = {
    "objective": "love",
    "auroc": {"mean": 0.71234, "low": 0.65, "high": 0.77},
    "length_only_auroc": 0.568,
    "n": 124,
    "log_loss": 0.51,
    "ece": 0.02,
    "score_length_r": -0.1,
    "training": {"tokens_per_second": 812.4},
    "seconds": 63.2,
}


def test_the_line_reports_ranking_with_interval_length_baseline_and_calibration() -> None:
    summary = card_summary_line(CARD)
    assert summary.startswith("love: AUROC 0.712 (0.650 to 0.770) on 124 test rows, by length alone 0.568; ")
    assert summary.endswith("ECE 0.0200, length r -0.10; 812 tokens/s, 63 s")


def test_metrics_that_a_test_split_of_one_label_does_not_define_are_unknown() -> None:
    undefined = {"mean": None, "low": None, "high": None}
    summary = card_summary_line({**CARD, "auroc": undefined, "length_only_auroc": None, "score_length_r": None})
    assert "AUROC unknown (unknown to unknown) on 124 test rows, by length alone unknown;" in summary
