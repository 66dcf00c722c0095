"""E-mail addresses, phone numbers and secrets in texts: found by their form, and by check digits where they have some.

texts of Arrow -> a cheap pattern picks those that may hold one -> the exact pattern and check on these alone. What is
found is a form, not a person: an example address is found as well, and a phone number without the code of its country
is not, since any seven digits may be one.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc


class Kind(NamedTuple):
    """One kind of personal data."""

    name: str
    """In words, as reasons have it."""
    hint: str
    """RE2: whatever the pattern matches lies in a text with a match of this."""
    pattern: re.Pattern[str]
    is_one: Callable[[str], bool] = lambda found: True
    """Whether what the pattern matched is one."""

    @property
    def mask(self) -> str:
        """What stands where one was found."""
        return f"<{self.name.upper()}>"


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


def luhn(number: str) -> bool:
    """Whether the last digit of a card's number checks the others (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(number))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _is_card(found: str) -> bool:
    number = _digits(found)
    return len(set(number)) > 1 and luhn(number)


def is_iban(found: str) -> bool:
    """Whether the check digits are right (ISO 13616; ISO 7064, MOD 97-10)."""
    number = found.replace(" ", "").upper()
    return (
        15 <= len(number) <= 34 and int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1
    )


def _is_phone(found: str) -> bool:
    return 8 <= len(_digits(found).removeprefix("00")) <= 15  # ITU-T E.164: at most 15


_LABEL = r"(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
_KEYS = (
    rf"-----BEGIN {_LABEL}(?:[\s\S]*?-----END {_LABEL})?",  # PEM and OpenPGP
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"\bgh[pousr]_[A-Za-z0-9]{36,}\b",  # GitHub
    r"\bgithub_pat_[A-Za-z0-9_]{22,}\b",
    r"\bglpat-[A-Za-z0-9_-]{20,}",  # GitLab
    r"\bhf_[A-Za-z0-9]{30,}\b",  # Hugging Face
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\bAIza[A-Za-z0-9_-]{35}",  # Google
    r"\b[rs]k_live_[A-Za-z0-9]{16,}\b",  # Stripe
    r"\bsk-[A-Za-z0-9_-]{32,}",  # OpenAI, Anthropic
    r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}",  # JSON web token
)

# ASCII: where no spaces stand between words, a letter of another script before an address or a number is no part of it.
KINDS: Mapping[str, Kind] = {
    "emails": Kind(
        "e-mail address",
        "@",
        re.compile(
            r"(?<![\w.+%-])[\w.+%-]{1,64}(?<!\.)@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24}(?![\w-])",
            re.ASCII | re.IGNORECASE,
        ),
    ),
    "phones": Kind(
        "phone number",
        r"(?:\+|00[ .-]?)[1-9]|\([0-9]{3}\) ?[0-9]",
        re.compile(
            r"(?<![\w+./-])"
            r"(?:(?:\+|00[ .-]?)[1-9](?:[ ./-]{0,2}\(?[0-9]{1,5}\)?){2,8}"  # with the code of a country
            r"|\([2-9][0-9]{2}\) ?[0-9]{3}[ .-][0-9]{4})"  # North America
            r"(?![\w+])",
            re.ASCII,
        ),
        _is_phone,
    ),
    "keys": Kind(
        "key",
        r"PRIVATE KEY|AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|hf_|xox[abeoprs]-|AIza|k_live_|sk-|eyJ",
        re.compile("|".join(_KEYS)),
    ),
    # 16 digits of Visa, Mastercard, Discover and others, 15 of American Express; in groups as they are printed.
    "cards": Kind(
        "card number",
        r"[2-6](?:[ -]?[0-9]){12}",
        re.compile(
            r"(?<![\w.,/+-])"
            r"(?:(?:[45][0-9]{3}|2[2-7][0-9]{2}|6(?:011|5[0-9]{2}|4[4-9][0-9]))(?:([ -]?)[0-9]{4})(?:\1[0-9]{4}){2}"
            r"|3[47][0-9]{2}([ -]?)[0-9]{6}\2[0-9]{5})"
            r"(?![\w-])",
            re.ASCII,
        ),
        _is_card,
    ),
    "ibans": Kind(
        "account number",
        r"[A-Z]{2}[0-9]{2} ?[0-9A-Z]{4}",
        re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?\b"),
        is_iban,
    ),
}


def holds(kind: Kind, texts: pa.LargeStringArray) -> pa.BooleanArray:
    """Whether each text has one of the kind."""
    return pc.not_equal(mask(kind, texts), texts)


def mask(kind: Kind, texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """The texts with `kind.mask` in the place of each."""
    may = pc.fill_null(pc.match_substring_regex(texts, kind.hint), False)
    if not pc.any(may).as_py():
        return texts
    masked = [
        kind.pattern.sub(lambda found: kind.mask if kind.is_one(found[0]) else found[0], text)
        for text in texts.filter(may).to_pylist()
    ]
    return pc.replace_with_mask(texts, may, pa.array(masked, pa.large_string()))
