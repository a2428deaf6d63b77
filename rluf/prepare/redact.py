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
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rluf.prepare.redact_patterns import (
    ASCII_ID_WORDS,
    ASSIGNMENT_PATTERN,
    COMBINING_MARKS,
    DETECTORS,
    EXTRA_FORMATS,
    HEADER_PATTERN,
    HOOK_PATTERN,
    ID_CONTEXTS,
    ID_FORM_PATTERN,
    ID_FORM_START_PATTERN,
    ID_PATTERN,
    ID_START_PATTERN,
    NEAR_PASSWORD_PATTERN,
    PASSWORD_PATTERN,
    PASSWORD_WORD_PATTERN,
    PRIVATE_KEY_PATTERN,
    SHORT_WORD_PATTERN,
    STEMS,
    URL_PASSWORD_PATTERN,
)

MAX_CHECKED = 400
"""Candidates of a kind that are checked in a text; further ones count without a check. So a hostile text costs little,
and hides nothing."""

_LOCAL_CHARS = r"A-Za-z0-9.!#$%&'*+/=?^_`{|}~\-À-ÖØ-öø-ɏΑ-ωЀ-ӿ"
# A pattern that starts with a character class and looks behind after it is found several times faster than one that
# looks behind first.
_INTERNATIONAL_ENDS = (
    "公司|网络|網絡|网址|在线|中国|中國|香港|台灣|台湾|新加坡|みんな|コム|рф|бел|срб|қаз|укр|онлайн|сайт|한국|भारत|ไทย|ελ|ευ|ישראל|"
    "مصر|السعودية|امارات|الاردن|المغرب|قطر|تونس"
)
_DOMAIN = (
    rf"(?!\d+\.\d)(?:(?![-_.])[^\W_](?:[\w{COMBINING_MARKS}-]{{0,62}})\.){{1,8}}"
    rf"(?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}(?![A-Za-z0-9_])|{_INTERNATIONAL_ENDS})"
)
_AT_PATTERN = re.compile("(?:@|%40|&#64;)" + _DOMAIN)
_SPELLED_AT_PATTERN = re.compile(
    r"[(\[{<] ?(?:at|ät|@|arroba|arobase|chiocciola|собака) ?[)\]}>] ?"
    r"(?:[A-Za-z0-9-]{1,63} ?(?:\.|[(\[{<] ?(?:dot|punkt|punto|ponto|point|точка|\.) ?[)\]}>]) ?){1,6}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_NAMED_AT_PATTERN = re.compile(
    r"(?<=[A-Za-z0-9_]) (?:(?P<at>at|@)|arroba|arobase|chiocciola|klammeraffe) "
    r"(?:[A-Za-z0-9-]{1,63}(?: (?:dot|punkt|punto|ponto|point) |\.)){1,3}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_MAIL_WORD_PATTERN = re.compile(r"mail|reach|contact|write|address|correo|posta|kontakt|почт", re.IGNORECASE)
"""One of these stands near an address that is spelled out with the plain words at and dot."""
_NAMED_BEFORE_PATTERN = re.compile(
    r"(?:mail|correo|posta|почт)\w{0,8}(?: address)?(?: is| es| ist|:|：)\s{0,2}$", re.IGNORECASE
)
_NAMED_AFTER_PATTERN = re.compile(r" is my (?:e-?)?mail", re.IGNORECASE)
"""What names an address with the plain word at, which is no sign of one by itself: contact us at example.com."""
_DOTTED_LOCAL = (
    r"[A-Za-z0-9_-]{1,32}"
    r"(?: ?[)\]}>] ?(?:tod|tknup|otnup|otnop|tniop|акчот|\.) ?[(\[{<] ?[A-Za-z0-9_-]{1,32}){1,4}"
)
_LOCAL_PATTERN = re.compile(
    rf" ?(?:{_DOTTED_LOCAL}|[{_LOCAL_CHARS}]{{1,64}}|\"[^\"\n@]{{1,62}}\""
    rf"|(?:[{COMBINING_MARKS}]{{0,2}}[^\W\d_]){{1,16}})",
    re.IGNORECASE,
)
"""The part of an address before the sign @, read backwards: in Latin, Greek or Cyrillic, in quotes, or a word of
another script."""
_CARD_PATTERN = re.compile(
    r"[2-6](?<![A-Za-z0-9_.+-].)(?:\d{3}([./])\d{4}\1\d{4}\1\d{4}|(?:[ -]{0,3}\d){12,18})(?![A-Za-z0-9_]|-\d)", re.ASCII
)
_CARD_LENGTH_PATTERN = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5\d{15}|5[06-8]\d{10,17}|6\d{12,18}|3[47]\d{13}|3[0689]\d{12}|3\d{15,18}"
    r"|(?:220[0-4]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12,15}",
    re.ASCII,
)
"""Beginnings of the numbers of card networks, with the lengths that each has."""
_CARD_CODE_WORDS = (
    "cvv", "cvc", "security code", "安全码", "安全碼", "セキュリティコード", "보안코드", "보안 코드",
    "código de segurança", "código de seguridad", "prüfnummer", "prüfziffer", "sicherheitscode", "รหัสความปลอดภัย",
    "รหัส cvv", "رمز الأمان",
    "رمز الحماية", "सुरक्षा कोड", "код безопасности", "cryptogramme",
    "code de sécurité", "codice di sicurezza",
)  # fmt: skip
_CARD_CODE_PATTERN = re.compile(
    rf"(?<![A-Za-z])(?:cvv2|cvc2|{'|'.join(_CARD_CODE_WORDS)})(?: ?(?:code|number|码|碼|コード|코드))?[\"'*\\]{{0,3}}"
    r"[ :：=#-]{0,3}(?:(?:is|ist|es|é|è|est|lautet|هو) |は |は|是|는 |는|은 |은|คือ ?)?[\"'*(\\]{0,3}(\d{3,4})(?!\d)",
    re.IGNORECASE,
)
_IBAN_PATTERN = re.compile(
    r"[A-Za-z](?:(?<![A-Za-z0-9].)|(?<=[Ii][Bb][Aa][Nn].))[A-Za-z] ?\d{2}(?:[ ./-]?[A-Za-z0-9]){11,30}", re.ASCII
)
_IPV4_PATTERN = re.compile(
    r"\d(?:(?<![A-Za-z0-9_.-].)|(?<=[Ii][Pp].)|(?<=\.\d-.)|(?<=\.\d\d-.)|(?<=\.\d{3}-.))\d{0,2}(?:\.\d{1,3}){3}"
    r"(?![A-Za-z0-9_]|\.\d|-(?!\d+\.\d+\.\d)\d)",
    re.ASCII,
)
_IPV6_PATTERN = re.compile(
    r"(?<![A-Za-z0-9_.])(?<![0-9A-Fa-f:]:)(?:[0-9A-Fa-f]{1,4}|(?=::))(?::[0-9A-Fa-f]{0,4}){2,7}(?:\d{0,3}(?:\.\d{1,3}){3})?(?![A-Za-z0-9_:])"
)
_VERSION_CONTEXT_PATTERN = re.compile(
    r"(?:\bv|vers[iíã]\w*|wersja|sürüm|\bver\.?|release|build|firmware|driver|section|chapter|kapitel|§|[=~><]=|版本"
    r"|バージョン|버전|เวอร์ชัน|รุ่น|версия|إصدار|الإصدار|संस्करण)[ :=]{0,3}(?:is |of |на )?$", re.IGNORECASE
)  # fmt: skip
_PREFILTER_PATTERN = (
    r"@|%40|&#64;|[(\[{<] ?(?i:at|ät|arroba|arobase|chiocciola|собака) ?[)\]}>]"
    r"|\d(?:[ ().\-/]{0,3}\d){6}|[A-Za-z]{2} ?\d{2}[ ./-]?[A-Za-z0-9]{2}"
    r"|\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f:]:[0-9A-Fa-f]{0,4}:|[A-Za-z0-9_\-/+=.]{16}|PRIVATE KEY|://|[A-Z]{5}\d|[A-Z]{6}"
    r"|[A-Z]-?\d{6}|[([{<] ?(?i:punkt|ponto|punto|dot|point|точка) ?[)\]}>]"
    r"|(?i: (?:at|arroba|arobase|chiocciola|klammeraffe) "
    r"(?:[a-z0-9-]{1,63}(?: (?:dot|punkt|punto|ponto|point) |\.)){1,3}[a-z]{2})"
    r"|(?i:cvv|cvc|security code|segurança|seguridad|prüf|sicherheitsc|cryptogr|sécurité|sicurezza)"
    r"|(?i:key|token|secret|pass|pwd)"
    r"|(?i:kennwort|contrase|clave|senha|schl|geheimz|wachtw|hasło|şifre|parola|lösen|mật kh|kata sandi)"
    r"|(?i:clé|chave|(?:\b|_)p(?:in|w))"
    r"|(?i:authorization|webhooks|пароль|код безоп|ключ|токен|пин)"
    # Without width, full-width, of another script, or mathematical: what the forms above do not show.
    r"|[\x{AD}\x{200B}-\x{200D}\x{2060}\x{FEFF}\x{FF10}-\x{FF19}\x{FF20}-\x{FF3A}\x{FF41}-\x{FF5A}\x{1D400}-\x{1D7FF}]"
    r"|[\x{660}-\x{669}\x{6F0}-\x{6F9}\x{966}-\x{96F}\x{9E6}-\x{9EF}\x{E50}-\x{E59}]|\d[\x{A0}\x{2000}-\x{2015}\x{202F}\x{2212}\x{3000}]\d"
    r"|密码|密碼|口令|安全码|安全碼|密钥|密鑰|秘钥|令牌|パスワード|パスは|パスが|暗証番号|セキュリティコード|キー|トークン"
    r"|비밀번호|비번|패스워드|암호|보안|키|토큰|รหัส|พาสเวิร์ด|คีย์|โทเค็น"
    r"|पासवर्ड|सुरक्षा|कुंजी|टोकन|كلمة|كلمه|السري|باسو|رمز|مفتاح|סיסמ"
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
    for pattern in (_AT_PATTERN, _SPELLED_AT_PATTERN, _NAMED_AT_PATTERN):
        for match in pattern.finditer(text):
            local_part = _LOCAL_PATTERN.match(reversed_text, len(text) - match.start())
            if local_part is not None and match.groupdict().get("at"):
                start = match.start() - len(local_part[0])
                before = text[max(0, start - _CONTEXT_CHARS) : start]
                after = text[match.end() : match.end() + _CONTEXT_CHARS]
                is_spelled_out = " dot " in match[0].lower() and _MAIL_WORD_PATTERN.search(before + after)
                if not (is_spelled_out or _NAMED_BEFORE_PATTERN.search(before) or _NAMED_AFTER_PATTERN.match(after)):
                    continue
            # git@host:path is the address of a repository.
            if local_part is not None and not (local_part[0] == "tig" and text[match.end() : match.end() + 1] == ":"):
                yield match.start() - len(local_part[0]), match.end()


def _find_card_end(match: re.Match[str]) -> int | None:
    from stdnum import luhn

    number = re.sub(r"\D", "", match[0])
    # One repeated digit passes Luhn's check but is a placeholder. Other numbers that begin with 2 are mostly times, as
    # in order numbers: 20240131... Those of 15 digits are mostly serial numbers of phones, which pass the check too.
    is_issued = _CARD_LENGTH_PATTERN.fullmatch(number)
    is_card = is_issued is not None and len(set(number)) > 1 and luhn.is_valid(number)
    return match.end() if is_card else None


def _find_cards(text: str) -> Iterator[tuple[int, int]]:
    yield from _check_matches(_CARD_PATTERN.finditer(text), _find_card_end)
    lower_text = text.lower()
    if any(word in lower_text for word in _CARD_CODE_WORDS):
        yield from (match.span(1) for match in _CARD_CODE_PATTERN.finditer(text))


def _find_iban_end(match: re.Match[str]) -> int | None:
    from stdnum import iban

    # 15 characters is the shortest IBAN; the pattern may have run into the next word.
    for end in range(match.end(), match.start() + 14, -1):
        if match.string[end : end + 1].isalnum() and match.string[end].isascii():
            continue
        candidate = match.string[match.start() : end]
        # Check digits and length are enough: lists of banks and branches are never complete.
        if candidate[-1] not in " ./-" and iban.is_valid(candidate.replace("/", ""), check_country=False):
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
        first_group = match[0].partition(":")[0]
        is_routed = len(first_group) == 4 and not first_group.isalpha()
        return match.end() if match[0].count(":") > 2 or is_routed else None
    context = match.string[max(0, match.start() - 16) : match.start()]
    return None if _VERSION_CONTEXT_PATTERN.search(context) else match.end()


def _find_ip_addresses(text: str) -> Iterator[tuple[int, int]]:
    for pattern, separator in ((_IPV4_PATTERN, "."), (_IPV6_PATTERN, ":")):
        if separator in text:
            yield from _check_matches(pattern.finditer(text), _find_ip_end)


@cache
def _load_format_pattern() -> re.Pattern[str]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    detector_by_name = {detector.__name__: detector for detector in get_mapping_from_secret_type_to_class().values()}
    formats = list(EXTRA_FORMATS)
    for pattern in (pattern for name in DETECTORS for pattern in detector_by_name[name].denylist):
        # Two formats do not start with a token: the hook of Slack, and "aws ... key", which is quadratic.
        if not pattern.pattern.startswith(("aws", "https:")):
            formats.append(f"(?i:{pattern.pattern})" if pattern.flags & re.IGNORECASE else pattern.pattern)
    # Without re.ASCII a letter of Chinese or Thai after a key would count as part of it.
    return re.compile(rf"(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_.=-]{{8}})(?:{'|'.join(formats)})", re.ASCII)


def _is_random_value(value: str) -> bool:
    """Whether a value after a key word is more than a word: letters with digits or signs, or long and of mixed case."""
    if "://" in value or not any(char.isalpha() for char in value):
        return False
    is_long = len(value) >= 20 and not value.islower() and not value.isupper()
    return is_long or any(char.isdecimal() or char in "!#$%&*=?@^~" for char in value)


def _is_password(value: str, *, has_sign: bool) -> bool:
    """Whether a value after a word for a password is one: a random value, digits after a sign, or both in one word."""
    if value.isdecimal():
        return has_sign
    is_mixed = any(map(str.isdecimal, value)) and any(map(str.isalpha, value))
    return _is_random_value(value) if has_sign else is_mixed and len(value) >= 6 and "-" not in value


def _find_keys(text: str) -> Iterator[tuple[int, int]]:
    """Spans of secrets; of an assignment, an authorization header or a URL only the secret itself."""
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in PRIVATE_KEY_PATTERN.finditer(text))
    yield from (match.span() for match in _load_format_pattern().finditer(text))
    for pattern, literal in ((URL_PASSWORD_PATTERN, "://"), (HOOK_PATTERN, "hooks")):
        if literal in text:
            yield from (match.span(1) for match in pattern.finditer(text))
    lower_text = text.lower()
    if "bearer" in lower_text or "authorization" in lower_text:
        for match in HEADER_PATTERN.finditer(text):
            if match[0][0] in "bB" or _is_random_value(match[1]):
                yield match.span(1)
    if any(stem in lower_text for stem in STEMS):
        if len(lower_text) != len(text):  # one letter became two, as in Turkish
            lower_text = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)
        yield from _find_assigned_values(text, lower_text)


