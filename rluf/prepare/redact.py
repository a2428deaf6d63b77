"""Personal data out of texts, and user ids that cannot be led back to people.

A quick pass finds the few texts that could hold something; only these are looked at closely: phone numbers by
phonenumbers (Google's rules of each country), cards and IBANs by python-stdnum (check digits), keys by detect-secrets
(the formats of known services), IP addresses by the standard library, e-mail addresses by pattern.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

SALT = "RLUF_USER_SALT"
"""Environment variable of the secret that user ids are hashed with; it is never written anywhere."""

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b", re.IGNORECASE)
_DIGITS = re.compile(r"(?<![\w.-])\+?\(?\d(?:[ ().\-/]{0,2}\d){6,18}(?!-?\w)")
_CALL = re.compile(r"(?:call|phone|tel|text|whatsapp|mobile|cell|fax|number|dial)\W[^\n]{0,24}$", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.IGNORECASE)
_NO_PHONE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d+\.\d+")
"""Dates, and numbers with a fraction."""

_REGIONS = ("US", "GB", "DE", "FR", "IN")
"""Countries whose numbers are also known without their +code."""
_KEYLIKE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)")
_QUICK = (
    r"@|\d(?:[ ().\-/]{0,2}\d){6}|[A-Z]{2}\d{2} ?[A-Z0-9]{2}|\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f:]:[0-9A-Fa-f]{0,4}:"
    r"|[A-Za-z0-9_\-/+=]{16}|PRIVATE KEY"
)
"""What every find has in it; RE2 runs it over whole columns."""


def _emails(text: str) -> Iterable[tuple[int, int]]:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else ()


def _cards(text: str) -> Iterable[tuple[int, int]]:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        number = re.sub(r"\D", "", match[0])
        if number[0] in "23456" and len(set(number)) > 1 and luhn.is_valid(number):
            yield match.span()


def _ibans(text: str) -> Iterable[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        found = match[0]
        while len(found) >= 15:  # the pattern may have run into the next word
            if iban.is_valid(found):
                yield match.start(), match.start() + len(found)
                break
            found = found.rpartition(" ")[0]


def _phones(text: str) -> Iterable[tuple[int, int]]:
    import phonenumbers

    for match in _DIGITS.finditer(text):
        number = match[0]
        if len(re.findall(r"\d", number)) > 15 or _NO_PHONE.fullmatch(number):
            continue
        if number.isdecimal() and (len(number) < 10 or not _CALL.search(text[: match.start()])):
            continue
        for region in (None,) if number.startswith("+") else _REGIONS:
            try:
                parsed = phonenumbers.parse(number, region)
            except phonenumbers.NumberParseException:
                continue
            if phonenumbers.is_valid_number(parsed) and (number.startswith("+") or _written_so(parsed, number, region)):
                yield match.span()
                break


def _written_so(parsed: object, number: str, region: str | None) -> bool:
    """Whether a number without country code is written as people of the country write it.

    Sums, order numbers and years in a row seldom are.
    """
    import phonenumbers

    if number.isdecimal():
        return len(number) in (10, 11)
    level = phonenumbers.Leniency.STRICT_GROUPING
    return any(phonenumbers.PhoneNumberMatcher(number, region, leniency=level)) or bool(
        re.fullmatch(r"\(?\d{3}\)?[ .\-]\d{3}[ .\-]\d{4}|0\d{2,4}[ \-/]\d{3,4}[ ]?\d{3,4}", number) and parsed
    )


def _addresses(text: str) -> Iterable[tuple[int, int]]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                found = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if found.version == 4 or (match[0].count(":") > 2 and not found.is_unspecified):
                yield match.span()


@cache
def _key_patterns() -> tuple[re.Pattern[str], ...]:
    from detect_secrets.plugins import (
        aws,
        azure_storage_key,
        basic_auth,
        discord,
        github_token,
        gitlab_token,
        jwt,
        mailchimp,
        npm,
        openai,
        pypi_token,
        sendgrid,
        slack,
        square_oauth,
        stripe,
        telegram_token,
        twilio,
    )

    detectors = (
        aws.AWSKeyDetector, azure_storage_key.AzureStorageKeyDetector, basic_auth.BasicAuthDetector,
        discord.DiscordBotTokenDetector, github_token.GitHubTokenDetector, gitlab_token.GitLabTokenDetector,
        jwt.JwtTokenDetector, mailchimp.MailchimpDetector, npm.NpmDetector, openai.OpenAIDetector,
        pypi_token.PypiTokenDetector, sendgrid.SendGridDetector, slack.SlackDetector, square_oauth.SquareOAuthDetector,
        stripe.StripeDetector, telegram_token.TelegramBotTokenDetector, twilio.TwilioKeyDetector,
    )  # fmt: skip
    found = [pattern for detector in detectors for pattern in detector.denylist]
    more = (r"sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{20,}", r"AIza[0-9A-Za-z_-]{35}", r"hf_[A-Za-z0-9]{30,}")
    return (_KEYLIKE, *found, *(re.compile(rf"(?<![\w-]){text}") for text in more))


def _keys(text: str) -> Iterable[tuple[int, int]]:
    for pattern in _key_patterns():
        for match in pattern.finditer(text):
            password = pattern.pattern.startswith("://")
            yield match.span(1) if password else match.span()


_FINDERS: dict[str, Callable[[str], Iterable[tuple[int, int]]]] = {
    "key": _keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
"""In the order of certainty: where two kinds overlap, the earlier one names it."""


def redact(text: str, kinds: Sequence[str]) -> tuple[str, Counter[str]]:
    """The text with each find replaced by its kind, as in <email>, and how many of each kind there were."""
    taken: list[tuple[int, int, str]] = []
    for kind, finder in _FINDERS.items():
        if kind in kinds:
            for start, end in finder(text):
                if all(end <= other or start >= stop for other, stop, _ in taken):
                    taken.append((start, end, kind))
    if not taken:
        return text, Counter()
    parts, last = [], 0
    for start, end, kind in sorted(taken):
        parts += [text[last:start], f"<{kind}>"]
        last = end
    return "".join([*parts, text[last:]]), Counter(kind for _, _, kind in taken)


def redact_array(texts: pa.Array, kinds: Sequence[str]) -> tuple[pa.Array, Counter[str]]:
    """A column of texts [N] redacted, and counts by kind; texts without a hint are not touched."""
    counts: Counter[str] = Counter()
    if not kinds or not len(texts):
        return texts, counts
    hints = pc.match_substring_regex(texts, _QUICK)
    if not pc.any(hints).as_py():
        return texts, counts
    changed = []
    for text in texts.filter(hints).to_pylist():
        clean, found = redact(text, kinds)
        changed.append(clean)
        counts += found
    return (pc.replace_with_mask(texts, hints, pa.array(changed, texts.type)), counts) if counts else (texts, counts)


def user_salt() -> bytes | None:
    """The secret salt of the environment, None without one (ids are then taken to be hashed by the log's writer)."""
    salt = os.environ.get(SALT, "").encode()
    return salt or None


def salt_mark(salt: bytes | None) -> str:
    """What tells two salts apart without giving either away (for the keys of kept stages)."""
    return hashlib.blake2b(salt, digest_size=8, person=b"rluf-salt-mark").hexdigest() if salt else ""


def hash_user(user: str, salt: bytes | None) -> str:
    """24 hex digits (96 bits) that stand for a user: BLAKE2b keyed with the salt; the id itself without a salt."""
    if salt is None:
        return user
    key = hashlib.blake2b(salt, digest_size=32).digest()
    return hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=12, key=key).hexdigest()


def forget_mark(user: str) -> str:
    """What a card keeps of a forgotten user (hashed or not): it recognises the id and gives nothing else away."""
    return hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=16, person=b"rluf-forgotten").hexdigest()
