"""What a reaction means: its name becomes the label loved, not loved or ignored, by the user's rules and a short list.

A name is compared without case, colons, variation selectors, skin tones and separators: `:Thumbs_Up:` is thumbsup.
Numbers are ambiguous (1 is a thumb up, or the worst of five stars), so only -1, 0 and 1 have a meaning of their own,
and only where the log has no other number and a rule does not say otherwise.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from rluf.errors import DataError, SettingsError

LOVED, NOT_LOVED, IGNORED, UNKNOWN = 1, 0, -1, -2
"""Codes of labels in the index of the rows. UNKNOWN is a name without a rule; it is left out as IGNORED ones are."""

_LABEL_CODES = {"loved": LOVED, "not_loved": NOT_LOVED, "ignored": IGNORED}
LABEL_NAMES = {LOVED: "loved", NOT_LOVED: "not loved", IGNORED: "ignored", UNKNOWN: "unknown"}

UNKNOWN_SHARE_LIMIT = 0.01
"""Share of an entry's reactions above which names without a label stop the job."""

MISSING_TEXTS = frozenset(
    {"", "null", "none", "nan", "nat", "n/a", "#n/a", "<na>", "(null)", "\\n", "nil", "undefined"}
)
"""Spellings of a missing value (lower case) that exporters write as text."""

_TRUE_TEXTS = frozenset({"true", "t", "yes", "y", "1", "1.0"})
_FALSE_TEXTS = frozenset({"false", "f", "no", "n", "0", "0.0"})

BAD_NAME_PATTERN = re.compile(
    r"(?<!non)(?<!not)(?<!non[_-])(?<!not[_-])(?<!un)(?:toxic|harm(?!less)|unsafe|flagged|violat|violen|nsfw|hate(?!ver)|abus|"
    r"insult|threat|jailbreak|harass|sexual|offens|obscen|profan|danger|malicious|illegal|inappropriate|unethical|spam|"
    r"down(?!load)|dislik|negativ|bad(?!ge)|complain|unhelpful|not_?helpful|unlike|wrong|incorrect|hallucinat|reject|"
    r"block|risk|reported)",
    re.IGNORECASE,
)
"""Names of fields and scores that are 1 or true for a bad response."""

_UNRATED_NAMES = frozenset({"", "-", "na", "(none)", "unset", "unrated", "notrated", "noreaction", "norating"})
"""Normalized names that say that a user has not reacted."""

_LOVED_NAMES = (
    "love", "loved", "loves", "loved it", "love it", "heart", "hearts", "hearted", "red heart", "heart suit", "<3",
    "heart eyes", "smiling face with 3 hearts", "like", "liked", "likes", "up", "thumb up", "thumbs up", "+1", "upvote",
    "upvotes", "upvoted", "positive", "good", "great", "helpful", "favorite", "favourite", "yes", "y", "true", "t",
    "satisfied", "accepted",
    "heart eyes cat", "heartbeat", "heartpulse", "cupid", "gift heart", "heavy heart exclamation", "\U0001f63b",
    "\u2764", "\u2665", "\u2661", "\u2763", "\U0001fa77", "\U0001f9e1", "\U0001f49b", "\U0001f49a", "\U0001f499",
    "\U0001f49c", "\U0001f90e", "\U0001f90d", "\U0001f5a4", "\U0001f970", "\U0001f60d", "\U0001fa75", "\U0001fa76",
    *map(chr, range(0x1F493, 0x1F4A0)), "\U0001f44d",
)  # fmt: skip
_NOT_LOVED_NAMES = (
    "down", "thumb down", "thumbs down", "-1", "downvote", "downvotes", "downvoted", "dislike", "dislikes", "disliked",
    "negative", "bad", "unhelpful", "not helpful", "no", "n", "false", "f", "unsatisfied", "dissatisfied", "rejected",
    "broken heart", "\U0001f494", "\U0001f44e", "0",
)  # fmt: skip


def normalize_name(name: str) -> str:
    """Spelling-independent form of a reaction's name."""
    text = unicodedata.normalize("NFKC", name).strip().casefold().strip(":").replace("\u2212", "-")
    text = re.sub(r"::?\s*(?:[\w-]+ )?skin[ -]tone(?:-\d)?$", "", text)
    text = re.sub("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]", "", text)
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", text)


def _build_codes(names: Iterable[str], code: int) -> dict[str, int]:
    """Code of each normalized name, and of Unicode's name of an emoji, which many products write instead."""
    emoji_names = [unicodedata.name(name, "") for name in names if len(name) == 1 and not name.isascii()]
    return {normalize_name(name): code for name in (*names, *filter(None, emoji_names))}