def _find_assigned_values(text: str, lower_text: str) -> Iterator[tuple[int, int]]:
    """Spans of the values that a text, also given in lower case, names as a key or a password."""
    for match in ASSIGNMENT_PATTERN.finditer(text):
        value = match[2].rstrip(".,;:!?*")
        is_bare_key = len(value) >= 20 and value.isalnum()
        if _is_random_value(value) and (match[1] or (is_bare_key and any(map(str.isdecimal, value)))):
            yield match.start(2), match.start(2) + len(value)
    last_end = 0
    for index, word in enumerate(PASSWORD_WORD_PATTERN.finditer(lower_text)):
        pattern = PASSWORD_PATTERN if index < MAX_CHECKED else NEAR_PASSWORD_PATTERN
        assignment = pattern.match(lower_text, word.end()) if word.start() >= last_end else None
        if assignment is None:
            continue
        (start, end), sign, distant_sign = assignment.span(3), assignment[1], assignment[2]
        last_end, value = end, text[start:end].rstrip(".,;:?*")
        is_short_word = SHORT_WORD_PATTERN.fullmatch(word[0]) is not None
        if is_short_word and (sign is None or (word[0].startswith("pin") and not value.isdecimal())):
            continue
        has_sign = sign is not None or (value.isdecimal() and not word[0].isascii() and distant_sign is None)
        if len(value) >= 4 and _is_password(value, has_sign=has_sign):
            yield start, start + len(value)


