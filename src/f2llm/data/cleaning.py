"""What becomes of a row in cleaning: mended and kept, or rejected with the reason.

part of rows -> texts as numbers (`coded`) -> each different text tidied, masked, cut -> texts that are refused, and why
-> positives and negatives without those refused, repeated or contradictory -> rows without a usable query or positive,
licence or language rejected. Nothing here knows of other parts; repeats and balance come after (`clean_stage`).
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data import language_id, licences, personal
from f2llm.data.coded import Coded, Flags, Lists, Numbers, encode, list_column, query_column, replaced
from f2llm.data.macrolanguages import in_form
from f2llm.data.parts import REJECT_SCHEMA, Sifted
from f2llm.data.rows import SCHEMA, row_hash
from f2llm.data.tidy import tidy, tidy_all
from f2llm.errors import F2Error
from f2llm.recipe_corpus import CleanStage

OPTED_OUT: Final = "opted out"
SAME_AS_QUERY: Final = "same text as the query"
SAME_AS_POSITIVE: Final = "same text as a positive"
TWICE: Final = "listed twice"
WITH: Final = "with"


class Reasons:
    """The first reason found against each of some things; none has the number 0."""

    def __init__(self, count: int) -> None:
        self.names: list[str | None] = [None]
        self.numbers: Numbers = np.zeros(count, np.int64)

    @property
    def none(self) -> Flags:
        return self.numbers == 0

    def give(self, things: Flags, reason: str) -> None:
        if reason not in self.names:
            self.names.append(reason)
        self.numbers[things & self.none] = self.names.index(reason)

    def by_name(self) -> Iterator[tuple[str, Flags]]:
        for number, name in enumerate(self.names):
            if name is not None:
                yield name, self.numbers == number

    def column(self) -> pa.StringArray:
        return pa.array(self.names, pa.string()).take(pa.array(self.numbers))


class Notes:
    """How many rows of each source and language something was done to or found out of, as flat names of counters."""

    def __init__(self, rows: pa.Table) -> None:
        self.sources = rows["source"].to_pylist()
        self.counts: Counter[str] = Counter()

    def add(self, about: str, tags: list[str], rows: Iterable[int], what: str) -> None:
        self.counts.update("\t".join((about, self.sources[row], tags[row], what)) for row in rows)


def clean_rows(config: CleanStage, rows: pa.Table) -> Sifted:
    """The step of the stage on a part of rows (SCHEMA)."""
    rows = _renamed(rows.select(SCHEMA.names), config)
    count, before = rows.num_rows, encode(rows)
    after, mended = _mended(before.texts, config)
    coded = replaced(before, after)
    against_U = _texts_refused(coded.texts, config)
    against_R = _rows_refused(rows, config)

    lists = {"positive": coded.positives, "negative": coded.negatives}
    against = {
        "positive": _positives_refused(coded, against_U, config),
        "negative": _negatives_refused(coded, against_U),
    }
    left = {name: lists[name].where(against[name].none) for name in lists}
    for reason, is_against_U in against_U.by_name():
        against_R.give(is_against_U[coded.query_R], f"query {reason}")
    had_R, has_R = (some.counts(count) > 0 for some in (lists["positive"], left["positive"]))
    against_R.give(~had_R & pc.is_null(rows["label"]).to_numpy(), "neither a positive nor a label")
    for reason, is_against_P in against["positive"].by_name():
        with_R = np.bincount(lists["positive"].rows[is_against_P], minlength=count) > 0
        against_R.give(had_R & ~has_R & with_R, f"positive {reason}")

    notes, tags = Notes(rows), rows["query_lang"].to_pylist()
    if config.language_check != "off":
        first = Lists(
            *(part[np.unique(left["positive"].rows, return_index=True)[1]] for part in left["positive"])
        )
        _check_language(rows, coded, first, against_R, notes, config)

    changed_R = np.zeros(count, bool)
    what_was_done = [
        *((what, _rows_with(before, is_mended_U)) for what, is_mended_U in mended),
        *(
            (f"{name} left out: {reason}", np.bincount(lists[name].rows[is_against], minlength=count) > 0)
            for name in lists
            for reason, is_against in against[name].by_name()
        ),
    ]
    for what, done_R in what_was_done:
        changed_R |= done_R
        notes.add("changed", tags, np.flatnonzero(done_R & against_R.none), what)
    kept = _with_texts(rows, coded, left["positive"], left["negative"]).filter(pa.array(against_R.none))
    rejected = _rejected(
        _with_texts(rows, coded, *lists.values()), against_R, _is_private(coded, against_U, against_R)
    )
    return Sifted(_hashed_again(kept, changed_R[against_R.none]), rejected, notes.counts)


def _with_texts(rows: pa.Table, coded: Coded, positives: Lists, negatives: Lists) -> pa.Table:
    columns = {
        "query": query_column(coded),
        "positives": list_column(coded, positives),
        "negatives": list_column(coded, negatives),
    }
    return pa.table({**{name: rows[name] for name in SCHEMA.names}, **columns}, schema=SCHEMA)


def _renamed(rows: pa.Table, config: CleanStage) -> pa.Table:
    """With language tags in the form asked for."""
    if config.language_tags == "keep":
        return rows
    for name in ("query_lang", "positive_lang"):
        tags = pc.dictionary_encode(rows[name].combine_chunks())
        renamed = pa.array(
            [in_form(tag, config.language_tags) for tag in tags.dictionary.to_pylist()], pa.string()
        )
        rows = rows.set_column(rows.column_names.index(name), SCHEMA.field(name), renamed.take(tags.indices))
    return rows


def _mended(
    texts: pa.LargeStringArray, config: CleanStage
) -> tuple[pa.LargeStringArray, list[tuple[str, Flags]]]:
    """The texts as they go on, and of each thing done which texts it changed."""
    done = []

    def note(what: str, changed: pa.LargeStringArray) -> pa.LargeStringArray:
        done.append((what, pc.not_equal(texts, changed).to_numpy(zero_copy_only=False)))
        return changed

    texts = note("text tidied", tidy_all(texts))
    for name, kind in personal.KINDS.items():
        if getattr(config, name) == "mask":
            texts = note(f"{kind.name} masked", personal.mask(kind, texts))
    if config.max_characters and config.too_long == "cut":
        what = f"cut to {config.max_characters:,} characters"
        texts = note(what, pc.utf8_rtrim_whitespace(pc.utf8_slice_codeunits(texts, 0, config.max_characters)))
    return texts, done


def _texts_refused(texts: pa.LargeStringArray, config: CleanStage) -> Reasons:
    against_U = Reasons(len(texts))
    # First what is private, so that no other reason hides it.
    if listed := _opted_out(config):
        is_listed = (_folded(text) in listed for text in texts.to_pylist())
        against_U.give(np.fromiter(is_listed, bool, len(texts)), OPTED_OUT)
    for name, kind in personal.KINDS.items():
        if getattr(config, name) == "drop":
            is_one = personal.holds(kind, texts).to_numpy(zero_copy_only=False)
            against_U.give(is_one, f"{WITH} {kind.name}")
    length_U = pc.utf8_length(texts).to_numpy()
    against_U.give(length_U == 0, "empty")
    against_U.give(length_U < config.min_characters, f"shorter than {config.min_characters:,} characters")
    if config.max_characters:
        against_U.give(length_U > config.max_characters, f"longer than {config.max_characters:,} characters")
    return against_U


def _rows_refused(rows: pa.Table, config: CleanStage) -> Reasons:
    """For what stands in other columns than texts."""
    against_R = Reasons(rows.num_rows)
    if listed := _opted_out(config):
        for name in ("source", "hash"):
            against_R.give(_is_in(rows[name], listed), OPTED_OUT)
    if config.commercial_only:
        for reason in (licences.NOT_COMMERCIAL, licences.NOT_KNOWN):
            these = [
                name for name in rows["licence"].unique().to_pylist() if licences.obstacle(name) == reason
            ]
            against_R.give(_is_in(rows["licence"], these), reason)
    return against_R


def _is_in(column: pa.ChunkedArray, values: Iterable[str]) -> Flags:
    return pc.is_in(column, pa.array(list(values), pa.string())).to_numpy()


def _positives_refused(coded: Coded, against_U: Reasons, config: CleanStage) -> Reasons:
    positives = coded.positives
    against_P = _list_refused(positives, against_U)
    if config.equal_pairs == "drop":
        against_P.give(positives.texts == coded.query_R[positives.rows], SAME_AS_QUERY)
    against_P.give(_is_repeated(_pairs(coded, positives)), TWICE)
    return against_P


def _negatives_refused(coded: Coded, against_U: Reasons) -> Reasons:
    negatives = coded.negatives
    against_N = _list_refused(negatives, against_U)
    against_N.give(negatives.texts == coded.query_R[negatives.rows], SAME_AS_QUERY)
    against_N.give(np.isin(_pairs(coded, negatives), _pairs(coded, coded.positives)), SAME_AS_POSITIVE)
    against_N.give(_is_repeated(_pairs(coded, negatives)), TWICE)
    return against_N


def _list_refused(lists: Lists, against_U: Reasons) -> Reasons:
    against = Reasons(len(lists.texts))
    for reason, is_against_U in against_U.by_name():
        against.give(is_against_U[lists.texts], reason)
    return against


def _pairs(coded: Coded, lists: Lists) -> Numbers:
    """Row and text as one number."""
    return lists.rows * len(coded.texts) + lists.texts


def _is_repeated(values: Numbers) -> Flags:
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def _rows_with(coded: Coded, is_one_U: Flags) -> Flags:
    """Rows with one of these texts anywhere."""
    found_R = is_one_U[coded.query_R]
    for lists in (coded.positives, coded.negatives):
        found_R[lists.rows[is_one_U[lists.texts]]] = True
    return found_R


def _check_language(
    rows: pa.Table, coded: Coded, first: Lists, against_R: Reasons, notes: Notes, config: CleanStage
) -> None:
    """Judge the tags of queries and first positives of the rows that nothing stands against."""
    wanted_R = against_R.none
    queries = Lists(coded.query_R, np.arange(rows.num_rows))
    for name, field in (("query", queries), ("positive", first)):
        tags = rows[f"{name}_lang"].to_pylist()
        texts_N, rows_N = field.where(wanted_R[field.rows])
        judged_N = np.fromiter((language_id.can_judge(tags[row]) for row in rows_N), bool, len(rows_N))
        asked, place_N = np.unique(texts_N[judged_N], return_inverse=True)
        texts = coded.texts.take(pa.array(asked)).to_pylist()
        guesses = language_id.detect(texts)
        is_other_R = np.zeros(rows.num_rows, bool)
        notes.add("language", tags, rows_N[~judged_N], language_id.UNKNOWN)
        for row, place in zip(rows_N[judged_N].tolist(), place_N.tolist(), strict=True):
            verdict = language_id.verdict(tags[row], texts[place], guesses[place], config.language_sure)
            if is_other := verdict == language_id.OTHER:
                verdict = f"{verdict}: {guesses[place].language}"
            is_other_R[row] = is_other
            notes.add("language", tags, [row], verdict)
        if config.language_check == "drop":
            against_R.give(is_other_R, f"{name} {language_id.OTHER}")


def _hashed_again(rows: pa.Table, changed_R: Flags) -> pa.Table:
    changed = rows.filter(pa.array(changed_R)).select(["query", "positives", "negatives", "label", "source"])
    hashes = [row_hash(*row.values()) for row in changed.to_pylist()]
    merged = pc.replace_with_mask(
        pa.concat_arrays(rows["hash"].chunks) if rows.num_rows else pa.array([], pa.string()),
        pa.array(changed_R),
        pa.array(hashes, pa.string()),
    )
    return rows.set_column(rows.column_names.index("hash"), SCHEMA.field("hash"), merged)


def _rejected(rows: pa.Table, against_R: Reasons, private_R: Flags) -> pa.Table:
    """Rows with their reasons, under the hash they came in with; what is private is not written again."""
    against = pa.array(~against_R.none)
    rejected = rows.append_column(REJECT_SCHEMA.field("reason"), against_R.column()).filter(against)
    private = pa.array(private_R).filter(against)
    for number, (name, blank) in enumerate((("query", ""), ("positives", []), ("negatives", []))):
        field = SCHEMA.field(name)
        column = pc.if_else(private, pa.scalar(blank, field.type), rejected[name])
        rejected = rejected.set_column(number, field, column)
    return rejected.cast(REJECT_SCHEMA)


def _is_private(coded: Coded, against_U: Reasons, against_R: Reasons) -> Flags:
    """Rows that somebody wants nobody to have, or with such a text."""
    private_R = np.zeros(len(coded.query_R), bool)
    for reason, is_against_U in against_U.by_name():
        if reason == OPTED_OUT or reason.startswith(WITH):
            private_R |= _rows_with(coded, is_against_U)
    for reason, is_against_R in against_R.by_name():
        if reason == OPTED_OUT:
            private_R |= is_against_R
    return private_R


def _opted_out(config: CleanStage) -> frozenset[str]:
    """The lines of all lists, folded."""
    return frozenset().union(*(_lines(file, os.stat(file).st_mtime_ns) for file in config.opt_out))


@cache
def _lines(file: str, changed_ns: int) -> frozenset[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise F2Error(f"{file} is not UTF-8 ({error}); save the opt-out list as UTF-8.") from None
    return frozenset(folded for line in lines if (folded := _folded(line)))


def _folded(text: str) -> str:
    return " ".join(tidy(text).casefold().split())