_DEFAULT_CODES = _build_codes(_LOVED_NAMES, LOVED) | _build_codes(_NOT_LOVED_NAMES, NOT_LOVED)
_FAMILIES = (
    ("love", "love|heart|<3", LOVED),
    ("down", r"down|dislike|^-1$", NOT_LOVED),
    ("up", r"up|like|^\+1$", LOVED),
)


@cache
def normalize_reaction(name: str) -> str:
    """One name for all spellings of a heart, and of a thumb: one client may withdraw as heart what was love before."""
    key = normalize_name(name)
    text = unicodedata.name(key, key).lower() if len(key) == 1 else key
    families = (
        family for family, pattern, code in _FAMILIES if re.search(pattern, text) and _DEFAULT_CODES.get(key) == code
    )
    return next(families, key)


_NUMBER_PATTERN = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_BOUND_RULE = re.compile(rf"(>=|<=|>|<)\s*({_NUMBER_PATTERN})")
_RANGE_RULE = re.compile(rf"({_NUMBER_PATTERN})\s*\.\.\s*({_NUMBER_PATTERN})")
_THUMB_NUMBERS = frozenset({-1.0, 0.0, 1.0})


def parse_number(text: str) -> float | None:
    """The number that a reaction is written as; None for a name (+1 is Slack's thumb up)."""
    # Adding zero makes -0.0 zero.
    return float(text) + 0.0 if re.fullmatch(_NUMBER_PATTERN, text) and not text.startswith("+") else None


def parse_truth(value: object) -> bool | None:
    """Truth value as JSON, databases and spreadsheets write it (true, t, yes, 1, 1.0); None for anything else."""
    text = str(value).strip().lower()
    return True if text in _TRUE_TEXTS else False if text in _FALSE_TEXTS else None


@dataclass(frozen=True, slots=True)
class _NumberRange:
    low: float
    high: float
    excludes_bound: bool
    code: int

    def has_number(self, number: float) -> bool:
        if self.excludes_bound:
            return self.low < number < self.high
        return self.low <= number <= self.high


def _parse_range(rule: str, code: int, setting: str) -> _NumberRange | None:
    rule = rule.replace("\u2265", ">=").replace("\u2264", "<=")
    if match := _RANGE_RULE.fullmatch(rule.strip()):
        low, high = float(match[1]), float(match[2])
        if low > high:
            raise SettingsError(f"{setting}: {rule!r} is an empty range; write the lower number first")
        return _NumberRange(low, high, False, code)
    if match := _BOUND_RULE.fullmatch(rule.strip()):
        bound, sign = float(match[2]), match[1]
        low, high = (bound, math.inf) if sign.startswith(">") else (-math.inf, bound)
        return _NumberRange(low, high, len(sign) == 1, code)
    # Slack's +1 and 100 are names; 4+, 4-5 and 4,5 look like numbers and would never match one.
    if (rule.strip().startswith((">", "<")) and rule.strip() != "<3") or re.match(
        r"\s*\d[\d.]*\s*(?:[+,;–-]|to\b)", rule
    ):
        raise SettingsError(f'{setting}: {rule!r} is not a range of numbers; write one such as ">=4" or 1..3')
    return None