_PHONE_PATTERN = re.compile(
    r"[+(\d](?<![A-Za-z0-9_+-].)(?<![\d.]\..)(?:(?<=\+) ?\(?\d|(?<=\()\d|(?<=\d))"
    r"(?:[ ().\-/]{0,2}\d){6,18}(?!-?[A-Za-z0-9_])",
    re.ASCII,
)
_PHONE_CONTEXT_PATTERN = re.compile(
    r"(?:(?<![a-z])(?:call|(?:tele|cell|mobile)?phone(?:number)?|tel|text|whatsapp|mobile?|cell|fax|number|dial|ring|sms|contact|reach|anruf\w*"
    r"|telefon\w*|handy\w*|rufnummer|nummer|erreich\w*|m[oó]vil|telem[oó]vel|celular|llam\w*|n[uú]mero|t[eé]l[eé]?phone|t[eé]l"
    r"|f[ao]ne|whats|zap|contac?to|portable|appel\w*|num[eé]ro|joindre|ligue|ligar|cellulare|chiam\w*|cep|zadzwo\w*|numer|bel|gsm|mobiel)(?![a-z])|тел|номер|звон|моб|电话|電話|手机"
    r"|手機|号码|號碼|联系|聯繫|打|微信|携帯|番号|連絡|전화|휴대폰|연락|번호|핸드폰|โทร|เบอร์|ติดต่อ|फ़?ोन|मोबाइल|नंबर|कॉल|هاتف|جوال|موبايل|تلي?فون|محمول|رقم|اتصل|الاتصال)"
    r"[^\n\d]{0,20}$",
    re.IGNORECASE,
)
_PHONE_AFTER_PATTERN = re.compile(
    r"[^\n\d]{0,12}?(?:連絡|電話|携帯|折り返|联系|聯繫|拨打|打给|打來|电话|手机|手機|微信|전화|휴대폰|핸드폰|문자|연락|โทร|ติดต่อ|เบอร์|कॉल|फ़?ोन"
    r"|मोबाइल|اتصل|هاتف|جوال|موبايل|تلي?فون|тел|anruf|erreich|handy|telef|ligar|m[oó]vil|celular|whats|(?<![a-z])(?:cell|mobile|phone|tel)(?![a-z]))",
    re.IGNORECASE,
)
"""Words after a number that say the same, as in languages whose verbs come last."""
_OTHER_NUMBER_PATTERN = re.compile(
    r"(?:(?<![a-z])(?:order|row|line|page|invoice|ticket|case|serial|tracking|part|model|product|item|reference|transaction"
    r"|function|pedido|factura|fatura|commande|facture|bestell\w*|rechnungs\w*|заказ\w*|счет\w*|счёт\w*)|订单|訂單|快递|注文|受付"
    r"|주문|송장|ऑर्डर|الطلب|สั่งซื้อ|พัสดุ)"
    r"[ _-]?(?:number|no\.?|num|nr\.?|id|号码|号|號碼|番号|번호|नंबर)?[ :：#=.]{0,3}(?:is |was )?$",
    re.IGNORECASE,
)
"""What a number of digits alone belongs to, where a word such as number stands before it."""
_CONTEXT_CHARS = 48
"""Characters before a number in which a word such as phone counts."""

