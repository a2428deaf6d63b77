"""Phone numbers and national identity numbers in texts, by phonenumbers (Google's rules) and python-stdnum."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

_PHONE_PATTERN = re.compile(
    r"[+(\d](?<![A-Za-z0-9_.+-].)(?:(?<=\+) ?\(?\d|(?<=\()\d|(?<=\d))(?:[ ().\-/]{0,2}\d){6,18}(?!-?[A-Za-z0-9_])",
    re.ASCII,
)  # fmt: skip
_PHONE_CONTEXT_PATTERN = re.compile(
    r"(?:(?<![a-z])(?:call|(?:tele)?phone|tel|text|whatsapp|mobile?|cell|fax|number|dial|ring|sms|contact|reach|anruf\w*"
    r"|telefon\w*|handy\w*|rufnummer|nummer|erreich\w*|m[oó]vil|celular|llam\w*|n[uú]mero|t[eé]l[eé]?phone|t[eé]l"
    r"|portable|appel\w*|num[eé]ro|joindre|ligue|ligar|cellulare|chiam\w*)(?![a-z])|тел|номер|звон|моб|电话|電話|手机"
    r"|手機|号码|號碼|联系|聯繫|拨打|携帯|番号|전화|휴대폰|연락|번호|핸드폰|โทร|เบอร์|ติดต่อ|फ़?ोन|मोबाइल|नंबर|कॉल|هاتف|جوال|رقم|اتصل|الاتصال)"
    r"[^\n\d]{0,20}$",
    re.IGNORECASE,
)
_CONTEXT_CHARS = 48
"""Characters before a number in which a word such as phone counts."""

_NATIONAL_PHONE_PATTERN = re.compile(
    r"\(?[2-9]\d{2}\)?[ .\-]{1,2}[2-9]\d{2}[ .\-]\d{4}|0\d{1,5}(?:[ \-/.]\d{1,4}){1,5}|0\d{2,4}[ \-/]\d{5,8}"
    r"|\(0\d{1,4}\) ?\d{2,4}(?:[ \-]?\d{2,4}){1,3}|1[3-9]\d[ \-]\d{4}[ \-]\d{4}|\(?[1-9]{2}\)? 9\d{4}[ \-]\d{4}"
    r"|8[ \-]?\(?9\d{2}\)?[ \-]\d{3}[ \-]\d{2}[ \-]\d{2}|[6-9]\d{4}[ \-]\d{5}"
    r"|[67]\d{2}(?: \d{2}){3}|[67]\d{2} \d{3} \d{3}",
    re.ASCII,
)
"""Groupings of numbers without country code that are usual somewhere and rare otherwise."""
_PHONE_REGIONS = (
    "US", "GB", "DE", "FR", "IN", "CN", "JP", "KR", "TH", "ES", "BR", "RU", "IT", "MX", "AU", "NL", "PL", "TR", "EG",
    "SA", "AE", "HK", "TW",
)  # fmt: skip
"""Countries whose numbers are also recognized without their +code."""
_NOT_PHONE_PATTERN = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d+\.\d+|\d{4} ?[-/] ?\d{4}", re.ASCII)
"""Dates, numbers with a fraction, and ranges of years."""


def _is_phone(number: str, context: str, follows_phone: bool) -> bool:
    import phonenumbers

    if number.startswith("00"):
        number = "+" + number[2:]
    digits = re.sub(r"\D", "", number)
    if len(digits) > 15 or _NOT_PHONE_PATTERN.fullmatch(number):
        return False
    if number.startswith("+"):
        regions: tuple[str | None, ...] = (None,)
    elif (
        follows_phone
        or _PHONE_CONTEXT_PATTERN.search(context)
        or (not number.isdecimal() and _NATIONAL_PHONE_PATTERN.fullmatch(number))
    ):
        # Bare digits are mostly order numbers and ids: they need nine digits, and a word such as "call" before them.
        if len(digits) < 9 and (number.isdecimal() or len(digits) < 8):
            return False
        regions = _PHONE_REGIONS
    else:
        return False
    for region in regions:
        try:
            parsed = phonenumbers.parse(number, region)
            if phonenumbers.is_valid_number(parsed):
                return True
            # Ranges are given out faster than any list of them is updated; a code and groups say enough.
            if region is None and " " in number.strip() and phonenumbers.is_possible_number(parsed):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def find_phones(text: str, max_checked: int) -> Iterator[tuple[int, int]]:
    """Spans of phone numbers; after `max_checked` candidates the others count without a check, in linear time."""
    last_end = -_CONTEXT_CHARS
    for index, match in enumerate(_PHONE_PATTERN.finditer(text)):
        start = match.start()
        context = text[max(0, start - _CONTEXT_CHARS) : start]
        # "call A or B": what makes A a number makes B one.
        if index >= max_checked or _is_phone(match[0], context, start - last_end <= 6):
            last_end = match.end()
            yield match.span()


_ID_FORMATS = {
    "us_ssn": r"\d{3}-\d{2}-\d{4}",
    "cn_ric": r"\d{6}(?:19|20)\d{9}[\dXx]",
    "kr_rrn": r"\d{6}-[1-8]\d{6}",
    "br_cpf": r"\d{3}\.\d{3}\.\d{3}-\d{2}",
    "th_pin": r"\d-\d{4}-\d{5}-\d{2}-\d",
    "in__aadhaar": r"[2-9]\d{3}[ -]\d{4}[ -]\d{4}(?![ -]?\d)",
    "in__pan": r"[A-Z]{3}[ABCFGHJLPT][A-Z]\d{4}[A-Z]",
    "es_dni": r"\d{8}-?[A-HJ-NP-TV-Z]",
    "es_nie": r"[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]",
    "it_codicefiscale": r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]",
    "fr_nir": r"[12] \d{2} \d{2} (?:\d{2}|2[AB]) \d{3} \d{3} \d{2}",
    "word": r"\d{2,4}(?:[ -]?\d{2,6}){1,4}",
}
"""Written forms of identity numbers, by module of python-stdnum; `word`: other forms, after the name of a number."""
_ID_PATTERN = re.compile(
    "(?:" + "|".join(f"(?P<{name}>{form})" for name, form in _ID_FORMATS.items()) + r")(?![A-Za-z0-9]|-\d)", re.ASCII
)
_ID_START_PATTERN = re.compile(r"[0-9A-Z](?<![A-Za-z0-9.-].)(?=[0-9A-Z]{2}|[ -]?\d{2})")
"""Where an identity number may start; tried at each position of a text, the forms above would take too long."""
_ID_CONTEXTS = (
    ("cn.ric", r"身份证|身份證"),
    ("jp.in_", r"マイナンバー|個人番号|(?<![a-z])my number"),
    ("kr.rrn", r"주민등록번호|주민번호"),
    ("th.pin", r"บัตรประชาชน|เลขประจำตัว"),
    ("in_.aadhaar", r"aadha+r|आधार"),
    ("br.cpf", r"(?<![a-z])cpf(?![a-z])"),
    ("de.idnr", r"steuer-?id|identifikationsnummer|(?<![a-z])idnr"),
    ("pl.pesel", r"(?<![a-z])pesel"),
    ("nl.bsn", r"(?<![a-z])bsn(?![a-z])|burgerservicenummer"),
    ("tr.tckimlik", r"kimlik|(?<![a-z])tckn"),
    ("gb.nhs", r"(?<![a-z])nhs(?![a-z])"),
    ("fr.nir", r"s[eé]curit[eé] sociale|(?<![a-z])nir(?![a-z])"),
)  # fmt: skip


@cache
def _load_validator(module_name: str) -> Any:
    return import_module(f"stdnum.{module_name}").is_valid


@cache
def _load_id_contexts() -> list[tuple[re.Pattern[str], Any]]:
    contexts = [
        # A number after the name of a US social security number counts even if it was never issued.
        (r"(?<![a-z])ssn(?![a-z])|social security", re.compile(r"\d{9}").fullmatch),
        *((words, _load_validator(name)) for name, words in _ID_CONTEXTS),
    ]
    return [(re.compile(rf"(?:{words})[^\n]{{0,20}}$", re.IGNORECASE), validate) for words, validate in contexts]


def _is_id_number(number: str, form: str, context: str) -> bool:
    # Group names have no dots: us_ssn is us.ssn, in__pan is in_.pan.
    if form != "word" and _load_validator(".".join(form.rsplit("_", 1)))(number):
        return True
    compact = re.sub(r"[ .-]", "", number)
    return any(pattern.search(context) and validate(compact) for pattern, validate in _load_id_contexts())


def find_id_numbers(text: str, max_checked: int) -> Iterator[tuple[int, int]]:
    """Spans of national identity numbers; after `max_checked` candidates the others count without a check."""
    matches = (_ID_PATTERN.match(text, start.start()) for start in _ID_START_PATTERN.finditer(text))
    for index, match in enumerate(match for match in matches if match is not None):
        start, form = match.start(), match.lastgroup or "word"
        if index >= max_checked:
            if form != "word":
                yield match.span()
        elif _is_id_number(match[0], form, text[max(0, start - _CONTEXT_CHARS) : start]):
            yield match.span()
