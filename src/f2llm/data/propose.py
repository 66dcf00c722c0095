"""A guess at which column holds what, from the columns' names and types; a person says whether it is right.

The names are those that public data sets of pairs, labels and scores use, the likeliest first. Nothing is proposed
where a plain reading of the columns would be wrong: pairs beside a column that says which of them hold become scored
pairs if that column is a number, and otherwise nothing.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.types as pt

from f2llm import languages
from f2llm.data.records import Columns, Layout
from f2llm.errors import UsageError
from f2llm.recipe_fields import Format

QUERY = (
    "query queries question anchor instruction prompt inputs input claim premise title headline summary highlights "
    "sentence1 sent1 text1 sentence_1 source_text source src"
).split()
POSITIVE = (
    "positive positives pos positive_passages passage passages context document article abstract answer answers "
    "long_answer best_answer response responses completion outputs output hypothesis body content text target_text "
    "target tgt sentence2 sent2 text2 sentence_2 code"
).split()
NEGATIVES = "negatives negative neg hard_negatives negative_passages contradiction".split()
TEXT = "text sentence texts sentences content document review tweet utterance title query".split()
LABEL = "label_text label_name label labels category topic intent scenario emotion sentiment class target stars".split()
FIRST = "sentence1 sent1 sentence_1 text1 question1 premise".split()
SECOND = "sentence2 sent2 sentence_2 text2 question2 hypothesis".split()
SCORE = "score similarity_score similarity relatedness label labels is_duplicate".split()
LANGUAGE = "lang language locale language_code".split()
INSIDE = ("text", "content", "contents", "passage", "document")  # of a struct: what is to be read
JUDGEMENTS = {"label", "labels", "gold_label", "is_duplicate", "score", "relevance", "is_impossible"}


class Proposal(NamedTuple):
    """How a source's columns may be read."""

    layout: Layout
    columns: Columns
    query_lang: str | None = None
    positive_lang: str | None = None
    """Languages that the columns' names tell: `translation.de`."""
    note: str = ""
    """What is left for a person to say."""

    def uses(self) -> dict[str, str]:
        """What each column that is used is used as: {"question": "query"}."""
        said = self.columns.model_dump(exclude_unset=True)
        return {column: use for use, column in said.items() if column}


def propose(schema: pa.Schema, format: Format) -> Proposal | None:
    """The likeliest reading of columns for rows that are trained on as `format`; None where none is likely."""
    columns = dict(_flat(schema))
    if format != "retrieval":
        return _labelled(columns, format)
    return _scored(columns) or _pairs(columns) or _translations(columns)


def _labelled(columns: dict[str, pa.DataType], layout: Format) -> Proposal | None:
    text = _first(columns, TEXT, pt.is_string)
    label = _first(columns, LABEL, _is_label, but=text)
    if text is None or label is None:
        return None
    return Proposal(layout, Columns(text=text, label=label, lang=_first(columns, LANGUAGE, pt.is_string)))


def _scored(columns: dict[str, pa.DataType]) -> Proposal | None:
    first, second = _first(columns, FIRST, pt.is_string), _first(columns, SECOND, pt.is_string)
    score = _first(columns, SCORE, _is_number)
    if first is None or second is None or score is None or _leaf(first) == "premise":
        return None  # the labels of inference are numbers without an order
    note = "set 'at_least' to the lowest score that makes a positive"
    lang = _first(columns, LANGUAGE, pt.is_string)
    return Proposal("sts", Columns(sentence1=first, sentence2=second, score=score, lang=lang), note=note)


def _pairs(columns: dict[str, pa.DataType]) -> Proposal | None:
    query = _first(columns, QUERY, pt.is_string)
    positive = _first(columns, POSITIVE, _is_texts, but=query)
    judged = any(_leaf(column) in JUDGEMENTS for column in columns)
    if query is None or positive is None or judged:
        return None
    negatives = _first(columns, NEGATIVES, _is_texts)
    lang = _first(columns, LANGUAGE, pt.is_string)
    return Proposal("retrieval", Columns(query=query, positive=positive, negatives=negatives, lang=lang))


def _translations(columns: dict[str, pa.DataType]) -> Proposal | None:
    """A struct of two texts that are named by their languages: `translation: {"de": ..., "fr": ...}`."""
    inside = [column for column in columns if column.startswith("translation.")]
    if len(inside) != 2:
        return None
    try:
        first, second = (languages.tag(_leaf(column)) for column in inside)
    except UsageError:
        return None
    return Proposal("retrieval", Columns(query=inside[0], positive=inside[1], negatives=None), first, second)


def _flat(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Columns by their dotted names, down into structs and into the structs of lists, whose texts become lists."""
    for field in schema:
        yield from _inside(field.name, field.type, within_list=False)


def _inside(name: str, kind: pa.DataType, within_list: bool) -> Iterator[tuple[str, pa.DataType]]:
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        kind = pa.string()
    if pt.is_struct(kind):
        for field in kind:
            yield from _inside(f"{name}.{field.name}", field.type, within_list)
    elif _is_list(kind) and pt.is_struct(kind.value_type):
        yield from _inside(name, kind.value_type, within_list=True)
    else:
        yield name, pa.list_(kind) if within_list else kind


def _first(
    columns: dict[str, pa.DataType],
    names: list[str],
    fits: Callable[[pa.DataType], bool],
    but: str | None = None,
) -> str | None:
    """The column of the likeliest name whose type fits; of a struct, the column of its text."""
    wanted = [alternative for name in names for alternative in (name, *(f"{name}.{part}" for part in INSIDE))]
    by_name = {column.lower(): column for column in reversed(columns) if fits(columns[column])}
    return next((by_name[name] for name in wanted if name in by_name and by_name[name] != but), None)


def _leaf(column: str) -> str:
    return column.rpartition(".")[2].lower()


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_texts(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or (
        _is_list(kind) and (pt.is_string(kind.value_type) or pt.is_large_string(kind.value_type))
    )


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind)


def _is_label(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_integer(kind) or pt.is_boolean(kind)