_NATIONAL_PHONE_PATTERN = re.compile(
    r"(?:1[ .\-])?(?:\([2-9]\d{2}\)[ .\-]{0,2}|[2-9]\d{2}[ .\-/]{1,2})[2-9]\d{2}[ .\-]\d{4}|400-\d{3}-\d{4}"
    r"|0\d{1,5}(?:[ \-/.]\d{1,4}){1,5}|0\d{1,4}[ \-/]\d{5,8}|0 ?\([1-9]\d{1,3}\) ?\d{2,4}(?:[ \-]?\d{2,4}){1,3}"
    r"|\(0\d{1,4}\) ?\d{2,4}(?:[ \-]?\d{2,4}){1,3}|1[3-9]\d[ \-]\d{4}[ \-]\d{4}|[1-9]{2} 9\d{4}[ \-]\d{4}"
    r"|\([1-9]{2}\) ?9?\d{4}[ \-]\d{4}|8[ \-]?\(?[489]\d{2}\)?[ \-]?\d{3}[ \-]\d{2}[ \-]\d{2}|[6-9]\d{4}[ \-]\d{5}"
    r"|[6-9]\d{2}(?: \d{2}){3}|9\d \d{3} \d{2} \d{2}|[67]\d{2} \d{3} \d{3}",
    re.ASCII,
)
"""Groupings of numbers without country code that are usual somewhere and rare otherwise."""
_PHONE_REGIONS = (
    "US", "GB", "DE", "FR", "IN", "CN", "JP", "KR", "TH", "ES", "BR", "RU", "IT", "MX", "AU", "NL", "PL", "TR", "EG",
    "SA", "AE", "HK", "TW", "PT",
)  # fmt: skip
"""Countries whose numbers are also recognized without their +code."""
_NOT_PHONE_PATTERN = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d+\.\d+|\d{4} ?[-/] ?\d{4}|\d{5}-\d{3}", re.ASCII)
"""Dates, numbers with a fraction, ranges of years, and postal codes of Brazil."""


