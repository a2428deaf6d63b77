"""Recall of redaction by kind and language, false positives on clean messages, and time on hostile messages.

Personal data of every documented kind, in the written forms of several countries and services, stand in sentences of
eleven languages, with and without spaces around them (redaction_sentences.py has sentences written apart from them).
Clean messages are full of numbers, codes and addresses that are
not personal data. Hostile messages of 1 MiB repeat the start of a pattern. Prints one JSON line last.

python benchmarks/redaction.py [--secrets 60] [--clean 20000]
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from rluf.config.data import PrepareSettings
from rluf.prepare.redact import redact_array, redact_text

KINDS: tuple[str, ...] = PrepareSettings().redact
LANGUAGES = ("en", "de", "es", "ru", "ar", "zh", "ja", "ko", "th", "hi", "pt")
SENTENCES = {
    "en": ("write to {} please", "my data: {}.", "({})", "is it {}, or not?"),
    "de": ("meine Angabe ist {}, danke", "bitte {} löschen", "({})"),
    "es": ("mis datos: {}.", "¿es {} correcto?", "usa {} por favor"),
    "ru": ("мои данные: {}.", "это {}, спасибо", "вот{}это"),
    "ar": ("بياناتي: {}.", "هذا {} شكرا", "هو{}نعم"),
    "zh": ("请记住{}谢谢", "我的是{}。", "资料：{}，好吗"),
    "ja": ("私のは{}です", "「{}」をお願いします", "情報：{}。"),
    "ko": ("제 것은 {}입니다", "정보:{}예요", "이건{}요"),
    "th": ("ของฉันคือ{}ครับ", "ข้อมูล{}ค่ะ", "นี่ {} นะ"),
    "hi": ("मेरा डेटा {} है", "यह{}हटा दो", "जानकारी: {}।"),
    "pt": ("os meus dados: {}.", "é {} mesmo?", "usa {} por favor"),
}
PHONE_WORDS = {
    "en": "phone number: ",
    "de": "Telefon: ",
    "es": "teléfono: ",
    "ru": "телефон: ",
    "ar": "رقم الهاتف: ",
    "zh": "电话",
    "ja": "電話番号は",
    "ko": "전화번호는 ",
    "th": "เบอร์โทร",
    "hi": "फोन नंबर: ",
    "pt": "telefone: ",
}
PASSWORD_WORDS = {
    "en": "password: ",
    "de": "Passwort: ",
    "es": "contraseña: ",
    "ru": "пароль: ",
    "ar": "كلمة المرور: ",
    "zh": "密码：",
    "ja": "パスワード：",
    "ko": "비밀번호: ",
    "th": "รหัสผ่าน: ",
    "hi": "पासवर्ड: ",
    "pt": "senha: ",
}
PHONES = {
    "en": ("+1 415 555 {4}", "(212) 555-{4}", "303-555-{4}", "+44 20 79{2} {4}"),
    "de": ("+49 30 2{7}", "+49 151 2{7}", "030 2{3} {4}", "0151 2{7}"),
    "es": ("+34 612 {3} {3}", "612 {2} {2} {2}", "+52 55 1{3} {4}", "93 4{2} {2} {2}"),
    "ru": ("+7 912 {3}-{2}-{2}", "8 (912) {3}-{2}-{2}", "+7912{7}"),
    "ar": ("+20 100 {3} {4}", "0100 {3} {4}", "+966 50 {3} {4}", "050 {3} {4}"),
    "zh": ("138{8}", "139 {4} {4}", "+86 138 {4} {4}", "010-6{7}", "１３８{8w}"),
    "ja": ("090-{4}-{4}", "03-3{3}-{4}", "+81 90 {4} {4}", "080{8}"),
    "ko": ("010-2{3}-{4}", "+82 10 2{3} {4}", "010 3{3} {4}", "02-312-{4}"),
    "hi": ("98{8}", "+91 98{3} {2}{3}", "098{8}", "98{3} {2}{3}"),
    "pt": ("(11) 98{3}-{4}", "+55 21 98{3}-{4}", "912 {3} {3}", "+351 91{2} {3} {2}"),
    "th": ("081-2{2}-{4}", "+66 81 2{2} {4}", "0812{6}", "02-2{2}-{4}"),
}
ALPHANUMERIC = string.ascii_letters + string.digits
KEY_FORMATS = (
    "sk-proj-{A48}",
    "sk-ant-api03-{A60}",
    "ghp_{A36}",
    "github_pat_{A22}_{A59}",
    "AKIA{U16}",
    "AIza{A35}",
    "hf_{A34}",
    "xoxb-{D12}-{D12}-{A24}",
    "glpat-{A20}",
    "npm_{A36}",
    "sk_live_{A24}",
    "SG.{A22}.{A43}",
    "eyJ{A30}.eyJ{A60}.{A43}",
    "https://user:{A14}@host.example/x",
    "Authorization: Bearer {A40}",
    "aws_secret_access_key = {A40}",
    "api_key='{A32}'",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\n{A60}",
    "-----BEGIN RSA PRIVATE KEY-----\n{A60}\n-----END RSA PRIVATE KEY-----",
    "AccountKey={A86}==",
    "{D9}:AA{A33}",
    "dapi{H32}",
    "hvs.{A24}",
)


class SecretGenerator:
    """Random personal data: the text to insert, and the part of it that must not be left."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def make_digits(self, count: int) -> str:
        """Random digits."""
        return "".join(self.rng.choices(string.digits, k=count))

    def make_email(self, language: str) -> tuple[str, str]:
        """An address, also with an international domain, in full-width characters, or spelled out."""
        name = self.rng.choice(["bob", "j.smith", "anna_k", "x+tag", "1st-mail"]) + self.make_digits(2)
        domain = self.rng.choice(
            ["example.com", "mail.example.co.uk", "a-b.org", "post.example", "例え.jp", "müller.de"]
        )
        address = f"{name}@{domain}"
        forms = [
            address,
            address.upper(),
            f"{name} (at) example (dot) com",
            "".join(map(build_full_width_form, f"{name}@example.com")),
        ]
        text = self.rng.choices(forms, [6, 1, 1, 1])[0]
        return text, text

    def make_phone(self, language: str) -> tuple[str, str]:
        """A number as it is written in the countries of the language, after a word for phone."""
        text = self.rng.choice(PHONES[language])
        for count in "2", "3", "4", "6", "7", "8":
            while f"{{{count}}}" in text:
                text = text.replace(f"{{{count}}}", self.make_digits(int(count)), 1)
        text = text.replace("{8w}", "".join(map(build_full_width_form, self.make_digits(8))))
        is_international = text.startswith("+")
        return (text if is_international and self.rng.random() < 0.5 else PHONE_WORDS[language] + text), text

    def make_card(self, language: str) -> tuple[str, str]:
        """A card number of a network, with or without groups; sometimes with its security code."""
        prefix, length = self.rng.choice(
            [("4", 16), ("51", 16), ("55", 16), ("6011", 16), ("34", 15), ("37", 15), ("62", 16)]
        )
        body = prefix + self.make_digits(length - 1 - len(prefix))
        number = body + compute_luhn_digit(body)
        size = self.rng.choice([0, 4])
        groups = [number] if not size else [number[n : n + 4] for n in range(0, len(number), 4)]
        text = self.rng.choice([" ", "-", "."] if length == 16 else [" ", "-"]).join(groups)
        if self.rng.random() < 0.2:
            code = self.make_digits(3)
            return f"{text} cvv {code}", f"cvv {code}"
        return text, text

    def make_iban(self, language: str) -> tuple[str, str]:
        """An account number of a country, with or without groups, in upper or lower case."""
        bodies = {
            "DE": self.make_digits(18),
            "FR": self.make_digits(23),
            "GB": "WEST" + self.make_digits(14),
            "NL": "ABNA" + self.make_digits(10),
            "ES": None,
            "SA": self.make_digits(20),
            "PL": self.make_digits(24),
        }
        country = self.rng.choice([name for name, body in bodies.items() if body])
        body = bodies[country] or ""
        number = "".join(str(int(char, 36)) for char in f"{body}{country}00")
        text = f"{country}{98 - int(number) % 97:02d}{body}"
        form = self.rng.choice(["plain", "groups", "lower"])
        if form == "groups":
            text = " ".join(text[n : n + 4] for n in range(0, len(text), 4))
        return (text.lower() if form == "lower" else text,) * 2

    def make_ip(self, language: str) -> tuple[str, str]:
        """An address of version 4 or 6."""
        ipv4 = ".".join(str(self.rng.randrange(1, 223)) for _ in range(4)).replace("127.", "128.")
        groups = [f"{self.rng.randrange(1, 65535):x}" for _ in range(8)]
        return (self.rng.choice([ipv4, ipv4, ":".join(groups), f"2001:db8::{groups[0]}:{groups[1]}"]),) * 2

    def make_id(self, language: str) -> tuple[str, str]:
        """A national identity number with valid check digits, in its usual form, after its name where it is bare."""
        return make_id_number(self)

    def make_key(self, language: str) -> tuple[str, str]:
        """A secret key of a service, a password, or a private key."""
        if self.rng.random() < 0.1:
            password = "".join(self.rng.choices(string.ascii_lowercase, k=7)) + self.make_digits(2)
            return PASSWORD_WORDS[language] + password, password
        text = self.rng.choice(KEY_FORMATS)
        secret = text
        alphabets = {
            "A": ALPHANUMERIC,
            "U": string.ascii_uppercase + string.digits,
            "D": string.digits,
            "H": "0123456789abcdef",
        }
        while "{" in text:
            start, end = text.index("{"), text.index("}")
            alphabet, count = alphabets[text[start + 1]], int(text[start + 2 : end])
            value = "".join(self.rng.choices(alphabet, k=count))
            secret = value if count > 9 else secret
            text = text[:start] + value + text[end + 1 :]
        return text, secret


