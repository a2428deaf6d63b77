"""Patterns and words of redaction (rluf.prepare.redact): formats of keys, words for passwords, identity numbers."""

from __future__ import annotations

import re

# Vowels of Devanagari, Thai and Arabic are signs above or below a letter; Python does not count these as \w.
COMBINING_MARKS = r"\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u064b-\u0652"

DETECTORS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "DiscordBotTokenDetector", "GitHubTokenDetector",
    "GitLabTokenDetector", "MailchimpDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
"""Classes of detect-secrets that know a format; those that judge by entropy or key words are left out."""

EXTRA_FORMATS = (
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

PRIVATE_KEY_PATTERN = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
URL_PASSWORD_PATTERN = re.compile(r"://[^\s:/?#@\[\]]{0,128}:([^\s/?#@\[\]]{1,128})@")
HOOK_PATTERN = re.compile(r"(?:hooks\.slack\.com/services|/api/webhooks)/([A-Za-z0-9_/-]{20,120})")

_PASSWORD_WORDS = (
    "password", "passwd", "passphrase", "passcode", "pass word", "pwd", "passwort", "kennwort",
    "contrase[ñn]a", "clave", "mot de passe", "senha", "palavra[ -]passe", "schlüssel", "geheimzahl",
    "wachtwoord", "hasło", "şifre", "parola", "lösenord", "mật khẩu", "kata sandi", "пароль", "密码", "密碼",
    "口令", "パスワード", "パスは", "パスが", "暗証番号", "비밀번호", "비번", "패스워드", "암호", "รหัสผ่าน",
    "พาสเวิร์ด", "पासवर्ड", "كلم[ةه] (?:ال)?(?:مرور|سر)", "ال(?:رقم|رمز) السري", "باسوو?رد", "סיסמ[הא]",
    # Short words need a sign after them, and no letter around them.
    "(?<![a-z])(?:pass|pw|pin)(?: ?code| number)?(?![a-z])", "(?<![а-я])пин(?:-?код)?(?![а-я])",
)  # fmt: skip
SHORT_WORD_PATTERN = re.compile(r"(?:pass|pw|pin|пин)(?: ?code| number|-?код)?")
_KEY_WORDS = (
    "key|token|secret|密钥|密鑰|秘钥|令牌|キー|トークン|키|토큰|ключ|токен|clé|chave|clave|schlüssel"
    "|مفتاح|คีย์|โทเค็น|कुंजी|टोकन"
)
STEMS = (
    *_KEY_WORDS.split("|"), "pass", "pw", "pin", "kennwort", "contrase", "senha", "geheimz", "wachtw", "hasło",
    "şifre", "parola", "lösen", "mật", "kata", "пароль", "пин", "密", "口令", "パス", "暗証", "비", "패스",
    "암호", "รหัส", "พาส", "पास", "كلم", "السري", "باسو", "סיסמ",
)  # fmt: skip
"""In a text without any of these no word above occurs; to look for them is a tenth of the work."""
_SIGN = r"(?:[=-]?>|→|:=|=|:|：| [-|–—] |是|为|為|改成|改为|设为|設為|は|は、|が|는|은|이|가|คือ|هي|هو|है)"
_VERB = r"(?:is|ist|lautet|es|est|é|è|to|היא)(?![A-Za-z])(?:\s?:)?"
_CLOSING = r"(?:_id)?[\"'`\])*\\]{0,4}\s{0,2}"
_OPENING = r"[\s\"'`*\\(「『“„‘«]{0,5}"
ASSIGNMENT_PATTERN = re.compile(
    rf"(?:{_KEY_WORDS})(?:(?: de)? api)?{_CLOSING}(?:({_SIGN}|{_VERB}){_OPENING}|(?<=\s)(?=[A-Za-z0-9]{{20}}))"
    r"([A-Za-z0-9!#$%&*+,./:;=?@^_~|-]{6,512})",
    re.IGNORECASE,
)
PASSWORD_WORD_PATTERN = re.compile("|".join(_PASSWORD_WORDS))
# A password in Latin, Greek or Cyrillic letters: where words have no spaces, it ends where its alphabet does.
_PASSWORD = rf"{_OPENING}([a-zß-öø-ɏα-ωа-яё0-9!#$%&*+,./:;=?@^_~|-]{{4,512}})"
PASSWORD_PATTERN = re.compile(
    rf"{_CLOSING}(?:({_SIGN}|{_VERB})|([ \w()（）{COMBINING_MARKS}]{{0,24}}?(?:\s?{_SIGN}|\s{_VERB})))?{_PASSWORD}"
)
"""After one of these words a value counts without a sign between, and one of digits after an ASCII word only with a
sign. Up to 24 characters may come before the sign: the password of the guest network is ... All match text in lower
case, which takes half the time of patterns that ignore case."""
NEAR_PASSWORD_PATTERN = re.compile(rf"{_CLOSING}({_SIGN}|{_VERB})?(\Z.)?{_PASSWORD}")
"""The same without characters before the sign, which takes a twentieth of the time."""
HEADER_PATTERN = re.compile(
    r"(?:bearer[ :：]{1,3}(?=[A-Za-z0-9._~+/=-]{16})|authorization[\"']?[ :=]{1,3}[\"']?(?:basic|token|apikey) {1,2})"
    r"([A-Za-z0-9._~+/=-]{8,4000})",
    re.IGNORECASE,
)

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
    "letter": r"[A-Z]{1,2}\d{6,9}(?:\([0-9A]\))?",
    "word": r"\d{1,4}(?:[ -]?\d{1,6}){1,4}",
}
"""Written forms of identity numbers, by module of python-stdnum; `letter` and `word`: forms that count
only after the name of a number."""
_ID_END = r"(?![A-Za-z0-9]|-\d)"
ID_PATTERN = re.compile(
    "(?:" + "|".join(f"(?P<{name}>{form})" for name, form in _ID_FORMATS.items()) + ")" + _ID_END, re.ASCII
)
_OWN_FORMS = [form for name, form in _ID_FORMATS.items() if name not in ("letter", "word")]
ID_FORM_PATTERN = re.compile(rf"(?:{'|'.join(_OWN_FORMS)}){_ID_END}", re.ASCII)
_ID_START = r"[0-9A-Z](?<![A-Za-z0-9.-].)(?=[0-9A-Z]{2}|\d?[ -]?\d{2})"
ID_START_PATTERN = re.compile(_ID_START)
"""Where an identity number may start; tried at each position of a text, the forms above would take too long."""
ID_FORM_START_PATTERN = re.compile(rf"{_ID_START}(?<=(?={ID_FORM_PATTERN.pattern}).)", re.ASCII)
"""Where a number of a national form starts: finds a start and looks back at it, so that no start costs a call."""
ID_CONTEXTS = (
    # A number after its name counts even if its check digit is wrong or it was never issued: people mistype.
    (r"\d{9}", r"(?<![a-z])ssn(?![a-z])|social security"),
    (r"\d{17}[\dXx]|\d{15}|[A-Z]{1,2}\d{6}(?:\([0-9A]\)|[0-9A])|[A-Z][12]\d{8}",
     r"身份[证證証]|身分[證証]|(?<![a-z])hkid"),
    (r"\d{12}", r"マイナンバー|個人番号|(?<![a-z])my number"),
    (r"\d{13}", r"주민등록번호|주민번호|외국인등록번호"),
    (r"\d{13}", r"ประชาชน|เลขประจำตัว"),
    (r"\d{12}", r"aadha+r|आधार"),
    (r"\d{11}", r"(?<![a-z])cpf(?![a-z])"),
    (r"\d{9}", r"(?<![a-z])nif(?![a-z])|contribuinte"),
    (r"\d{11}", r"steuer(?:nummer)?-?id|identifikationsnummer|(?<![a-z])idnr"),
    (r"\d{11}", r"(?<![a-z])pesel"),
    (r"\d{8,9}", r"(?<![a-z])bsn(?![a-z])|burgerservicenummer"),
    (r"\d{11}", r"kimlik|(?<![a-z])tckn"),
    (r"\d{10}", r"(?<![a-z])nhs(?![a-z])"),
    (r"\d{13}|\d{15}", r"s[eé]curit[eé] sociale|(?<![a-z])nir(?![a-z])"),
    (r"\d{10}", r"الهوية|هويتي|الإقامة|الاقامة|إقامتي"),
    (r"\d{14}", r"الرقم القومي|رقم قومي"),
)  # fmt: skip
"""Forms of identity numbers without signs in them, and the names that come before them."""


ASCII_ID_WORDS = (
    "aadha", "bsn", "hkid", "burgerservicenummer", "cpf", "identifikationsnummer", "idnr", "kimlik", "my number", "nhs",
    "nir", "nif", "contribuinte", "pesel", "securite sociale", "social security", "ssn", "steuer", "tckn",
)  # fmt: skip
"""In each ASCII text that one of the contexts matches is one of these; to look for them is a tenth of the work."""