@dataclass(frozen=True)
class LabelRules:
    """The user's rules for reactions of one entry. Raises SettingsError for a rule that is none, or contradicts one."""

    labels: Mapping[str, str]
    setting: str = "prepare.labels"
    _codes: dict[str, int] = field(init=False, default_factory=dict)
    _numbers: dict[float, int] = field(init=False, default_factory=dict)
    _ranges: list[_NumberRange] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for rule, label in self.labels.items():
            code = _LABEL_CODES[label]
            number_range = _parse_range(rule, code, self.setting)
            number = parse_number(rule.strip())
            if number_range is not None:
                self._ranges.append(number_range)
            elif number is not None:
                self._add_rule(self._numbers, number, code, rule)
            else:
                self._add_rule(self._codes, normalize_name(rule), code, rule)
        self._check_ranges()

    def _add_rule(self, codes: dict[Any, int], key: str | float, code: int, rule: str) -> None:
        if codes.get(key, code) != code:
            raise SettingsError(f"{self.setting}: {rule!r} has two labels, as another spelling of the name")
        codes[key] = code

    def _check_ranges(self) -> None:
        bounds = {bound for item in self._ranges for bound in (item.low, item.high) if math.isfinite(bound)}
        for bound in bounds:
            for number in (bound - 1e-6, bound, bound + 1e-6):
                if number not in self._numbers and len({r.code for r in self._ranges if r.has_number(number)}) > 1:
                    raise SettingsError(f"{self.setting}: ranges of different labels overlap at {bound:g}")

    @property
    def has_number_rules(self) -> bool:
        """Whether a rule is about numbers; then numbers have no meaning but that of the rules."""
        return bool(self._numbers or self._ranges)

    def find_code(self, name: str) -> int:
        """Label code of a reaction, as the log writes it."""
        key = normalize_name(name)
        if key in self._codes:
            return self._codes[key]
        number = parse_number(key)
        if number is None:
            return _DEFAULT_CODES.get(key, UNKNOWN)
        if not self.has_number_rules:
            return _DEFAULT_CODES.get(f"{number:g}", LOVED if number == 1 else UNKNOWN)
        if number in self._numbers:
            return self._numbers[number]
        codes = [item.code for item in self._ranges if item.has_number(number)]
        if codes:
            return codes[0]
        # Rules that only say which numbers are loved leave the others not loved; rules for both leave no room for it.
        rule_codes = {*self._numbers.values(), *(item.code for item in self._ranges)}
        return NOT_LOVED if NOT_LOVED not in rule_codes and LOVED in rule_codes else UNKNOWN

    def is_no_reaction(self, name: str | None, *, is_event: bool = False) -> bool:
        """Whether a value says that there is no reaction: null, and 0 and false unless a rule names them.

        An event is a reaction by itself: 0 and false are a thumb down there.
        """
        if name is None:
            return True
        key = normalize_name(name)
        is_zero = (parse_number(key) == 0 or key in ("false", "f")) and not is_event
        return (is_zero or key in MISSING_TEXTS | _UNRATED_NAMES) and not self.has_rule(name)

    def has_rule(self, name: str) -> bool:
        """Whether the rules are about a reaction; the default list says what others mean."""
        key = normalize_name(name)
        return key in self._codes or (self.has_number_rules and parse_number(key) is not None)


@cache
def build_label_rules(labels: tuple[tuple[str, str], ...], setting: str) -> LabelRules:
    """Rules of (rule, label) pairs, later ones of the same rule first."""
    return LabelRules(dict(labels), setting)


def choose_reaction(names: Sequence[str], rules: LabelRules, contradictions: str) -> str:
    """The reaction that counts of several on one response, oldest first; those that are ignored count only alone."""
    counted = [name for name in names if rules.find_code(name) in (LOVED, NOT_LOVED)] or list(names)
    wanted = {"loved": LOVED, "not_loved": NOT_LOVED}.get(contradictions)
    return next((name for name in reversed(counted) if rules.find_code(name) == wanted), counted[-1])


def check_reactions(
    counts: Counter[str], rules: LabelRules, data_key: str, *, is_rating: bool, has_ratings: bool = False,
    is_event: bool = False,
) -> None:  # fmt: skip
    """Raise DataError if reactions of one entry have no label: numbers that need a rule, or too many unknown names.

    `counts` are rows by reaction, or events if `is_event`; `is_rating` says that their field is called a rating, score
    or stars, so that a log of ones alone may be one of bad ratings; `has_ratings` that they are stars for certain.
    """
    advice = f'set {rules.setting}, such as {{">=4": loved, "<4": not_loved, "<name>": ignored}}'
    numbers = {name: number for name in counts if (number := parse_number(normalize_name(name))) is not None}
    if numbers and not rules.has_number_rules:
        values = {*numbers.values()}
        is_unary_rating = is_rating and values == {1.0}
        # Of -1, 0 and 1, 0 is neutral; in a row it is no reaction, and as an event it would be a thumb down.
        is_neutral_zero = is_event and {-1.0, 0.0} <= values
        if has_ratings or is_neutral_zero or not values <= _THUMB_NUMBERS or is_unary_rating:
            raise DataError(
                f"{data_key}: the reactions are numbers ({_format_counts(counts, numbers)}), and no rule says which of "
                f"them is love; {advice}"
            )
    # Values that say "no reaction" are most of some logs, and would hide a name of love that has no label.
    reactions = {name: rows for name, rows in counts.items() if not rules.is_no_reaction(name, is_event=is_event)}
    unknown = [name for name in reactions if rules.find_code(name) == UNKNOWN]
    unknown_rows, reaction_rows = sum(counts[name] for name in unknown), sum(reactions.values())
    if unknown_rows > UNKNOWN_SHARE_LIMIT * reaction_rows or any(name in numbers for name in unknown):
        raise DataError(
            f"{data_key}: {unknown_rows} of {reaction_rows} reactions have a name without a label "
            f"({_format_counts(counts, unknown)}); {advice}"
        )


def _format_counts(counts: Counter[str], names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names, key=lambda name: (-counts[name], name))
    text = ", ".join(f"{name!r} {counts[name]}" for name in ordered[:limit])
    return text + (f" and {len(ordered) - limit} others" if len(ordered) > limit else "")