def build_full_width_form(char: str) -> str:
    """The full-width form of an ASCII character."""
    return chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char


def compute_luhn_digit(body: str) -> str:
    """Check digit of a card number."""
    from stdnum import luhn

    return str(luhn.calc_check_digit(body))


def make_id_number(generator: SecretGenerator) -> tuple[str, str]:
    """Try random digits of a country's form until python-stdnum accepts them."""
    from importlib import import_module

    forms: list[tuple[str, Callable[[str], str], str]] = [
        ("us.ssn", lambda d: f"{d[:3]}-{d[3:5]}-{d[5:9]}", ""),
        ("us.ssn", lambda d: d[:9], "SSN "),
        ("cn.ric", lambda d: f"110105{1950 + int(d[:2]) % 50}{1 + int(d[2]):02d}1{d[3]}{d[4:8]}", ""),
        ("kr.rrn", lambda d: f"8{d[0]}0{1 + int(d[1]) % 9}1{d[2]}-1{d[3:9]}", ""),
        ("br.cpf", lambda d: f"{d[:3]}.{d[3:6]}.{d[6:9]}-{d[9:11]}", ""),
        ("br.cpf", lambda d: d[:11], "CPF: "),
        ("in_.aadhaar", lambda d: f"{d[:4]} {d[4:8]} {d[8:12]}", ""),
        ("th.pin", lambda d: f"{1 + int(d[0]) % 8}-{d[1:5]}-{d[5:10]}-{d[10:12]}-{d[12]}", ""),
        ("jp.in_", lambda d: f"{d[:4]} {d[4:8]} {d[8:12]}", "マイナンバー"),
        ("de.idnr", lambda d: d[:11], "Steuer-ID "),
        ("pl.pesel", lambda d: f"8{d[0]}0{1 + int(d[1]) % 9}1{d[2:8]}", "PESEL "),
        ("nl.bsn", lambda d: d[:9], "BSN "),
        ("es.dni", lambda d: d[:8] + "TRWAGMYFPDXBNJZSQVHLCKE"[int(d[:8]) % 23], ""),
    ]
    module, form, word = generator.rng.choice(forms)
    validate = import_module(f"stdnum.{module}").is_valid
    for _ in range(20000):
        number = form(generator.make_digits(13))
        if validate(number):
            return word + number, number
    raise RuntimeError(f"no valid number of {module}")


