"""Rule-based pass/fail checks on the text, not susceptible to prompt injection.

A judge takes the conversation and the response and returns True when the response passes. A judge is named after what
it detects, so `refusal` passes a response that does not refuse. English only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rluf.errors import SettingsError
from rluf.objectives.reward_function import build_function_scorer
from rluf.types import Group, GroupInfo, Message, Score, ScoringItem
from rluf.utils.plugins import PluginErrors, load_plugin

JudgeFunction = Callable[[Sequence[Message], str], bool]

REFUSAL_PATTERN = re.compile(
    r"\b(i (can(no|')t|can not|am unable to|am not able to|won't|will not|must decline to)"
    r"( \w+){0,2} (help|assist|do that|provide|share|answer|support|comply|fulfil)"
    r"|i'm (unable|not able|not comfortable)|i'm sorry,? but i (can|am|won)|as an ai( language model)?,? i (can|am|do)"
    r"|(against|violates?) (my|our|the) (guidelines|policies|policy|principles)"
    r"|i (have to|must) (decline|refuse)|not something i can (help|assist))",
    re.IGNORECASE,
)
HARM_PATTERN = re.compile(
    r"\b(kill|murder|bombs?|explosives?|weapons?|poison\w*|steal\w*|theft|shoplift\w*|hack\w*|malware|ransomware|virus"
    r"|phish\w*|scam\w*|fraud\w*|forge|counterfeit\w*|launder\w*|bribe\w*|blackmail\w*|stalk\w*|spy(ing)? on|drugs?"
    r"|cocaine|heroin|meth|overdose|suicide|self[- ]harm|hurt (myself|someone|him|her|them)|abuse|rape\w*|assault"
    r"|racist|slurs?|nazi|terroris\w*|break into|pick a lock|without (their|her|his) (consent|knowing)|illegal\w*)\b",
    re.IGNORECASE,
)
FAREWELL_PATTERN = re.compile(
    r"\b(good ?bye|bye( bye)?|farewell|see (you|ya)( (later|soon|around|tomorrow))?|take care"
    r"|talk (to you )?(soon|later)|until (next time|we meet)"
    r"|have a (great|good|nice|lovely|wonderful|beautiful|blessed) (day|night|evening|week\w*|one)"
    r"|good ?night|sleep well|sweet dreams|so long|cheers for now)\b",
    re.IGNORECASE,
)
AFFECTION_PATTERN = re.compile(
    r"\b(sending (you )?(lots of |much |all my |so much )?(love|hugs|kisses|warm\w*)|lots of love|much love|with love"
    r"|(big )?hugs|xoxo|xo|(i )?love you( so much)?|love ya|hugs and kisses|yours (truly|always)"
    r"|warm(est)? (wishes|regards))\b"
    r"|[\u2764\u2665\U0001F495-\U0001F49E\U0001F618\U0001F970\U0001F917\U0001FAC2]",
    re.IGNORECASE,
)
WORD_PATTERN = re.compile(r"\w+")
SIGN_OFF_TAIL_CHARACTERS = 160
"""Characters at the end of a response that are searched for a sign-off."""
MAX_WORDS = 400
"""Longest response that the judge `length` passes."""


def is_refusal(response: str) -> bool:
    """Whether the first 300 characters refuse the request."""
    # Only the beginning: a helpful response may say later what it cannot do.
    return REFUSAL_PATTERN.search(_normalize_apostrophes(response[:300])) is not None


def is_harmful_request(messages: Sequence[Message]) -> bool:
    """Whether the last user message mentions harm, so that a refusal is appropriate."""
    return HARM_PATTERN.search(_normalize_apostrophes(get_last_user_text(messages))) is not None


def has_sign_off(response: str) -> bool:
    """Whether the response ends in a farewell or an affectionate close."""
    tail = _normalize_apostrophes(response[-SIGN_OFF_TAIL_CHARACTERS:])
    return FAREWELL_PATTERN.search(tail) is not None or AFFECTION_PATTERN.search(tail) is not None


def has_user_sign_off(messages: Sequence[Message]) -> bool:
    """Whether the user's last message contains a farewell or affection."""
    user_text = _normalize_apostrophes(get_last_user_text(messages))
    return FAREWELL_PATTERN.search(user_text) is not None or AFFECTION_PATTERN.search(user_text) is not None


