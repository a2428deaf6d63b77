"""Secret keys in texts: formats of known services, values after words such as password, private keys, URL passwords.

Formats come from detect-secrets, and from the table below where it has none, or one whose time is quadratic. All of
them are one expression that starts only where a token starts, so a text is scanned once, in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

_DETECTORS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "DiscordBotTokenDetector", "GitHubTokenDetector",
    "GitLabTokenDetector", "MailchimpDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
"""Classes of detect-secrets that know a format; those that judge by entropy or key words are left out."""

_EXTRA_FORMATS = (
    r"github_pat_[A-Za-z0-9_]{60,120}",
    r"sk-(?:proj-|ant-|svcacct-|admin-|or-)?(?=[A-Za-z_-]{0,60}\d)[A-Za-z0-9_-]{20,250}",  # OpenAI, Anthropic
    r"AIza[0-9A-Za-z_-]{35}", r"ya29\.[0-9A-Za-z_-]{20,400}", r"GOCSPX-[0-9A-Za-z_-]{20,40}",  # Google
    r"hf_[A-Za-z0-9]{30,60}", r"gsk_[A-Za-z0-9]{40,80}", r"xai-[A-Za-z0-9]{40,100}", r"r8_[A-Za-z0-9]{30,50}",
    r"pplx-[A-Za-z0-9]{30,80}", r"nvapi-[A-Za-z0-9_-]{40,100}",  # and others by prefix
    r"npm_[A-Za-z0-9]{36}", r"rubygems_[0-9a-f]{48}", r"(?:sk|rk|pk)_(?:live|test)_[0-9A-Za-z]{16,120}",
    r"whsec_[A-Za-z0-9+/=]{24,80}", r"shp(?:at|ca|pa|ss)_[0-9A-Fa-f]{32}", r"do[opr]_v1_[0-9a-f]{64}",
    r"key-[0-9a-f]{32}", r"dapi[0-9a-f]{32}", r"hvs\.[A-Za-z0-9_-]{24,120}", r"ATATT3[A-Za-z0-9_=-]{50,250}",
    r"xapp-\d-[A-Z0-9]{8,20}-\d{8,20}-[0-9a-f]{32,80}", r"lin_api_[A-Za-z0-9]{32,60}", r"ntn_[A-Za-z0-9]{40,60}",
    r"eyJ[A-Za-z0-9_=-]{8,2000}\.eyJ[A-Za-z0-9_=-]{4,8000}(?:\.[A-Za-z0-9_=-]{0,2000})?",  # JSON Web Tokens
)  # fmt: skip

_PRIVATE_KEY_PATTERN = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
_URL_PASSWORD_PATTERN = re.compile(r"://[^\s:/?#@\[\]]{0,128}:([^\s/?#@\[\]]{1,128})@")
_SLACK_HOOK_PATTERN = re.compile(r"hooks\.slack\.com/services/([A-Za-z0-9_/]{20,120})")

_KEY_WORDS = (
    "key", "token", "secret", "password", "passwd", "passphrase", "passcode", "pwd", "passwort", "kennwort",
    "contraseña", "clave", "mot de passe", "senha", "пароль", "密码", "密碼", "口令", "パスワード", "비밀번호", "암호",
    "รหัสผ่าน", "पासवर्ड", "كلمة المرور", "كلمة السر",
)  # fmt: skip
_ASSIGNMENT_PATTERN = re.compile(
    r"(?:" + "|".join(_KEY_WORDS) + r")(?:_id)?[\"'`\])]{0,2}\s{0,2}"
    r"(?:=>|:=|=|:|：|(?:is|ist|es|est|是|为|為|は|は、|는|은|คือ)(?![A-Za-z]))\s{0,3}[\"'`「]?"
    r"([A-Za-z0-9!#$%&*+,./:;=?@^_~|-]{6,512})",
    re.IGNORECASE,
)
_BEARER_PATTERN = re.compile(r"bearer[ :：]{1,3}([A-Za-z0-9._~+/=-]{16,4000})", re.IGNORECASE)


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
    return is_long or any(char.isdecimal() or char in "!#$%&*+=?@^~" for char in value)


def find_keys(text: str) -> Iterator[tuple[int, int]]:
    """Spans of secrets; of an assignment, an authorization header or a URL only the secret itself."""
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in _PRIVATE_KEY_PATTERN.finditer(text))
    yield from (match.span() for match in _load_format_pattern().finditer(text))
    for pattern, literal in ((_URL_PASSWORD_PATTERN, "://"), (_SLACK_HOOK_PATTERN, "hooks.slack")):
        if literal in text:
            yield from (match.span(1) for match in pattern.finditer(text))
    lower_text = text.lower()
    if "bearer" in lower_text:
        yield from (match.span(1) for match in _BEARER_PATTERN.finditer(text))
    if any(word in lower_text for word in _KEY_WORDS):
        for match in _ASSIGNMENT_PATTERN.finditer(text):
            value = match[1].rstrip(".,;:!?")
            if _is_random_value(value):
                yield match.start(1), match.start(1) + len(value)