def make_clean_message(rng: random.Random) -> str:
    """A message with numbers, dates, code and addresses that are not personal data."""
    number = [rng.randrange(10 ** rng.randrange(1, 13)) for _ in range(8)]
    year, month, day, hour, minute = rng.randrange(1900, 2030), *(rng.randrange(1, 28) for _ in range(2)), 11, 45
    words = ["order", "总数", "合計", "합계", "ทั้งหมด", "Summe", "precio", "итого", "المجموع", "page", "room"]
    forms = [
        f"{year}-{month:02d}-{day:02d} {hour}:{minute}:{month:02d}",
        f"{day}.{month}.{year}",
        f"{month}/{day}/{year}",
        f"from {year} to {year + 5}, {year}-{year + 5}",
        f"{number[0]:,} and {number[1]:,}",
        f"{number[2] / 1000:.3f} km",
        f"#{number[3]}",
        f"v{month}.{day}.{hour}",
        f"version {month}.{day}.{hour}.{minute}",
        f"{day}:{minute} vs {month}:{day}",
        f"3.14159265358979 * {number[4]}",
        f"[{', '.join(map(str, number[:6]))}]",
        f"{month}-{day}-{hour}-{minute}",
        f"x[{day}:{minute}] = a::b::c",
        f"ISBN 978-3-16-{number[5] % 10**6:06d}-0",
        f"{number[6] % 10**8:08d}",
        f"{rng.getrandbits(128):032x}",
        str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        f"@user{day} wrote",
        f"npm i react@{month}.{day}.0",
        "git@github.com:org/repo.git",
        "https://example.com/a/b?c=1",
        f"$ {day}.{month:02d}",
        f"{day} x {month} = {day * month}",
        f"{number[7]}%",
        f"{day}th of {month}",
        f"the password is required, min {day} characters",
        "the key is under the mat",
        "a secret: be kind",
        f"token count: {number[0]}",
        f"{rng.uniform(-90, 90):.6f}, {rng.uniform(-180, 180):.6f}",
        f"ID {number[1]}",
        f"chapter {month}.{day}.{hour}",
        f"call me at {hour}",
        f"{day} {month} {hour} {minute} {day}",
        f"100 000 {day}00",
        f"2 000 000 000 {words[0]}",
        "sk-learn-contrib-package-name",
        f"MAC 0{day % 10}:1a:2b:3c:4d:5e",
        "127.0.0.1:8080",
        f"1.{day}e{month}",
        f"{year}{month:02d}{day:02d}",
        f"flight LH{day}{month}{minute}",
        f"ABC{number[2]}",
        f"{day}°{minute}′N",
        f"score {month}-{day} {day}-{month} {hour}-{minute}",
    ]
    return " ".join(f"{rng.choice(words)} {rng.choice(forms)}" for _ in range(rng.randrange(1, 4)))


