"""Off-policy evaluation: the love rate that a new policy would have had, from the log of the policy that served.

The log has the log-probability of each response under the policy that served it (`response_logprob`). With --policy
the same tokens are read by the new policy, at the same temperature, on the CPU. A file of scores has, by response id,
`target_logprob` from elsewhere, or for the doubly robust estimate `value` (a reward model's probability of love for the
logged response) and `target_value` (its mean over responses of the new policy to the same conversation), or both.

    python -m rluf.evaluate offpolicy --data runs/served/feedback --policy runs/train/latest/policy
    python -m rluf.evaluate offpolicy --data runs/served/feedback --scores scores.jsonl

Rows are weighted by exp(target_logprob - response_logprob). Estimators: self-normalized importance sampling (SNIPS;
Swaminathan and Joachims 2015) and its doubly robust form (Dudik et al. 2011). Intervals are clustered by user. When the
effective sample size is below 5% of the rows, a few rows decide the result, and the report says so.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import CommandParser, run_command

if TYPE_CHECKING:
    from rluf.evaluate.event_columns import ColumnSource
    from rluf.utils.stats import Floats

MIN_ESS_SHARE = 0.05
"""Minimum effective sample size as a share of the rows."""
MIN_EFFECTIVE_ROWS = 30.0
"""Minimum effective sample size in rows: fewer give no interval to rely on."""
MAX_LOGPROB = 1e-3
"""Largest log-probability that rounding explains."""
MAX_MEAN_WEIGHT_ERRORS = 4.0
"""Standard errors by which the mean weight may differ from its expectation, 1."""


@dataclass(frozen=True, slots=True)
class OffPolicyEstimate:
    """An estimated love rate with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class OffPolicyReport:
    """Estimates for the new policy next to the log's own love rate; `warnings` say when they mean nothing."""

    row_count: int
    user_count: int
    dropped_rows: int
    rows_without_values: int
    logged_rate: float
    effective_rows: float
    mean_weight: float
    snips: OffPolicyEstimate
    doubly_robust: OffPolicyEstimate | None
    warnings: tuple[str, ...]


def estimate_off_policy(
    log_ratios: Floats,
    rewards: Floats,
    users: Sequence[str],
    values: Floats | None = None,
    target_values: Floats | None = None,
    *,
    confidence: float = 0.95,
    dropped_rows: int = 0,
    rows_without_values: int = 0,
) -> OffPolicyReport:
    """Estimate the mean reward under the new policy from N rows of `users`; arrays are [N].

    `log_ratios` are target minus logged log-probabilities (nats), `values` and `target_values` a reward model's
    predictions for the logged response and for the new policy; `rows_without_values` (without them) lack one of the
    two. Raises DataError for fewer than two users.
    """
    import numpy as np

    from rluf.errors import DataError

    user_index = np.unique(np.asarray(users), return_inverse=True)[1]
    row_count, user_count = len(rewards), int(user_index.max(initial=-1)) + 1
    if user_count < 2:
        raise DataError(f"off-policy evaluation needs rows of at least 2 users, got {user_count}")
    # The largest ratio is subtracted, since a sum over hundreds of tokens may overflow; all but the mean weight are
    # ratios of weights.
    scale = float(np.max(log_ratios))
    weights = np.exp(log_ratios - scale)
    effective_rows = float(weights.sum() ** 2 / (weights**2).sum())
    # One user counts once, however many rows: the degrees of freedom are those of users.
    user_weights = np.bincount(user_index, weights)
    effective_users = float(user_weights.sum() ** 2 / (user_weights**2).sum())

    def estimate(offsets: Floats, residuals: Floats) -> OffPolicyEstimate:
        """Estimate mean(offsets) + weighted mean(residuals)."""
        from scipy import stats

        correction = float(weights @ residuals / weights.sum())
        offset = float(offsets.mean())
        influence = (offsets - offset) / row_count + weights * (residuals - correction) / weights.sum()
        clusters = np.bincount(user_index, influence)
        standard_error = float(np.sqrt((clusters**2).sum() * user_count / (user_count - 1)))
        # The smallest of the counts of observations that carry the estimate.
        quantile = stats.t.ppf(0.5 + confidence / 2, max(1.0, min(effective_users, user_count) - 1))
        value = offset + correction
        return OffPolicyEstimate(value, value - quantile * standard_error, value + quantile * standard_error)

    zeros = np.zeros(row_count)
    doubly_robust = None
    if values is not None and target_values is not None:
        doubly_robust = estimate(np.asarray(target_values), np.asarray(rewards - values))
    plain_weights = np.exp(np.minimum(log_ratios, 100.0))  # squares of larger ones overflow
    mean_weight = float(plain_weights.mean())
    user_sums = np.bincount(user_index, plain_weights - mean_weight)
    mean_weight_error = float(np.sqrt((user_sums**2).sum())) / row_count
    return OffPolicyReport(
        row_count, user_count, dropped_rows, rows_without_values, float(np.mean(rewards)), effective_rows, mean_weight,
        estimate(zeros, np.asarray(rewards, dtype=float)), doubly_robust,
        (
            *_list_warnings(row_count, effective_rows, mean_weight, mean_weight_error),
            *_warn_missing_values(row_count, rows_without_values),
        ),
    )  # fmt: skip


