"""A folder of sources like those that a corpus is made of, small, with what becomes of every record known beforehand.

random words of several scripts -> records of six sources in five layouts and five file formats -> files, records of
the sources, and test sets. Texts have nothing in common unless that is planned, so of each record it is known whether
its row is in the end result, or which stage rejects it and why. Nothing here uses the code that is tested.
"""

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

LETTERS = {
    "eng": "abcdefghijklmnopqrstuvwxyz",
    "fra": "abcdefgilmnopqrstuvzéèêçàù",
    "swa": "abdefghijklmnoprstuwyz",
    "rus": "абвгдежзиклмнопрстуфхцчшщыэюя",
    "hin": "अआइईउऊकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह",
    "arb": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "tha": "กขคฆงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอ",
    "zho": "".join(map(chr, range(0x4E00, 0x5200))),
}
LETTERS_A_WORD = {"zho": 2, "tha": 5}  # in scripts without spaces
CODES = {"eng": "en", "rus": "ru"}  # that a file has, where they are not ours
MOST_CHARACTERS = 2000  # of a text, beyond which the recipe's cleaning drops it
DEFAULTS = "defaults: {title: T, task: test, licence: CC0-1.0}\n"
RECORDS = {
    "labelled.yml": """\
sources:
  - {name: mood, format: classification, symmetric: false, instruction: Say whether this is cheerful,
     files: [mood.csv], label_names: {"0": gloomy, "1": cheerful}}
  - {name: topics, format: clustering, symmetric: true, instruction: Find texts about the same topic,
     files: [topics.tsv], languages: [zho]}
""",
    "pairs.yml": """\
sources:
  - {name: faq, format: retrieval, symmetric: false, instruction: Find the answer to this question,
     files: [faq/*], columns: {query: question, positive: answers, negatives: wrong}}
  - {name: across, format: retrieval, symmetric: false, instruction: Find the answer in the other language,
     files: [across.parquet]}
  - {name: verses, format: retrieval, layout: parallel, symmetric: true, instruction: Find the same verse,
     files: [verses.parquet]}
  - {name: alike, format: retrieval, layout: sts, at_least: 4, symmetric: true,
     instruction: Find a sentence that means the same, files: [alike.json], languages: [fra]}
""",
}
ONE_MORE = """\
sources:
  - {name: more, format: retrieval, symmetric: false, instruction: Find what answers this,
     files: [more.jsonl], query_lang: swa, positive_lang: eng}
"""


class Fate(NamedTuple):
    """The stage that rejects a row, and its reason."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Planned:
    """A row as it comes out of cleaning, or goes into what a stage rejects."""

    source: str
    lang: str  # of the query
    query: str = ""
    positives: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    label: str | None = None
    fate: Fate | None = None

    def rejected(self, stage: str, reason: str) -> "Planned":
        return replace(self, fate=Fate(stage, reason))


class Made(NamedTuple):
    """Something in a file, and the row that it is to become."""

    raw: Any
    row: Planned


class Corpus:
    """The folder, and what is to become of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Planned] = []
        self.records: Counter[str] = Counter()  # of each source, as many as its files have
        self.tests: dict[str, list[str]] = {"questions": [], "sentences": ["yes"]}

    def add(self, name: str, made: Sequence[Made]) -> list[Any]:
        """Note these records of a source; what stands in its file."""
        self.rows += [one.row for one in made]
        self.records[name] += len(made)
        return [one.raw for one in made]

    def kept_after(self, *stages: str) -> Counter[tuple[str, str]]:
        """Rows of each source and language that none of these stages rejects."""
        kept = (row for row in self.rows if not row.fate or row.fate.stage not in stages)
        return Counter((row.source, row.lang) for row in kept)

    def rejected_by(self, stage: str) -> list[Planned]:
        return [row for row in self.rows if row.fate and row.fate.stage == stage]


