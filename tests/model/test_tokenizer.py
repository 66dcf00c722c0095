"""The tokenizer file: EOS by itself, whole words, the same ids behind a prompt, and nothing lost."""

import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from f2llm.errors import F2Error, UsageError
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import EOS, PAD, append_eos, encode, tokenizer_stage, train_bpe
from f2llm.recipe import TokenizerStage
from f2llm.tokenizer_file import load_tokenizer

TEXTS = [
    "lion",
    "Ujerumani",
    "éléphant",
    "सफ़ेद कुत्ता",
    "德国",
    "word, word; (word)",
    "3 lions 1984",
    " space before",
    "two\n\nlines\tand a tab ",
    "مصر",
    "👩‍👩‍👧 family",
    "நாய்",
    "",
]


def eos_of(tokenizer: Tokenizer) -> int:
    number = tokenizer.token_to_id(EOS)
    assert number is not None
    return number


def ids(tokenizer: Tokenizer, text: str, prefix: str = "") -> list[int]:
    eos_id = eos_of(tokenizer)
    return encode(tokenizer, [text], prefix=prefix, eos_id=eos_id, max_length=500, too_long="error")[0]


@pytest.fixture
def file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_file_itself_appends_eos(file: Path) -> None:
    plain = Tokenizer.from_file(str(file))
    eos_id = plain.token_to_id(EOS)
    for text in TEXTS:
        got = plain.encode(text).ids
        assert got[-1] == eos_id and eos_id not in got[:-1]
    assert plain.encode("").ids == [eos_id]
    assert plain.token_to_id(PAD) not in (None, eos_id)