def _is_phone(number: str, context: str, text_after: str, follows_phone: bool) -> bool:
    import phonenumbers

    if number.lstrip("(").startswith("00"):
        number = "+" + number.lstrip("(")[2:]
    digits = re.sub(r"\D", "", number)
    if len(digits) > 15 or _NOT_PHONE_PATTERN.fullmatch(number):
        return False
    if number.isdecimal() and _OTHER_NUMBER_PATTERN.search(context):
        return False
    if number.startswith("+"):
        regions: tuple[str | None, ...] = (None,)
    elif len(digits) < (9 if number.isdecimal() else 8):
        return False
    elif (
        # Bare digits are mostly order numbers and ids: they need nine digits, and a word such as "call" before them.
        follows_phone
        or _PHONE_CONTEXT_PATTERN.search(context)
        or _PHONE_AFTER_PATTERN.match(text_after)
        or (not number.isdecimal() and _NATIONAL_PHONE_PATTERN.fullmatch(number))
    ):
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


def _find_phones(text: str) -> Iterator[tuple[int, int]]:
    """Spans of phone numbers; after MAX_CHECKED candidates the others count without a check, in linear time."""
    last_end = -_CONTEXT_CHARS
    for index, match in enumerate(_PHONE_PATTERN.finditer(text)):
        start = match.start()
        context = text[max(0, start - _CONTEXT_CHARS) : start]
        text_after = text[match.end() : match.end() + _CONTEXT_CHARS]
        # "call A or B": what makes A a number makes B one.
        if index >= MAX_CHECKED or _is_phone(match[0], context, text_after, start - last_end <= 6):
            last_end = match.end()
            yield match.span()


