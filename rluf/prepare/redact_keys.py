"""Secrets in texts: keys by the formats of their services, private keys, and what a text names as a password or key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

# Vowels of Devanagari, Thai and Arabic are signs above or below a letter; Python does not count these as \w.
COMBINING_MARKS = r"\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u064b-\u0652"

_DETECTORS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "DiscordBotTokenDetector", "GitHubTokenDetector",
    "GitLabTokenDetector", "MailchimpDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
"""Classes of detect-secrets that know a format; those that judge by entropy or key words are left out."""

_EXTRA_FORMATS = (
    r"github_pat_[A-Za-z0-9_]{60,120}",
    r"sk-(?:proj-|ant-|svcacct-|admin-|or-)?(?=[A-Za-z_-]{0,60}\d)[A-Za-z0-9_-]{20,250}",
    r"AIza[0-9A-Za-z_-]{35}", r"ya29\.[0-9A-Za-z_-]{20,400}", r"GOCSPX-[0-9A-Za-z_-]{20,40}",
    r"hf_[A-Za-z0-9]{30,60}", r"gsk_[A-Za-z0-9]{40,80}", r"xai-[A-Za-z0-9]{40,100}", r"r8_[A-Za-z0-9]{30,50}",
    r"pplx-[A-Za-z0-9]{30,80}", r"nvapi-[A-Za-z0-9_-]{40,100}", r"npm_[A-Za-z0-9]{36}",
    r"rubygems_[0-9a-f]{48}", r"(?:sk|rk|pk)_(?:live|test)_[0-9A-Za-z]{16,120}",
    r"whsec_[A-Za-z0-9+/=]{24,80}", r"shp(?:at|ca|pa|ss)_[0-9A-Fa-f]{32}", r"do[opr]_v1_[0-9a-f]{64}",
    r"key-[0-9a-f]{32}", r"dapi[0-9a-f]{32}", r"hvs\.[A-Za-z0-9_-]{24,120}", r"ATATT3[A-Za-z0-9_=-]{50,250}",
    r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}", r"tvly-[A-Za-z0-9-]{20,60}",
    r"sq0[a-z]{3}-[0-9A-Za-z_-]{22,50}", r"EAA[A-Za-z0-9]{60,250}", r"figd_[A-Za-z0-9_-]{40}",
    r"dckr_pat_[A-Za-z0-9_-]{27}", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{58}", r"xapp-\d-[A-Z0-9]{8,20}-\d{8,20}-[0-9a-f]{32,80}",
    r"lin_api_[A-Za-z0-9]{32,60}", r"ntn_[A-Za-z0-9]{40,60}",
    r"eyJ[A-Za-z0-9_=-]{8,2000}\.eyJ[A-Za-z0-9_=-]{4,8000}(?:\.[A-Za-z0-9_=-]{0,2000})?",
)  # fmt: skip

_PRIVATE_KEY_PATTERN = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
_URL_PASSWORD_PATTERN = re.compile(r"://[^\s:/?#@\[\]]{0,128}:([^\s/?#@\[\]]{1,128})@")
_HOOK_PATTERN = re.compile(r"(?:hooks\.slack\.com/services|/api/webhooks)/([A-Za-z0-9_/-]{20,120})")

_PASSWORD_WORDS = (
    "password", "passwd", "passphrase", "passcode", "pass word", "pwd", "passwort", "kennwort",
    "contrase[ñn]a", "clave", "mot de passe", "senha", "palavra[ -]passe", "schlüssel", "geheimzahl",
    "wachtwoord", "hasło", "şifre", "parola", "lösenord", "mật khẩu", "kata sandi", "пароль", "密码", "密碼",
    "口令", "パスワード", "パスは", "パスが", "暗証番号", "비밀번호", "비번", "패스워드", "암호", "รหัสผ่าน",
    "พาสเวิร์ด", "पासवर्ड", "كلم[ةه] (?:ال)?(?:مرور|سر)", "ال(?:رقم|رمز) السري", "باسوو?رد", "סיסמ[הא]",
    # Short words need a sign after them, and no letter around them.
    "(?<![a-z])(?:pass|pw|pin)(?: ?code| number)?(?![a-z])", "(?<![а-я])пин(?:-?код)?(?![а-я])",
)  # fmt: skip
_SHORT_WORD_PATTERN = re.compile(r"(?:pass|pw|pin|пин)(?: ?code| number|-?код)?")
_KEY_WORDS = (
    "key|token|secret|密钥|密鑰|秘钥|令牌|キー|トークン|키|토큰|ключ|токен|clé|chave|clave|schlüssel"
    "|مفتاح|คีย์|โทเค็น|कुंजी|टोकन"
)
_STEMS = (
    *_KEY_WORDS.split("|"), "pass", "pw", "pin", "kennwort", "contrase", "senha", "geheimz", "wachtw", "hasło",
    "şifre", "parola", "lösen", "mật", "kata", "пароль", "пин", "密", "口令", "パス", "暗証", "비", "패스",
    "암호", "รหัส", "พาส", "पास", "كلم", "السري", "باسو", "סיסמ",
)  # fmt: skip
"""In a text without any of these no word above occurs; to look for them is a tenth of the work."""
_SIGN = r"(?:[=-]?>|→|:=|=|:|：| [-|–—] |是|为|為|改成|改为|设为|設為|は|は、|が|는|은|이|가|คือ|هي|هو|है)"
_VERB = r"(?:is|ist|lautet|es|est|é|è|to|היא)(?![A-Za-z])(?:\s?:)?"
_CLOSING = r"(?:_id)?[\"'`\])*\\]{0,4}\s{0,2}"
_OPENING = r"[\s\"'`*\\(「『“„‘«]{0,5}"
_ASSIGNMENT_PATTERN = re.compile(
    rf"(?:{_KEY_WORDS})(?:(?: de)? api)?{_CLOSING}(?:({_SIGN}|{_VERB}){_OPENING}|(?<=\s)(?=[A-Za-z0-9]{{20}}))"
    r"([A-Za-z0-9!#$%&*+,./:;=?@^_~|-]{6,512})",
    re.IGNORECASE,
)
# A password in Latin, Greek or Cyrillic letters: where words have no spaces, it ends where its alphabet does.
_PASSWORD_PATTERN = re.compile(
    rf"({'|'.join(_PASSWORD_WORDS)}){_CLOSING}"
    rf"(?:({_SIGN}|{_VERB})|([ \w()（）{COMBINING_MARKS}]{{0,24}}?(?:\s?{_SIGN}|\s{_VERB})))?"
    rf"{_OPENING}([a-zß-öø-ɏα-ωа-яё0-9!#$%&*+,./:;=?@^_~|-]{{4,512}})"
)
"""After these words a value counts without a sign between, and one of digits after an ASCII word only with a sign. Up
to 24 characters may come before the sign: the password of the guest network is ... It matches text in lower case, which
takes half the time of one that ignores case."""
_HEADER_PATTERN = re.compile(
    r"(?:bearer[ :：]{1,3}(?=[A-Za-z0-9._~+/=-]{16})|authorization[\"']?[ :=]{1,3}[\"']?(?:basic|token|apikey) {1,2})"
    r"([A-Za-z0-9._~+/=-]{8,4000})",
    re.IGNORECASE,
)


@cache
def _load_format_pattern() -> re.Pattern[str]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    detector_by_name = {detector.__name__: detector for detector in get_mapping_from_secret_type_to_class().values()}
    formats = list(_EXTRA_FORMATS)
    for pattern in (pattern for name in _DETECTORS for pattern in detector_by_name[name].denylist):
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


def find_keys(text: str) -> Iterator[tuple[int, int]]:
    """Spans of secrets; of an assignment, an authorization header or a URL only the secret itself."""
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in _PRIVATE_KEY_PATTERN.finditer(text))
    yield from (match.span() for match in _load_format_pattern().finditer(text))
    for pattern, literal in ((_URL_PASSWORD_PATTERN, "://"), (_HOOK_PATTERN, "hooks")):
        if literal in text:
            yield from (match.span(1) for match in pattern.finditer(text))
    lower_text = text.lower()
    if "bearer" in lower_text or "authorization" in lower_text:
        for match in _HEADER_PATTERN.finditer(text):
            if match[0][0] in "bB" or _is_random_value(match[1]):
                yield match.span(1)
    if any(stem in lower_text for stem in _STEMS):
        if len(lower_text) != len(text):  # one letter became two, as in Turkish
            lower_text = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)
        yield from _find_assigned_values(text, lower_text)


def _find_assigned_values(text: str, lower_text: str) -> Iterator[tuple[int, int]]:
    """Spans of the values that a text, also given in lower case, names as a key or a password."""
    for match in _ASSIGNMENT_PATTERN.finditer(text):
        value = match[2].rstrip(".,;:!?*")
        is_bare_key = len(value) >= 20 and value.isalnum()
        if _is_random_value(value) and (match[1] or (is_bare_key and any(map(str.isdecimal, value)))):
            yield match.start(2), match.start(2) + len(value)
    for match in _PASSWORD_PATTERN.finditer(lower_text):
        value = text[match.start(4) : match.end(4)].rstrip(".,;:?*")
        is_short_word = _SHORT_WORD_PATTERN.fullmatch(match[1]) is not None
        if is_short_word and (match[2] is None or (match[1].startswith("pin") and not value.isdecimal())):
            continue
        has_sign = match[2] is not None or (value.isdecimal() and not match[1].isascii() and match[3] is None)
        if len(value) >= 4 and _is_password(value, has_sign=has_sign):
            yield match.start(4), match.start(4) + len(value)