HOSTILE_UNITS = (
    "://",
    "a@",
    "a@a.",
    "1 ",
    "1",
    "123456789012 ",
    "1.1.1.1 ",
    "1-",
    "eyJ",
    "sk-a1-",
    "DE89 3704 ",
    "DE89" + "A" * 40 + " ",
    "::",
    "ab:cd:",
    "212-555-1234 ",
    "+1 415 555 2671 ",
    "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN AAAA",
    "key:",
    "password is ",
    "M",
    "请联系",
    "１２３４５６７ ",
    "4111 1111 1111 1111 ",
    "aws key ",
    "a (at) b ",
    "ssn 123-45-6789 ",
    "call ",
    "1\u200b",
    "bearer a1a1a1a1a1a1a1a1a ",
    "aaaa@bbbb.cc ",
    "(((((",
    "://a:b@",
    "0123456789abcdef",
    "ABCDEFGHIJ ",
    "电话 12345678901 ",
    ".",
    "_",
    "password is a ",
    "password of the a ",
    "パスは",
    " arroba a ponto ",
    ") punkt (a",
    "IBAN",
    "ip1.1.1.1 ",
    "900101-1234567 ",
    "A1234567 ",
    "संपर्क",
)


def measure_recall(secrets_per_cell: int, seed: int = 7) -> dict[str, dict[str, float]]:
    """Share of secrets of which nothing is left, by kind and language."""
    generator = SecretGenerator(seed)
    recall: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        recall[kind] = {}
        for language in LANGUAGES:
            texts, secrets = [], []
            for _ in range(secrets_per_cell):
                text, secret = getattr(generator, f"make_{kind}")(language)
                texts.append(generator.rng.choice(SENTENCES[language]).format(text))
                secrets.append(secret)
            redacted = redact_array(pa.array(texts), KINDS)[0].to_pylist()
            hits = sum(secret not in text for secret, text in zip(secrets, redacted, strict=True))
            recall[kind][language] = round(hits / secrets_per_cell, 3)
    return recall


def measure_false_positives(message_count: int, seed: int = 8) -> tuple[float, list[str]]:
    """Redactions per 1,000 clean messages, and examples."""
    rng = random.Random(seed)
    texts = [make_clean_message(rng) for _ in range(message_count)]
    counts: Counter[str] = redact_array(pa.array(texts), KINDS)[1]
    examples = [redact_text(text, KINDS)[0] for text in texts if redact_text(text, KINDS)[1]]
    return 1000 * counts.total() / message_count, examples[:10]


def measure_hostile_seconds(size: int = 2**20) -> dict[str, float]:
    """CPU seconds for each hostile message."""
    seconds = {}
    for unit in HOSTILE_UNITS:
        text = (unit * (size // len(unit) + 1))[:size]
        start = time.process_time()
        redact_text(text, KINDS)
        seconds[unit] = round(time.process_time() - start, 3)
    return seconds


def main() -> None:
    """Print recall by kind, false positives, and the slowest hostile messages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--secrets", type=int, default=60)
    parser.add_argument("--clean", type=int, default=20000)
    args = parser.parse_args()
    recall = measure_recall(args.secrets)
    for kind, by_language in recall.items():
        sys.stdout.write(f"{kind:6} {sum(by_language.values()) / len(by_language):.3f} {json.dumps(by_language)}\n")
    false_positives, examples = measure_false_positives(args.clean)
    sys.stdout.write(f"false positives per 1,000 clean messages: {false_positives:.2f} {examples}\n")
    seconds = sorted(measure_hostile_seconds().items(), key=lambda item: -item[1])
    sys.stdout.write(f"slowest hostile messages of 1 MiB: {seconds[:5]}\n")
    report: dict[str, Any] = {
        "benchmark": "redaction",
        "recall": recall,
        "false_positives_per_1000": round(false_positives, 3),
        "hostile_seconds": seconds[0][1],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