def _list_warnings(row_count: int, effective_rows: float, mean_weight: float, mean_weight_error: float) -> list[str]:
    warnings = []
    if effective_rows < MIN_ESS_SHARE * row_count:
        warnings.append(
            f"the effective sample size is {effective_rows:.1f} of {row_count} rows "
            f"({effective_rows / row_count:.1%}, below {MIN_ESS_SHARE:.0%}): the estimates mean nothing; the policies "
            "are too different for this log, run an A/B test"
        )
    elif effective_rows < MIN_EFFECTIVE_ROWS:
        warnings.append(
            f"the effective sample size is {effective_rows:.1f} rows, below {MIN_EFFECTIVE_ROWS:g}: log more"
        )
    if abs(mean_weight - 1) > MAX_MEAN_WEIGHT_ERRORS * mean_weight_error + 1e-9:
        warnings.append(
            f"the mean weight is {mean_weight:.3g} (expected 1): check that both log-probabilities are of the same "
            "tokens at the same temperature; or the new policy gives responses that the logged one never gives"
        )
    return warnings


def _warn_missing_values(row_count: int, rows_without_values: int) -> list[str]:
    if not rows_without_values:
        return []
    return [
        f"no doubly robust estimate: {rows_without_values} of {row_count} rows have no value or no target_value; rows "
        "left out would bias it, so score them too"
    ]


