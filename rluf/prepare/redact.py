"""Redaction of personal data in texts: e-mail addresses, phone, card and identity numbers, IBANs, IP addresses, keys.

A fast prefilter over whole columns selects the few texts that may contain any; only these are scanned in detail: phone
numbers by phonenumbers (Google's rules for each country), cards, IBANs and identity numbers by python-stdnum (check
digits), keys by detect-secrets (formats of known services), IP addresses by the standard library, e-mail addresses by
pattern. Every pattern has ASCII boundaries, since Chinese, Japanese and Thai have no spaces, and takes linear time.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from rluf.prepare.redact_keys import find_keys
from rluf.prepare.redact_numbers import find_id_numbers, find_phones

MAX_CHECKED = 400
"""Candidates of a kind that are checked in a text; further ones count without a check. So a hostile text costs little,
and hides nothing."""

_LOCAL_CHARS = r"A-Za-z0-9.!#$%&'*+/=?^_`{|}~\-À-ÖØ-öø-ɏΑ-ωЀ-ӿ"
# A pattern that starts with a character class and looks behind after it is found several times faster than one that
# looks behind first.
_DOMAIN = (
    r"(?!\d+\.\d)(?:(?![-_.])[^\W_](?:[\w-]{0,62})\.){1,8}"
    r"(?:xn--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}(?![A-Za-z0-9_])|公司|网络|網絡|中国|中國|香港|台灣|рф|укр|한국|भारत|ไทย|مصر|السعودية)"
)
_AT_PATTERN = re.compile("@" + _DOMAIN)
_SPELLED_AT_PATTERN = re.compile(
    r"[(\[{] ?(?:at|@|arroba) ?[)\]}] ?"
    r"(?:[A-Za-z0-9-]{1,63} ?(?:\.|[(\[{] ?(?:dot|punkt|punto|point|\.) ?[)\]}]) ?){1,6}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_LOCAL_PATTERN = re.compile(rf" ?(?:[{_LOCAL_CHARS}]{{1,64}}|\"[^\"\s@]{{1,62}}\"|[^\W\d_]{{1,16}})")
"""The part of an address before the sign @, read backwards: in Latin, Greek or Cyrillic, in quotes, or a word of
another script."""
_CARD_PATTERN = re.compile(
    r"\d(?<![A-Za-z0-9_.-].)(?:\d{3}([./])\d{4}\1\d{4}\1\d{4}|(?:[ -]{0,2}\d){12,18})(?![A-Za-z0-9_]|-\d)", re.ASCII
)
_CARD_CODE_PATTERN = re.compile(
    r"(?<![A-Za-z])(?:cvv2?|cvc2?|security code|安全码|セキュリティコード)[ :：=#-]{0,3}(?:is |は|是)?(\d{3,4})(?!\d)",
    re.IGNORECASE,
)
_IBAN_PATTERN = re.compile(r"[A-Za-z](?<![A-Za-z0-9].)[A-Za-z]\d{2}(?:[ -]?[A-Za-z0-9]){11,30}", re.ASCII)
_IPV4_PATTERN = re.compile(r"\d(?<![A-Za-z0-9_.-].)\d{0,2}(?:\.\d{1,3}){3}(?![A-Za-z0-9_]|\.\d|-\d)", re.ASCII)
_IPV6_PATTERN = re.compile(
    r"(?<![A-Za-z0-9_.])(?<![0-9A-Fa-f:]:)(?:[0-9A-Fa-f]{1,4}|(?=::))(?::[0-9A-Fa-f]{0,4}){2,7}(?:\d{0,3}(?:\.\d{1,3}){3})?(?![A-Za-z0-9_:])"
)
_VERSION_CONTEXT_PATTERN = re.compile(
    r"(?:\bv|version|ver\.?|release|build|firmware|driver|版本|バージョン|버전|เวอร์ชัน|версия|versión|versão|إصدار|الإصدار|संस्करण)"
    r"[ :=]{0,2}(?:is |of |на )?$", re.IGNORECASE
)  # fmt: skip
_PREFILTER_PATTERN = (
    r"@|[(\[{] ?(?:at|AT|At|arroba) ?[)\]}]|\d(?:[ ().\-/]{0,2}\d){6}|[A-Za-z]{2}\d{2}[ -]?[A-Za-z0-9]{2}"
    r"|\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f:]:[0-9A-Fa-f]{0,4}:|[A-Za-z0-9_\-/+=.]{16}|PRIVATE KEY|://|[A-Z]{5}\d|[A-Z]{6}"
    r"|[A-Z]-?\d{7}|(?i:cvv|cvc|security code|key|token|secret|pass|pwd|kennwort|contrase|clave|senha)"
    # Without width, full-width, of another script, or mathematical: what the forms above do not show.
    r"|[\x{AD}\x{200B}-\x{200D}\x{2060}\x{FEFF}\x{FF10}-\x{FF19}\x{FF20}-\x{FF3A}\x{FF41}-\x{FF5A}\x{1D400}-\x{1D7FF}]"
    r"|[\x{660}-\x{669}\x{6F0}-\x{6F9}\x{966}-\x{96F}\x{9E6}-\x{9EF}\x{E50}-\x{E59}]|\d[\x{A0}\x{2000}-\x{2015}\x{202F}\x{2212}\x{3000}]\d"
    r"|пароль|密码|密碼|口令|安全码|パスワード|セキュリティコード|비밀번호|암호|รหัสผ่าน|पासवर्ड|كلمة"
)
"""Matches every text that any finder could match. It must stay a superset of the patterns above: a text that it misses
is never scanned. RE2 (in Arrow) runs it over whole columns, so it uses no look-around."""


def _check_matches(
    matches: Iterable[re.Match[str]], find_end: Callable[[re.Match[str]], int | None]
) -> Iterator[tuple[int, int]]:
    """Spans of matches for which `find_end` returns an end; of the candidates after MAX_CHECKED, all of them."""
    for index, match in enumerate(matches):
        end = find_end(match) if index < MAX_CHECKED else match.end()
        if end is not None:
            yield match.start(), end


def _find_emails(text: str) -> Iterator[tuple[int, int]]:
    reversed_text = text[::-1]
    for pattern in (_AT_PATTERN, _SPELLED_AT_PATTERN):
        for match in pattern.finditer(text):
            local_part = _LOCAL_PATTERN.match(reversed_text, len(text) - match.start())
            # git@host:path is the address of a repository.
            if local_part is not None and not (local_part[0] == "tig" and text[match.end() : match.end() + 1] == ":"):
                yield match.start() - len(local_part[0]), match.end()


def _find_card_end(match: re.Match[str]) -> int | None:
    from stdnum import luhn

    number = re.sub(r"\D", "", match[0])
    # Cards begin with 2 to 6; one repeated digit passes Luhn's check but is a placeholder.
    is_card = number[0] in "23456" and len(set(number)) > 1 and luhn.is_valid(number)
    return match.end() if is_card else None


def _find_cards(text: str) -> Iterator[tuple[int, int]]:
    yield from _check_matches(_CARD_PATTERN.finditer(text), _find_card_end)
    yield from (match.span(1) for match in _CARD_CODE_PATTERN.finditer(text))


def _find_iban_end(match: re.Match[str]) -> int | None:
    from stdnum import iban

    # 15 characters is the shortest IBAN; the pattern may have run into the next word.
    for end in range(match.end(), match.start() + 14, -1):
        if match.string[end : end + 1].isalnum() and match.string[end].isascii():
            continue
        candidate = match.string[match.start() : end]
        if candidate[-1] not in " -" and iban.is_valid(candidate):
            return end
    return None


def _find_ibans(text: str) -> Iterator[tuple[int, int]]:
    return _check_matches(_IBAN_PATTERN.finditer(text), _find_iban_end)


def _find_ip_end(match: re.Match[str]) -> int | None:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    if address.is_loopback or address.is_unspecified or match[0].startswith("255."):
        return None
    # Short IPv6 forms such as a::b are mostly code (C++ scopes) and times; four numbers may be a version.
    if address.version == 6:
        return match.end() if match[0].count(":") > 2 else None
    context = match.string[max(0, match.start() - 16) : match.start()]
    return None if _VERSION_CONTEXT_PATTERN.search(context) else match.end()


def _find_ip_addresses(text: str) -> Iterator[tuple[int, int]]:
    for pattern, separator in ((_IPV4_PATTERN, "."), (_IPV6_PATTERN, ":")):
        if separator in text:
            yield from _check_matches(pattern.finditer(text), _find_ip_end)


_FINDER_BY_KIND: dict[str, Callable[[str], Iterable[tuple[int, int]]]] = {
    "key": find_keys, "email": _find_emails, "iban": _find_ibans, "card": _find_cards, "ip": _find_ip_addresses,
    "id": lambda text: find_id_numbers(text, MAX_CHECKED), "phone": lambda text: find_phones(text, MAX_CHECKED),
}  # fmt: skip
"""Finders in descending order of certainty: where two matches overlap, the earlier kind wins."""

_INVISIBLE_PATTERN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
"""Characters without width: a number that has one in it looks the same."""


class _AsciiForms(dict[int, int]):
    """The one ASCII character that stands for each character: full-width letters, digits of all scripts, dashes."""

    def __missing__(self, codepoint: int) -> int:
        char = chr(codepoint)
        digit, category = unicodedata.decimal(char, None), unicodedata.category(char)
        normalized = unicodedata.normalize("NFKC", char)
        if digit is not None:
            ascii_form = ord("0") + digit
        elif category == "Pd" or char == "\u2212":
            ascii_form = ord("-")
        # Other signs stay, such as a full-width colon: it ends a label, and is not part of what follows.
        elif len(normalized) == 1 and normalized.isascii() and (normalized.isalnum() or normalized in " @.+/()_"):
            ascii_form = ord(normalized)
        else:
            ascii_form = codepoint
        self[codepoint] = ascii_form
        return ascii_form


_ASCII_FORMS = _AsciiForms()


def _find_spans(text: str, kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Sorted spans (start, end, kind) that do not overlap."""
    positions: list[int] | None = None
    search_text = text
    if not text.isascii():
        if _INVISIBLE_PATTERN.search(text):
            positions = [index for index, char in enumerate(text) if not _INVISIBLE_PATTERN.match(char)]
            search_text = _INVISIBLE_PATTERN.sub("", text)
        search_text = search_text.translate(_ASCII_FORMS)
    is_covered = bytearray(len(search_text))
    spans = []
    for kind, find in _FINDER_BY_KIND.items():
        for start, end in find(search_text) if kind in kinds else ():
            if end > start and not any(is_covered[start:end]):
                is_covered[start:end] = b"\1" * (end - start)
                spans.append((start, end, kind))
    if positions is not None:
        spans = [(positions[start], positions[end - 1] + 1, kind) for start, end, kind in spans]
    return sorted(spans)


def redact_text(text: str, kinds: Sequence[str]) -> tuple[str, Counter[str]]:
    """Replace each match by its kind, as in <email>. Returns the text and the number of matches of each kind."""
    spans = _find_spans(text, kinds)
    if not spans:
        return text, Counter()
    segments, position = [], 0
    for start, end, kind in spans:
        segments += [text[position:start], f"<{kind}>"]
        position = end
    return "".join([*segments, text[position:]]), Counter(kind for _, _, kind in spans)


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