@pytest.mark.parametrize("text", TEXTS)
def test_our_ids_are_those_of_the_plain_library(file: Path, text: str) -> None:
    plain = Tokenizer.from_file(str(file))
    assert ids(load_tokenizer(file), text) == plain.encode(text).ids
    prefix = query_prefix("Find it")
    assert ids(load_tokenizer(file), text, prefix) == plain.encode(prefix + text).ids


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_a_text_has_the_same_ids_with_and_without_a_prompt(tokenizer: Tokenizer, text: str) -> None:
    alone = ids(tokenizer, text)
    assert ids(tokenizer, text, query_prefix("Find this name"))[-len(alone) :] == alone


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    decoded = tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True)
    assert decoded.removeprefix(" " if text else "") == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "word", ["कुत्ता", "साँप", "ประเทศไทย", "நாய்", "ქართული", "e\u0301le\u0301phant", "שָׁלוֹם"]
)
def test_a_word_is_one_piece_with_its_combining_marks(tokenizer: Tokenizer, word: str) -> None:
    normalised = tokenizer.normalizer.normalize_str(f"{word} {word}")
    pieces = [
        normalised[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(normalised)
    ]
    composed = unicodedata.normalize("NFC", word)
    assert pieces == [f" {composed}", f" {composed}"]


def test_equivalent_strings_have_the_same_ids(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        decomposed = unicodedata.normalize("NFD", text)
        assert ids(tokenizer, decomposed) == ids(tokenizer, text)
        assert tokenizer.encode(decomposed).ids == ids(tokenizer, text)


def test_any_text_can_be_written(tokenizer: Tokenizer) -> None:
    """Byte-level: scripts never seen in training come back whole."""
    unseen = "ᏣᎳᎩ ꦗꦮ 𐎀𐎁 \u200f\u0000 ﷺ"
    assert tokenizer.decode(ids(tokenizer, unseen)) == " " + unicodedata.normalize("NFC", unseen)


def test_training_learns_whole_words_within_the_vocabulary(names: list[str]) -> None:
    small, large = train_bpe(names, 270), train_bpe(names, 700)
    assert small.get_vocab_size() == 270 and large.get_vocab_size() <= 700
    lengths = [sum(len(ids(tokenizer, name)) for name in names) for tokenizer in (small, large)]
    assert lengths[1] < 0.7 * lengths[0]
    assert len(ids(train_bpe(["Ujerumani"] * 50, 300), "Ujerumani")) == 2  # the word and EOS
    assert train_bpe(names, 300).to_str() == train_bpe(names, 300).to_str()


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("lowercase", [False, True])
def test_a_tokenizer_may_ignore_case_and_take_letters_apart(
    names: list[str], lowercase: bool, decompose: bool
) -> None:
    tokenizer = train_bpe([*names, "한국 대한민국"], 600, lowercase=lowercase, decompose=decompose)
    assert (ids(tokenizer, "ÉLÉPHANT лев") == ids(tokenizer, "éléphant ЛЕВ")) == lowercase
    for text in TEXTS:
        form = unicodedata.normalize("NFD" if decompose else "NFC", text)
        form = form.lower() if lowercase else form
        assert tokenizer.decode(ids(tokenizer, text)).removeprefix(" " if text else "") == form
        assert ids(tokenizer, unicodedata.normalize("NFD", text)) == ids(tokenizer, text)
        alone = ids(tokenizer, text)
        assert ids(tokenizer, text, query_prefix("Find"))[-len(alone) :] == alone
    for word in ("कुत्ता", "e\u0301le\u0301phant", "한국"):
        normalised = tokenizer.normalizer.normalize_str(word)
        assert len(tokenizer.pre_tokenizer.pre_tokenize_str(normalised)) == 1


# --- Length and EOS


def test_a_text_that_is_too_long_is_refused_or_cut_before_eos(tokenizer: Tokenizer) -> None:
    eos_id = eos_of(tokenizer)
    text = "lion tembo chien 大象 " * 3
    full = ids(tokenizer, text)
    with pytest.raises(UsageError, match=rf"text 1 has {len(full)} tokens, the limit is {len(full) - 1}"):
        encode(tokenizer, ["", text], eos_id=eos_id, max_length=len(full) - 1, too_long="error")
    assert encode(tokenizer, [text], eos_id=eos_id, max_length=len(full), too_long="error") == [full]
    (cut,) = encode(tokenizer, [text], eos_id=eos_id, max_length=6, too_long="truncate")
    assert cut == [*full[:5], eos_id]


def test_a_misspelt_choice_is_not_taken_for_truncation(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="eror"):
        encode(tokenizer, ["lion"], eos_id=0, max_length=6, too_long="eror")  # type: ignore[arg-type]


def test_padding_and_truncation_in_the_file_are_ignored(file: Path) -> None:
    asking = Tokenizer.from_file(str(file))
    asking.enable_padding(length=40)
    asking.enable_truncation(3)
    asking.save(str(file))
    expected = Tokenizer.from_file(str(file))
    expected.no_padding()
    expected.no_truncation()
    assert ids(load_tokenizer(file), "lion tembo chien") == expected.encode("lion tembo chien").ids


def test_a_tokenizer_that_does_not_append_eos_is_refused(tokenizer: Tokenizer) -> None:
    without = Tokenizer.from_str(tokenizer.to_str())
    without.post_processor = processors.ByteLevel()
    for text in ("lion", ""):
        with pytest.raises(F2Error, match="EOS"):
            ids(without, text)
    append_eos(without, EOS)
    assert ids(without, "lion") == ids(tokenizer, "lion")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(F2Error, match=r"tokenizer\.json is missing"):
        load_tokenizer(path)
    path.write_text('{"model": ')
    with pytest.raises(F2Error, match=r"tokenizer\.json is not a tokenizer file"):
        load_tokenizer(path)


def test_stage_learns_queries_positives_and_instructions(
    rows_folder: Path, names: list[str], tmp_path: Path
) -> None:
    config = TokenizerStage(stage="tokenizer", data="rows", vocab_size=700)
    facts = tokenizer_stage(config, data=rows_folder, out=tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert facts["vocab_size"] == tokenizer.get_vocab_size() <= 700
    assert facts["texts"] == len(names)
    prefix = query_prefix("Find this name in another language")
    assert len(ids(tokenizer, prefix)) == 8 + 2 + 2 + 1  # whole words, colons, white space, EOS