@cache
def _load_validator(module_name: str) -> Any:
    return import_module(f"stdnum.{module_name}").is_valid


def _is_valid_number(module_name: str, number: str) -> bool:
    try:
        return bool(_load_validator(module_name)(number))
    except KeyError:
        # python-stdnum looks up the place of a Chinese number last, and knows the province of this one only.
        return True


@cache
def _load_id_contexts() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    return [
        (re.compile(rf"(?:{words})[^\n\d]{{0,20}}$", re.IGNORECASE), re.compile(form)) for form, words in ID_CONTEXTS
    ]


def _is_id_number(number: str, form_name: str, context: str) -> bool:
    # Group names have no dots: us_ssn is us.ssn, in__pan is in_.pan.
    if form_name == "kr_rrn":
        return _has_valid_date(number)  # those issued since 2020 have no check digit
    if form_name not in ("letter", "word") and _is_valid_number(".".join(form_name.rsplit("_", 1)), number):
        return True
    lower_context = context.lower()
    if context.isascii() and not any(word in lower_context for word in ASCII_ID_WORDS):
        return False
    compact = re.sub(r"[ .-]", "", number)
    return any(form.fullmatch(compact) and pattern.search(context) for pattern, form in _load_id_contexts())


def _has_valid_date(number: str) -> bool:
    """Whether a Korean number begins with a date of birth (YYMMDD)."""
    return 1 <= int(number[2:4]) <= 12 and 1 <= int(number[4:6]) <= 31


