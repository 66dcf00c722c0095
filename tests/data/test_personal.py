"""Personal data: what is found, what only looks like it, and that texts are searched together as alone."""

import random

import pyarrow as pa
import pytest

from f2llm.data.personal import KINDS, holds, is_iban, luhn, mask

# Put together here, so that nobody who looks for secrets in this repository finds one.
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
GITHUB = "ghp" + "_" + "a1B2" * 9
TOKEN = ".".join(["ey" + "JhbGciOiJIUzI1NiJ9", "ey" + "JzdWIiOiIxMjM0In0", "c2lnbmF0dXJlLW9mLWE"])
BLOCK = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA " + "PRIVATE KEY-----"

FOUND = [
    ("emails", "write to jo.doe+x@mail.example.co.uk.", "write to <E-MAIL ADDRESS>."),
    ("emails", "客服邮箱a1@qq.com更新", "客服邮箱<E-MAIL ADDRESS>更新"),
    ("emails", "<A_B@EXAMPLE.ORG>,c@d.de", "<<E-MAIL ADDRESS>>,<E-MAIL ADDRESS>"),
    ("phones", "call +49 (0)30 901820 now", "call <PHONE NUMBER> now"),
    ("phones", "00258 82 123 4567", "<PHONE NUMBER>"),
    ("phones", "電話+81-3-1234-5678。", "電話<PHONE NUMBER>。"),
    ("phones", "Tel. (678) 661-9687", "Tel. <PHONE NUMBER>"),
    ("keys", f"id={AWS};", "id=<KEY>;"),
    ("keys", f"{GITHUB} and {TOKEN}", "<KEY> and <KEY>"),
    ("keys", f"a\n{BLOCK}\nb", "a\n<KEY>\nb"),
    ("cards", "pay 4111 1111 1111 1111 or 378282246310005", "pay <CARD NUMBER> or <CARD NUMBER>"),
    ("cards", "5500-0000-0000-0004", "<CARD NUMBER>"),
    ("ibans", "IBAN DE89 3704 0044 0532 0130 00.", "IBAN <ACCOUNT NUMBER>."),
    ("ibans", "GB29NWBK60161331926819", "<ACCOUNT NUMBER>"),
]
NOT_FOUND = [
    ("emails", "@user says a@b, and x @ y.com, int main@2x.5"),
    ("phones", "1 + 12345678 = 12345679; 1999-2001; ISBN 978-3-16-148410-0; 3.14159265; 1e+10; +1 234"),
    ("phones", "12345678 00 and 2001-10-02 100000"),
    ("keys", "AKIA, gh_pages, skeleton-key, eyJ alone, task-" + "a" * 40),
    ("cards", "4111 1111 1111 1112 and 4111-1111 1111-1111 and 0.4111111111111111"),
    ("cards", "4444444444444444444"),
    ("ibans", "DE88 3704 0044 0532 0130 00; ISO2 7001 2022 ABCD"),
]


def large(*texts: str | None) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


@pytest.mark.parametrize(("kind", "text", "masked"), FOUND)
def test_one_is_found_and_masked(kind: str, text: str, masked: str) -> None:
    assert mask(KINDS[kind], large(text)).to_pylist() == [masked]
    assert holds(KINDS[kind], large(text)).to_pylist() == [text != masked]


@pytest.mark.parametrize(("kind", "text"), NOT_FOUND)
def test_what_only_looks_like_one_stays(kind: str, text: str) -> None:
    assert mask(KINDS[kind], large(text)).to_pylist() == [text]


def test_masks_hold_nothing_of_any_kind() -> None:
    masks = large(*(kind.mask for kind in KINDS.values()))
    assert not any(found for kind in KINDS.values() for found in holds(kind, masks).to_pylist())


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_with_one_is_passed_over_by_the_hint(kind: str) -> None:
    """The exact pattern on every text finds what it finds behind the cheap one."""
    draw = random.Random(kind)
    pieces = [text for name, text, _ in FOUND if name == kind] + [
        text for name, text in NOT_FOUND if name == kind
    ]
    pieces += [*"+0(49)-@. /A1xé字"]
    texts: list[str] = []
    for _ in range(3000):
        piece = draw.choice(pieces)
        at = draw.randrange(len(piece))
        texts.append(piece[:at] + draw.choice(pieces)[:2] + piece[at + draw.randrange(2) :])
    one = KINDS[kind]
    expected = [one.pattern.sub(lambda f: one.mask if one.is_one(f[0]) else f[0], text) for text in texts]
    assert mask(one, large(*texts)).to_pylist() == expected
    assert expected != texts


def test_check_digits_catch_any_wrong_digit_and_swaps_of_neighbours() -> None:
    number, iban = "4012888888881881", "DE89370400440532013000"
    assert luhn(number) and is_iban(iban)
    for at in range(16):
        assert not any(luhn(number[:at] + d + number[at + 1 :]) for d in "0123456789" if d != number[at])
    for at in range(2, 22):
        wrong = [iban[:at] + d + iban[at + 1 :] for d in "0123456789" if d != iban[at]]
        assert not any(map(is_iban, wrong))
    swapped = iban[:5] + iban[6] + iban[5] + iban[7:]
    assert swapped != iban and not is_iban(swapped)


def test_missing_texts_stay_missing() -> None:
    assert mask(KINDS["emails"], large(None, "a@b.de")).to_pylist() == [None, "<E-MAIL ADDRESS>"]