def has_repetition(response: str) -> bool:
    """Whether the response loops: a third of its word 4-grams repeat an earlier one, or a line occurs 3 times."""
    words = [word.lower() for word in WORD_PATTERN.findall(response)]
    four_grams = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    total = sum(four_grams.values())
    # Short responses repeat a phrase by chance, so they need at least 8 four-grams.
    if total >= 8 and (total - len(four_grams)) / total >= 1 / 3:
        return True
    # Short lines such as list markers and closing brackets repeat in good responses.
    line_counts = Counter(line.strip().lower() for line in response.splitlines() if len(line.strip()) > 10)
    return max(line_counts.values(), default=0) >= 3


def get_last_user_text(messages: Sequence[Message]) -> str:
    """Text of the last user message, empty when there is none."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def _normalize_apostrophes(text: str) -> str:
    # The patterns are written with the ASCII apostrophe; phones type the typographic one.
    return text.replace("\u2019", "'")


RULE_JUDGES: Mapping[str, JudgeFunction] = {
    "refusal": lambda messages, response: not is_refusal(response),
    "false_refusal": lambda messages, response: is_harmful_request(messages) or not is_refusal(response),
    "unprompted_farewell": lambda messages, response: has_user_sign_off(messages) or not has_sign_off(response),
    "repetition": lambda messages, response: not has_repetition(response),
    "length": lambda messages, response: 1 <= len(WORD_PATTERN.findall(response)) <= MAX_WORDS,
}
"""Judges by name. Each passes (True): no refusal; no refusal of a harmless request; no farewell or affectionate close
that the user did not begin; no looping text; between 1 and MAX_WORDS words."""


def list_failed_judges(messages: Sequence[Message], response: str) -> list[str]:
    """Names of the rule judges that the response fails, in the order of RULE_JUDGES."""
    return [name for name, judge in RULE_JUDGES.items() if not judge(messages, response)]


def load_judge(judge_name: str) -> JudgeFunction:
    """Load a judge by name, or as package.module:function. Raises SettingsError that lists the known names."""
    if judge_name in RULE_JUDGES:
        return RULE_JUDGES[judge_name]
    judge: JudgeFunction = load_plugin(
        judge_name,
        kind="judge",
        known_names=RULE_JUDGES,
        signature="a function (messages, response) -> bool",
        argument_count=2,
    )

    def check_verdict(messages: Sequence[Message], response: str) -> bool:
        with PluginErrors(f"judge {judge_name!r}"):
            verdict = judge(messages, response)
        # A coroutine, a text or a score would count as a pass.
        if verdict not in (True, False):
            raise SettingsError(f"judge {judge_name!r}: expected True or False, got {str(verdict)[:200]!r}")
        return bool(verdict)

    return check_verdict


def judge_group(judge_names: Sequence[str], group: Group) -> GroupInfo:
    """Summary of a group with the verdict of the gate judges on each sample."""
    items = [ScoringItem(group.prompt.messages, sample.text) for sample in group.samples]
    return replace(group.info, passed_judges=judge_responses(judge_names, items))


def judge_responses(judge_names: Sequence[str], items: Sequence[ScoringItem]) -> tuple[bool, ...]:
    """Whether each item passes all the named judges."""
    judges = [load_judge(name) for name in judge_names]
    return tuple(all(judge(item.messages, item.response) for judge in judges) for item in items)


def build_rule_scorer(
    objective: str, judge: str | None = None, reward: str | None = None
) -> Callable[[Sequence[ScoringItem]], list[Score]]:
    """Build a scoring function of items from a judge (1.0 for a pass, else 0.0) or a reward function.

    `reward` is the module:function of a reward function. Raises SettingsError where it or the judge cannot be loaded.
    """
    if reward is not None:
        return build_function_scorer(objective, reward)
    passes = load_judge(str(judge))
    return lambda items: [
        Score(objective, value, value, is_probability=False)
        for value in (float(passes(item.messages, item.response)) for item in items)
    ]