def read_off_policy_log(
    data: Path, scores: Path | None, policy: Path | None = None, love_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a feedback log (a folder or one file) and the scores of its rows by response id, or score them by `policy`.

    Returns the arguments of estimate_off_policy. Ids and reactions are read as by the A/B test (`love_names` are the
    reactions that mean love). Rows that repeat an id, or lack a user or one of the log-probabilities, are dropped and
    counted; so are rows without values, if the scores have values at all. Raises DataError when no row is left, when
    the log has reactions but no love, or when an id has several scores.
    """
    import numpy as np

    from rluf.errors import DataError
    from rluf.evaluate.event_columns import ColumnSource, parse_numbers, parse_texts, read_columns
    from rluf.evaluate.events import is_user_id

    names = ["id", "user_id", "reaction", "response_logprob"]
    if policy is not None:
        names += ["messages", "response", "finish_reason", "temperature", "response_tokens"]
    rows, repeated_count = _read_rows(data, names)
    users = parse_texts(rows["user_id"], ColumnSource(data, "user_id"))
    score_columns: dict[str, list[Any]] = {}
    positions: dict[str | None, int] = {}
    if scores is not None:
        score_columns, _ = read_columns(scores, ("id", "target_logprob", "value", "target_value"))
        if "id" not in score_columns or (policy is None and "target_logprob" not in score_columns):
            raise DataError(f"{scores}: expected the columns id and target_logprob")
        score_ids = parse_texts(score_columns["id"], ColumnSource(scores, "id"))
        positions = {row_id: i for i, row_id in enumerate(score_ids)}
        if len(positions) < len(score_ids):
            repeated = Counter(score_ids).most_common(1)[0]
            raise DataError(f"{scores}: the id {repeated[0]!r} has {repeated[1]} rows; give each response one score")

    def get_score(name: str) -> Floats:
        """Column of the scores in the log's order; NaN where there is none."""
        column = score_columns.get(name)
        if column is None or scores is None:
            return np.full(len(rows["id"]), np.nan)
        numbers = parse_numbers(column, ColumnSource(scores, name))
        return np.array([numbers[positions[key]] if key in positions else np.nan for key in rows["id"]])

    target_logprobs = get_score("target_logprob")
    if policy is not None:
        from rluf.evaluate.policy_scores import compute_target_scores

        score_by_id = compute_target_scores(
            policy, [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        )
        target_logprobs = np.array([score_by_id.get(row_id, np.nan) for row_id in rows["id"]])
    logged_logprobs = parse_numbers(rows["response_logprob"], ColumnSource(data, "response_logprob"))
    _check_logprobs(data, "response_logprob", logged_logprobs)
    _check_logprobs(scores, "target_logprob", target_logprobs)
    log_ratios = target_logprobs - logged_logprobs
    # Rows without a user cannot be clustered, and impressions of one user are not independent.
    is_used = np.isfinite(log_ratios) & np.array(list(map(is_user_id, users)), dtype=bool)
    if not is_used.any():
        raise DataError(
            f"no row of {data} has response_logprob, a user and a target_logprob ({policy or scores}); rows of "
            "services before record version 3 have no response_logprob"
        )
    rewards = _read_rewards(rows["reaction"], ColumnSource(data, "reaction"), love_names)
    values, target_values = get_score("value")[is_used], get_score("target_value")[is_used]
    has_value = np.isfinite(values) & np.isfinite(target_values)
    has_any_value = bool((np.isfinite(values) | np.isfinite(target_values)).any())
    return {
        "log_ratios": log_ratios[is_used],
        "rewards": rewards[is_used],
        "users": [user for user, used in zip(users, is_used, strict=True) if used],
        "values": values if has_value.all() else None,
        "target_values": target_values if has_value.all() else None,
        "dropped_rows": repeated_count + int((~is_used).sum()),
        "rows_without_values": int((~has_value).sum()) if has_any_value else 0,
    }


def _read_rows(data: Path, names: Sequence[str]) -> tuple[dict[str, list[Any]], int]:
    """Columns of a log with the present reactions, each row once, ids as texts; and the number of repeated rows."""
    from rluf.evaluate.event_columns import ColumnSource, parse_texts, read_columns
    from rluf.evaluate.events import apply_late_reactions
    from rluf.prepare.readers.feedback_folder import list_row_files

    rows: dict[str, list[Any]] = {name: [] for name in names}
    for file in list_row_files(data):
        columns, _ = read_columns(file, names)
        count = len(columns.get("id", []))
        for name in names:
            rows[name] += columns.get(name, [None] * count)
    # A merged file of a store may be next to the files that it is about to replace.
    rows["id"] = parse_texts(rows["id"], ColumnSource(data, "id"))
    first_rows: dict[Any, int] = {}
    for i, row_id in enumerate(rows["id"]):
        first_rows.setdefault((i,) if row_id is None else row_id, i)
    repeated_count = len(rows["id"]) - len(first_rows)
    rows = {name: [values[i] for i in first_rows.values()] for name, values in rows.items()}
    apply_late_reactions(rows, [data])
    return rows, repeated_count


def _check_logprobs(path: Path | None, name: str, logprobs: Floats) -> None:
    """Raise DataError for a column with probabilities or losses in place of log-probabilities."""
    import numpy as np

    from rluf.errors import DataError

    if (logprobs > MAX_LOGPROB).any():
        raise DataError(
            f"{path}: column {name!r}: expected log-probabilities, which are at most 0, got {np.nanmax(logprobs):g}; "
            "take the logarithm of a probability, or the negative of a loss"
        )


def _read_rewards(values: Sequence[Any], source: ColumnSource, love_names: Sequence[str]) -> Floats:
    """1 for the rows [N] with love, else 0. DataError for other reactions only: a rate of 0 would look measured."""
    import numpy as np

    from rluf.errors import DataError
    from rluf.evaluate.event_columns import parse_reactions
    from rluf.prepare.schema import LOVE_REACTION

    rows_by_name = parse_reactions(values, source, love_names).rows_by_name
    rewards = np.zeros(len(values))
    rewards[rows_by_name.get(LOVE_REACTION, [])] = 1.0
    if rows_by_name and not rewards.any():
        raise DataError(
            f"{source.path}: no response has the reaction love, but the log has {', '.join(map(repr, rows_by_name))}; "
            "say which one means love with --love NAME"
        )
    return rewards


def format_off_policy_report(report: OffPolicyReport) -> str:
    """Readable text of a report."""
    lines = [
        f"rows {report.row_count}, users {report.user_count}, dropped {report.dropped_rows} (repeated, without user or "
        "log-probability)",
        f"effective rows {report.effective_rows:.1f} ({report.effective_rows / report.row_count:.1%}), "
        f"mean weight {report.mean_weight:.3g}",
        f"love rate of the log      {report.logged_rate:.4f}",
    ]
    for name, estimate in (("SNIPS", report.snips), ("doubly robust", report.doubly_robust)):
        if estimate is not None:
            lines.append(f"{name:<25} {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report.warnings)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; the last line of stdout is JSON, and an error is one message on stderr."""
    parser = CommandParser("rluf.evaluate offpolicy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="feedback log: folder or file")
    parser.add_argument("--policy", metavar="PATH", help="new policy: Hugging Face folder or hub id")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="id, target_logprob, value, ... by response")
    parser.add_argument("--love", action="append", default=[], metavar="NAME", help="reaction that means love")
    args = parser.parse_args(arguments)

    def run_and_print() -> None:
        from rluf.config.settings import Settings
        from rluf.errors import SettingsError
        from rluf.models.hub import resolve_model
        from rluf.utils.files import to_jsonable
        from rluf.utils.paths import resolve_cache_folder

        if args.policy is None and args.scores is None:
            raise SettingsError("name the new policy with --policy, or a file of its log-probabilities with --scores")
        policy = None if args.policy is None else resolve_model(args.policy, resolve_cache_folder(Settings()))
        report = estimate_off_policy(**read_off_policy_log(args.data, args.scores, policy, args.love))
        sys.stdout.write(format_off_policy_report(report))
        sys.stdout.write(json.dumps(to_jsonable(asdict(report)), allow_nan=False) + "\n")

    return run_command(run_and_print)
