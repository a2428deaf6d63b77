"""Redaction of personal data in texts: e-mail addresses, phone numbers, cards, IBANs, IP addresses and secret keys.

A fast prefilter over whole columns selects the few texts that may contain any; only these are scanned in detail: phone
numbers by phonenumbers (Google's rules for each country), cards and IBANs by python-stdnum (check digits), keys by
detect-secrets (formats of known services), IP addresses by the standard library, e-mail addresses by pattern.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

_EMAIL_PATTERN = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b", re.IGNORECASE)
_PHONE_PATTERN = re.compile(r"(?<![\w.-])\+?\(?\d(?:[ ().\-/]{0,2}\d){6,18}(?!-?\w)")
_PHONE_CONTEXT_PATTERN = re.compile(
    r"(?:call|phone|tel|text|whatsapp|mobile|cell|fax|number|dial)\W[^\n]{0,24}$", re.IGNORECASE
)
_CARD_PATTERN = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN_PATTERN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b")
_IPV4_PATTERN = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6_PATTERN = re.compile(r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.IGNORECASE)
_NOT_PHONE_PATTERN = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d+\.\d+")
"""Dates, and numbers with a fraction."""

_PHONE_REGIONS = ("US", "GB", "DE", "FR", "IN")
"""Countries whose numbers are also recognized without their +code."""
_PRIVATE_KEY_PATTERN = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)")
_KEY_DETECTORS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "DiscordBotTokenDetector", "GitHubTokenDetector",
    "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector",
    "PypiTokenDetector", "SendGridDetector", "SlackDetector", "SquareOAuthDetector", "StripeDetector",
    "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
"""Classes of detect-secrets that know a format; those that judge by entropy or key words are left out."""
_PREFILTER_PATTERN = (
    r"@|\d(?:[ ().\-/]{0,2}\d){6}|[A-Z]{2}\d{2} ?[A-Z0-9]{2}|\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f:]:[0-9A-Fa-f]{0,4}:"
    r"|[A-Za-z0-9_\-/+=]{16}|PRIVATE KEY"
)
"""Matches every text that any finder could match. It must stay a superset of the patterns above: a text that it misses
is never scanned. RE2 (in Arrow) runs it over whole columns, so it uses no look-around."""


def _find_emails(text: str) -> Iterable[tuple[int, int]]:
    return (match.span() for match in _EMAIL_PATTERN.finditer(text)) if "@" in text else ()


def _find_cards(text: str) -> Iterable[tuple[int, int]]:
    from stdnum import luhn

    for match in _CARD_PATTERN.finditer(text):
        number = re.sub(r"\D", "", match[0])
        # Cards begin with 2 to 6; one repeated digit passes Luhn's check but is a placeholder.
        if number[0] in "23456" and len(set(number)) > 1 and luhn.is_valid(number):
            yield match.span()


def _find_ibans(text: str) -> Iterable[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN_PATTERN.finditer(text):
        candidate = match[0]
        while len(candidate) >= 15:  # 15 characters is the shortest IBAN; the pattern may have run into the next word
            if iban.is_valid(candidate):
                yield match.start(), match.start() + len(candidate)
                break
            candidate = candidate.rpartition(" ")[0]


def _find_phones(text: str) -> Iterable[tuple[int, int]]:
    import phonenumbers

    for match in _PHONE_PATTERN.finditer(text):
        number = match[0]
        if len(re.findall(r"\d", number)) > 15 or _NOT_PHONE_PATTERN.fullmatch(number):
            continue
        # Bare digits are mostly order numbers and ids: they need ten digits and a word such as "call" before them.
        if number.isdecimal() and (len(number) < 10 or not _PHONE_CONTEXT_PATTERN.search(text[: match.start()])):
            continue
        for region in (None,) if number.startswith("+") else _PHONE_REGIONS:
            try:
                parsed = phonenumbers.parse(number, region)
            except phonenumbers.NumberParseException:
                continue
            has_format = number.startswith("+") or _has_phone_format(parsed, number, region)
            if has_format and phonenumbers.is_valid_number(parsed):
                yield match.span()
                break


def _has_phone_format(parsed: object, number: str, region: str | None) -> bool:
    """Whether a number without country code has a grouping that is usual in its country.

    Sums, order numbers and lists of years rarely have one.
    """
    import phonenumbers

    if number.isdecimal():
        return len(number) in (10, 11)
    level = phonenumbers.Leniency.STRICT_GROUPING
    return any(phonenumbers.PhoneNumberMatcher(number, region, leniency=level)) or bool(
        re.fullmatch(r"\(?\d{3}\)?[ .\-]\d{3}[ .\-]\d{4}|0\d{2,4}[ \-/]\d{3,4}[ ]?\d{3,4}", number) and parsed
    )


def _find_ip_addresses(text: str) -> Iterable[tuple[int, int]]:
    for pattern in (_IPV4_PATTERN, _IPV6_PATTERN):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            # Short IPv6 forms such as a::b are mostly code (C++ scopes) and times.
            if address.version == 4 or (match[0].count(":") > 2 and not address.is_unspecified):
                yield match.span()


@cache
def _load_key_patterns() -> tuple[re.Pattern[str], ...]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    detector_by_name = {detector.__name__: detector for detector in get_mapping_from_secret_type_to_class().values()}
    denylist_patterns = [pattern for name in _KEY_DETECTORS for pattern in detector_by_name[name].denylist]
    # Formats that detect-secrets lacks: newer OpenAI and Anthropic keys, Google API keys, Hugging Face tokens.
    extra_patterns = r"sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{20,}", r"AIza[0-9A-Za-z_-]{35}", r"hf_[A-Za-z0-9]{30,}"
    compiled = (re.compile(rf"(?<![\w-]){pattern}") for pattern in extra_patterns)
    return (_PRIVATE_KEY_PATTERN, *denylist_patterns, *compiled)


def _find_keys(text: str) -> Iterable[tuple[int, int]]:
    for pattern in _load_key_patterns():
        for match in pattern.finditer(text):
            # Of basic auth in a URL (://user:password@host) only the password, group 1, is secret.
            is_basic_auth = pattern.pattern.startswith("://")
            yield match.span(1) if is_basic_auth else match.span()


_FINDER_BY_KIND: dict[str, Callable[[str], Iterable[tuple[int, int]]]] = {
    "key": _find_keys, "email": _find_emails, "iban": _find_ibans, "card": _find_cards, "ip": _find_ip_addresses,
    "phone": _find_phones,
}  # fmt: skip
"""Finders in descending order of certainty: where two matches overlap, the earlier kind wins."""


def redact_text(text: str, kinds: Sequence[str]) -> tuple[str, Counter[str]]:
    """Replace each match by its kind, as in <email>. Returns the text and the number of matches of each kind."""
    matches: list[tuple[int, int, str]] = []
    for kind, finder in _FINDER_BY_KIND.items():
        if kind in kinds:
            for start, end in finder(text):
                if all(end <= other_start or start >= other_end for other_start, other_end, _ in matches):
                    matches.append((start, end, kind))
    if not matches:
        return text, Counter()
    segments, position = [], 0
    for start, end, kind in sorted(matches):
        segments += [text[position:start], f"<{kind}>"]
        position = end
    return "".join([*segments, text[position:]]), Counter(kind for _, _, kind in matches)


def redact_array(texts: pa.Array, kinds: Sequence[str]) -> tuple[pa.Array, Counter[str]]:
    """Redact a column of texts [N]; returns it with counts by kind. Only texts that pass the prefilter are scanned."""
    counts: Counter[str] = Counter()
    if not kinds or not len(texts):
        return texts, counts
    candidate_mask = pc.match_substring_regex(texts, _PREFILTER_PATTERN)
    if not pc.any(candidate_mask).as_py():
        return texts, counts
    redacted_texts = []
    for text in texts.filter(candidate_mask).to_pylist():
        redacted_text, text_counts = redact_text(text, kinds)
        redacted_texts.append(redacted_text)
        counts += text_counts
    if not counts:
        return texts, counts
    return pc.replace_with_mask(texts, candidate_mask, pa.array(redacted_texts, texts.type)), counts
