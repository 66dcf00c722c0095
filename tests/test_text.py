"""The Unicode policy: what is mended, and what must be left alone."""

import random
import unicodedata

import pytest

from f2llm.errors import UsageError
from f2llm.text import clean

HIGH, LOW, LOST = "\ud83d", "\ude00", "\ufffd"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301", "é"),
        ("\u1112\u1161\u11ab", "한"),
        ("\u212b", "Å"),
        (HIGH + LOW, "😀"),
        (HIGH, LOST),
        (LOW, LOST),
        (LOW + HIGH, LOST * 2),
        (HIGH + HIGH + LOW + LOW, LOST + "😀" + LOST),
        (f"a{HIGH}e\u0301", f"a{LOST}é"),
        ("a\u0300" + LOW, "à" + LOST),
    ],
)
def test_mended(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\r\n two  spaces\u00a0\u3000",
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
        "\u200fשלום\u200e (abc) \u202bمرحبا\u202c",
        "ﬁ Ⅳ ① ｱ",  # compatibility forms mean something; NFC keeps them
        "\ufeffx\x00",
    ],
)
def test_left_alone(text: str) -> None:
    assert clean(text) == text


def test_any_sequence_becomes_well_formed_nfc() -> None:
    def naive(text: str) -> str:
        joined, place = "", 0
        while place < len(text):
            one, two = text[place], text[place + 1 : place + 2]
            if "\ud800" <= one <= "\udbff" and two and "\udc00" <= two <= "\udfff":
                joined += chr(0x10000 + ((ord(one) - 0xD800) << 10) + ord(two) - 0xDC00)
                place += 1
            else:
                joined += LOST if "\ud800" <= one <= "\udfff" else one
            place += 1
        return unicodedata.normalize("NFC", joined)

    draw = random.Random(0)
    letters = ["a", "e", "\u0301", "\u0323", "\u1100", "\u1161", "\U0001f600", HIGH, "\udbff", LOW, "\udfff"]
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randrange(9)))
        assert clean(text) == naive(text)
        assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("value", [None, 5, b"bytes", ["list"]])
def test_only_strings(value: object) -> None:
    with pytest.raises(UsageError, match=f"must be a string, got {type(value).__name__}"):
        clean(value)  # type: ignore[arg-type]
