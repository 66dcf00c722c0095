"""MinHash against sets of strings: folding, shingles, exact similarity, and how often keys meet."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.naive_texts import SENTENCES, jaccard, shingle_set
from tests.data.naive_texts import fold as naive_fold

from f2llm.data import minhash
from f2llm.data.folded import Texts, fold
from f2llm.rng import generator

ODD = [
    "",
    " ",
    "  a  B ",
    "\u3000ÀB\tc ",
    "ẞß Σς ﬁ",
    "x",
    "İI",
    "𐐀 𠀀x\U0001f600 ",
    " \n ",
    "é e\u0301",
    "Ｆ１",
]
TEXTS = [*ODD, *SENTENCES.values(), "ab\x00cd", "漢字かなカナ 한글 mixed ไทย"]


def folded(texts: list[str]) -> Texts:
    return fold(pa.array(texts, pa.string()))


def edited(text: str, edits: int, rng: np.random.Generator) -> str:
    characters = list(text)
    for place in rng.choice(len(text), size=edits, replace=False):
        characters[place] = "#"
    return "".join(characters)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[::-1], ["", ""], ["  "], [], ["a ", " b"]])
def test_folding_is_the_plain_one(texts: list[str]) -> None:
    assert folded(texts).strings() == [naive_fold(text) for text in texts]


def test_folding_reads_slices_chunks_and_nulls() -> None:
    array = pa.array(["x", None, " Y ", "ß"])
    assert fold(array[1:]).strings() == ["", "y", "ß"]
    assert fold(pa.chunked_array([array, array[2:]])).strings() == ["x", "", "y", "ß", "y", "ß"]


def test_folding_of_real_text(shared: object) -> None:
    rows = pq.read_table(f"{shared}/data/parallel/udhr.parquet")["text"].to_pylist()[::20]
    assert folded(rows).strings() == [naive_fold(text) for text in rows]


def test_take() -> None:
    texts = folded(TEXTS)
    chosen = [3, 0, 0, len(TEXTS) - 1, 1, 12, 12]
    assert texts.take(np.array(chosen)).strings() == [texts.strings()[n] for n in chosen]
    assert texts.take(np.array([], np.int64)).strings() == []
    assert texts.owners().tolist() == [n for n, text in enumerate(texts.strings()) for _ in text]


def test_shingles_are_equal_where_the_strings_are() -> None:
    texts = folded(TEXTS)
    hashes = minhash.shingles(texts)
    for number, text in enumerate(TEXTS):
        ours = set(hashes[texts.starts[number] : texts.starts[number + 1]].tolist())
        assert len(ours) == len(shingle_set(text))
    every = [one for text in TEXTS for one in shingle_set(text)]
    assert len(set(hashes.tolist())) == len(set(every))


def test_jaccard_is_that_of_sets_of_strings() -> None:
    rng = generator(0, "pairs")
    some = [edited(text, edits, rng) for text in SENTENCES.values() for edits in (0, 1, 3, 9)]
    pairs = [(one, other) for one in [*some, *ODD] for other in [*some, *ODD]]
    left, right = (minhash.hashed(folded([pair[side] for pair in pairs])) for side in (0, 1))
    assert minhash.jaccard(left, right).tolist() == pytest.approx([jaccard(*pair) for pair in pairs])


def test_an_edit_weighs_about_the_same_in_every_script() -> None:
    loss = {lang: 1 - jaccard(text, text[:20] + "#" + text[21:]) for lang, text in SENTENCES.items()}
    assert max(loss.values()) < 2 * min(loss.values())


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.97])
def test_the_plan_misses_few_at_the_threshold(threshold: float) -> None:
    bands, rows = minhash.plan(threshold)
    assert (1 - threshold**rows) ** bands <= minhash.MISSED
    assert rows % 2 == 0


@pytest.mark.parametrize("fields", [1, 2])
@pytest.mark.parametrize("shared_part", [0.3, 0.6, 0.8])
def test_keys_meet_as_often_as_theory_says(fields: int, shared_part: float) -> None:
    plan = minhash.Plan(bands=10, rows=4)
    rng = generator(0, "keys")
    count = 3000
    letters = rng.integers(0x10000, 0x11000, size=(count, 2, 400)).astype(np.uint32)
    same = round(400 * 2 * shared_part / (1 + shared_part))  # of 400 shingles on each side
    letters[:, 1, :same] = letters[:, 0, :same]
    starts = np.arange(count + 1) * 400
    one, other = (Texts(np.ascontiguousarray(letters[:, side]).ravel(), starts) for side in (0, 1))
    similarity = minhash.jaccard(minhash.hashed(one), minhash.hashed(other))
    meet = minhash.keys([one] * fields, plan) == minhash.keys([other] * fields, plan)
    expected = (similarity**plan.rows).mean()
    assert meet.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected / meet.size) + 0.003)
    expected_any = (1 - (1 - similarity**plan.rows) ** plan.bands).mean()
    assert meet.any(axis=0).mean() == pytest.approx(expected_any, abs=0.04)  # bands are independent


def test_texts_are_cut_into_blocks_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = folded([*TEXTS, "long " * 100, "", ""])
    plan = minhash.plan(0.8)
    whole = minhash.keys([texts, texts], plan)
    monkeypatch.setattr(minhash, "BLOCK", 64)
    assert np.array_equal(minhash.keys([texts, texts], plan), whole)
    hashed = minhash.hashed(texts)
    backwards = hashed.take(np.arange(len(texts))[::-1])
    assert np.array_equal(minhash.jaccard(hashed, backwards), minhash.jaccard(backwards, hashed))