class Words:
    """Random texts, no two of which have anything in common."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def words(self, lang: str, count: int) -> list[str]:
        lengths = [LETTERS_A_WORD.get(lang) or self.rng.randint(5, 9) for _ in range(count)]
        return ["".join(self.rng.choices(LETTERS[lang], k=length)) for length in lengths]

    def text(self, lang: str, count: int = 10) -> str:
        return joined(lang, self.words(lang, count))


def joined(lang: str, words: Sequence[str]) -> str:
    return ("" if lang in LETTERS_A_WORD else " ").join(words)


def nearly(text: str, every: int = 75) -> str:
    """The text with one letter in `every` changed: in Latin script, no 13 words in a row stay as they are."""
    letters = list(text)
    letters[every // 2 :: every] = "x" * len(letters[every // 2 :: every])
    return "".join(letters)


def make_corpus(folder: Path, seed: int = 0) -> Corpus:
    """Write `data` (the sources' files), `records` and `held_out` (the test sets) to the folder."""
    corpus, words = Corpus(folder), Words(seed)
    data = folder / "data"
    for name in ("records", "held_out", "data/faq"):
        (folder / name).mkdir(parents=True)
    questions = list(_questions(words))
    _write_lines(data / "faq" / "a.jsonl", corpus.add("faq", questions))
    more = [*_repeats(words, questions), *_held_out(words, corpus.tests), *_broken_questions(words)]
    _write_lines(data / "faq" / "b.jsonl.gz", corpus.add("faq", more))
    _write_parquet(data / "across.parquet", corpus.add("across", list(_across(words, questions[0].row))))
    _write_table(data / "topics.tsv", ["text", "label"], corpus.add("topics", _topics(words, corpus.tests)))
    _write_table(data / "mood.csv", ["text", "label", "lang"], corpus.add("mood", _moods(words)))
    (data / "alike.json").write_text(json.dumps(corpus.add("alike", _alike(words))))
    verses = _verses(words)
    _write_parquet(data / "verses.parquet", verses)
    corpus.records["verses"] = len(verses)
    corpus.rows += _pairs_of(verses)
    for name, sources in RECORDS.items():
        (folder / "records" / name).write_text(DEFAULTS + sources)
    _write_lines(
        folder / "held_out" / "questions.jsonl", [{"question": one} for one in corpus.tests["questions"]]
    )
    (folder / "held_out" / "sentences.txt").write_text("\n".join(corpus.tests["sentences"]) + "\n")
    return corpus


def add_source(folder: Path) -> None:
    """Make a folder with the record of one more source and the file of its 12 rows."""
    folder.mkdir()
    words = Words(1)
    rows = [{"query": words.text("swa"), "positive": words.text("eng")} for _ in range(12)]
    _write_lines(folder / "more.jsonl", rows)
    (folder / "more.yml").write_text(DEFAULTS + ONE_MORE)


# --- Questions and answers: JSONL, two files, one of them packed


def question(lang: str, query: str, positives: Sequence[str], negatives: Sequence[str] = ()) -> Made:
    raw = {"question": query, "answers": positives, "wrong": negatives, "lang": CODES.get(lang, lang)}
    return Made(raw, Planned("faq", lang, query, tuple(positives), tuple(negatives)))


def _questions(words: Words) -> Iterator[Made]:
    """Rows that nothing is wrong with; the first two are of long texts."""
    for number in range(60):
        lang, length = ("eng", "rus", "hin")[number % 3], 40 if number < 2 else 10
        answers = [words.text(lang, length) for _ in range(1 + number % 2)]
        wrong = [words.text(lang)] * (number % 4 == 0)
        yield question(lang, words.text(lang, length), answers, wrong)
    yield question("eng", "yes", [words.text("eng")])  # a test text, but shorter than any that is looked for


def _repeats(words: Words, questions: Sequence[Made]) -> Iterator[Made]:
    """Rows that repeat one of the questions, rows that only seem to, and rows that need cleaning."""

    def also(made: Made, reason: str, row: Planned | None = None) -> Made:
        return Made(made.raw, (row or made.row).rejected("clean", reason))

    first, second, third = (one.row for one in questions[:3])
    text = words.text("rus")
    loud = question("rus", second.query.upper().replace(" ", "  "), second.positives)
    yield also(loud, "exact duplicate")
    yield also(question("eng", nearly(first.query), [nearly(first.positives[0])]), "near duplicate")
    yield question("eng", first.query, [words.text("eng", 40)])  # another answer
    yield question("eng", nearly(first.query), [words.text("eng", 40)])
    yield question("hin", words.text("hin"), third.positives)  # another question
    soft = question("rus", "\u00ad\u00ad", [words.text("rus")])
    yield also(soft, "query empty", replace(soft.row, query=""))
    yield also(question("rus", text, [text]), "positive same text as the query")
    long = words.text("eng", MOST_CHARACTERS // 5)
    yield also(question("eng", words.text("eng"), [long]), "positive longer than 2,000 characters")

    mended = question("eng", words.text("eng"), [words.text("eng")])
    twice = [*mended.row.positives, *mended.row.positives]
    wrong = [words.text("eng"), mended.row.positives[0]]
    raw = {**mended.raw, "question": f"\x07 {mended.row.query}\ufeff", "answers": twice, "wrong": wrong}
    yield Made(raw, replace(mended.row, negatives=(wrong[0],)))


def _held_out(words: Words, tests: dict[str, list[str]]) -> Iterator[Made]:
    """Rows that hold a test text in each of the ways in which one can, and one whose negative is one."""

    def seen(made: Made, reason: str) -> Made:
        return Made(made.raw, made.row.rejected("unseen", reason))

    asked = words.text("rus")
    tests["questions"].append(asked)
    yield seen(question("rus", asked.upper(), [words.text("rus")]), "exact: questions.jsonl")
    within, run, near = words.text("eng", 9), words.words("hin", 20), words.text("eng", 40)
    tests["sentences"] += [within, joined("hin", run), near]
    answer = f"{words.text('eng', 5)} {within.title()}, {words.text('eng', 5)}"
    yield seen(question("eng", words.text("eng"), [words.text("eng"), answer]), "containment: sentences.txt")
    answer = joined("hin", [*words.words("hin", 5), *run[3:17], *words.words("hin", 5)])
    yield seen(question("hin", words.text("hin"), [answer]), "n-gram: sentences.txt")
    yield seen(question("eng", nearly(near), [words.text("eng")]), "near duplicate: sentences.txt")
    kept = question("rus", words.text("rus"), [words.text("rus")], [words.text("rus")])
    yield Made({**kept.raw, "wrong": [asked, *kept.row.negatives]}, kept.row)


def _broken_questions(words: Words) -> Iterator[Made]:
    def bad(raw: Any, lang: str, reason: str) -> Made:
        return Made(raw, Planned("faq", lang).rejected("rows", reason))

    good = question("rus", words.text("rus"), [words.text("rus")]).raw
    yield bad(json.dumps(good)[:-9], "und", "broken JSON")
    yield bad({**good, "question": " "}, "rus", "query: no text")
    yield bad({**good, "answers": []}, "rus", "positive: no text")
    yield bad({**good, "lang": "the Queen's"}, "und", "unknown language")


# --- The other sources, a file each


def _across(words: Words, seen: Planned) -> Iterator[Made]:
    """Parquet with languages of both texts; the last row is one of the questions of the other source."""
    for number in range(24):
        query, positive, wrong = words.text("swa"), words.text("fra"), [words.text("fra")] * (number % 2)
        raw = {"query": query, "positive": positive, "negatives": wrong}
        row = Planned("across", "swa", query, (positive,), tuple(wrong))
        yield Made({**raw, "query_lang": "swa", "positive_lang": "fra"}, row)
    raw = {"query": seen.query, "positive": seen.positives[0], "negatives": []}
    row = Planned("across", seen.lang, seen.query, seen.positives[:1]).rejected("clean", "exact duplicate")
    yield Made({**raw, "query_lang": seen.lang, "positive_lang": seen.lang}, row)


def _topics(words: Words, tests: dict[str, list[str]]) -> list[Made]:
    """TSV of Chinese texts with a label; a text twice with the same label, and twice with different ones."""

    def made(text: str, label: str, fate: Fate | None = None) -> Made:
        return Made([text, label], Planned("topics", "zho", text, label=label, fate=fate))

    found = [made(words.text("zho"), f"topic {number % 3}") for number in range(30)]
    run = words.text("zho", 30)
    tests["sentences"].append(run)
    held = words.text("zho", 5) + run[5:45] + words.text("zho", 5)
    short = Made(["no label"], Planned("topics", "und").rejected("rows", "wrong number of fields"))
    return [
        *found,
        made(found[0].row.query, "topic 0", Fate("clean", "exact duplicate")),
        made(found[0].row.query, "topic 1"),
        made(held, "topic 2", Fate("unseen", "n-gram: sentences.txt")),
        short,
    ]


def _moods(words: Words) -> list[Made]:
    """CSV of texts in two languages, with codes for labels."""
    found = []
    for number in range(24):
        lang, label = ("tha", "eng")[number % 2], number // 2 % 2
        text = words.text(lang) + ', "so"' * (number % 5 == 0)
        row = Planned("mood", lang, text, label=("gloomy", "cheerful")[label])
        found.append(Made([text, str(label), CODES.get(lang, lang)], row))
    nothing = Planned("mood", "tha").rejected("rows", "label: no text")
    latin_1 = Planned("mood", "und").rejected("rows", "not UTF-8")
    return [
        *found,
        Made([words.text("tha"), "", "tha"], nothing),
        Made(["d\udce9j\udce0", "1", "en"], latin_1),
    ]


def _alike(words: Words) -> list[Made]:
    """An array of JSON: pairs of French sentences with scores, of which 4 and 5 are right."""
    found = []
    for score in (*(5, 4, 3, 0, 4.5, 3.9) * 4, "high"):
        one, other = words.text("fra"), words.text("fra")
        row = Planned("alike", "fra", one, (other,))
        if isinstance(score, str):
            row = row.rejected("rows", "score: not a number")
        elif score < 4:
            row = row.rejected("rows", "score below 'at_least'")
        found.append(Made({"sentence1": one, "sentence2": other, "score": score}, row))
    return found


def _verses(words: Words) -> list[dict[str, str]]:
    """Parquet of verses in three languages; some lack a language, one has it twice, one is the same in two."""
    found = [
        {"id": f"v{number}", "lang": lang, "text": words.text(lang)}
        for lang in ("arb", "eng", "fra")
        for number in range(20)
        if number % 7 != ("arb", "eng", "fra").index(lang)
    ]
    amen = words.text("fra")
    return [
        *found,
        *({"id": "amen", "lang": lang, "text": amen} for lang in ("eng", "fra")),
        {"id": "v3", "lang": "fra", "text": words.text("fra")},
        {"id": "alone", "lang": "eng", "text": words.text("eng")},
    ]


def _pairs_of(verses: Sequence[dict[str, str]]) -> Iterator[Planned]:
    """What becomes of verses: pairs from and to English, and verses in no pair."""
    first: dict[tuple[str, str], str] = {}
    paired = set()
    for verse in verses:
        if (verse["id"], verse["lang"]) in first:
            yield Planned("verses", verse["lang"]).rejected("rows", "id and language repeat")
        first.setdefault((verse["id"], verse["lang"]), verse["text"])
    for (one, lang), text in first.items():
        for other in ("arb", "fra") if lang == "eng" else ("eng",):
            if (one, other) in first:
                row = Planned("verses", lang, text, (first[one, other],), label=one)
                same = text == first[one, other]
                yield row.rejected("clean", "positive same text as the query") if same else row
                paired.add((one, lang))
    for _, lang in first.keys() - paired:
        yield Planned("verses", lang).rejected("rows", "no text to pair with")


# --- Files


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    """JSONL, packed if its name says so; a text goes in as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _write_table(path: Path, names: list[str], rows: Sequence[Sequence[str]]) -> None:
    """CSV or TSV, in which half a surrogate pair stands for a byte that is no UTF-8."""
    text = io.StringIO()
    csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t").writerows([names, *rows])
    path.write_bytes(text.getvalue().encode(errors="surrogateescape"))


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)