def _find_id_numbers(text: str) -> Iterator[tuple[int, int]]:
    """Spans of national identity numbers; after MAX_CHECKED candidates the others count without a check."""
    candidate_count = 0
    for start in ID_START_PATTERN.finditer(text):
        match = ID_PATTERN.match(text, start.start())
        if match is None:
            continue
        if candidate_count == MAX_CHECKED:
            break
        candidate_count += 1
        context = text[max(0, match.start() - _CONTEXT_CHARS) : match.start()]
        if _is_id_number(match[0], match.lastgroup or "word", context):
            yield match.span()
    else:
        return
    for start in ID_FORM_START_PATTERN.finditer(text, match.start()):
        form_match = ID_FORM_PATTERN.match(text, start.start())
        if form_match is not None:
            yield form_match.span()


PERSONAL_ID_PATTERN = "|".join((
    r"[@\x{FF20}]|%40",
    # Messengers write whatsapp:+49..., and log files 203.0.113.7:443.
    r"(^|[:/_ -])\+\d[\d ().-]{7,}$", r"(^|[^\d.])\d{1,3}(\.\d{1,3}){3}($|[^\d.])",
    r"^\(?\d{2,5}\)?[ .-]\d{3,4}[ .-]\d{4}$", r"^0\d( \d\d){4}$", r"^00[1-9]\d{0,3}[ ().-][\d ().-]{6,}$",
    r"^[0-9a-fA-F]{0,4}(:[0-9a-fA-F]{0,4}){3,7}$",
))  # fmt: skip
"""Ids of users and rows that are personal data themselves, as a pattern of RE2."""

_FINDER_BY_KIND: dict[str, Callable[[str], Iterable[tuple[int, int]]]] = {
    "key": _find_keys, "email": _find_emails, "iban": _find_ibans, "card": _find_cards, "ip": _find_ip_addresses,
    "id": _find_id_numbers, "phone": _find_phones,
}  # fmt: skip
"""Finders in descending order of certainty: where two matches overlap, the earlier kind wins."""

_INVISIBLE_PATTERN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
"""Characters without width: a number that has one in it looks the same."""


_EMPHASIS_PATTERN = re.compile(r"(?<![A-Za-z0-9_])_(?=[^\s_])|(?<=[^\s_])_(?![A-Za-z0-9_])")


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
    if "_" in search_text:
        # Markdown's emphasis is not part of what it surrounds, unlike the underscores of a name.
        search_text = _EMPHASIS_PATTERN.sub(" ", search_text)
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
    # Rows of one conversation repeat its earlier messages: each text is scanned once.
    candidates = texts.filter(candidate_mask).dictionary_encode()
    occurrences = np.bincount(candidates.indices.to_numpy(), minlength=len(candidates.dictionary))
    redacted_texts = []
    for text, occurrence_count in zip(candidates.dictionary.to_pylist(), occurrences.tolist(), strict=True):
        redacted_text, text_counts = redact_text(text, kinds)
        redacted_texts.append(redacted_text)
        for kind, match_count in text_counts.items():
            counts[kind] += match_count * occurrence_count
    if not counts:
        return texts, counts
    redacted = pa.array(redacted_texts, texts.type).take(candidates.indices)
    return pc.replace_with_mask(texts, candidate_mask, redacted), counts
