"""What can be asked for: a table of kinds of task, with the forms that answers have to fill.

Kinds follow E5-mistral (arXiv 2401.00368, section 3.1 and appendix C): retrieval by how long query and document are,
classification, sentences of one meaning, and bitext; clustering is added, since it is a format of its own here. The
forms go to the server as JSON schema, and whatever it answers is read through them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from f2llm.recipe_corpus import KindName
from f2llm.recipe_fields import Format
from f2llm.text import clean


class Span(NamedTuple):
    """Fewest and most characters of a text; few are enough where one is a word."""

    fewest: int
    most: int


SHORT, LONG = Span(2, 600), Span(60, 20_000)
A_FEW_WORDS = "a text of a few words up to one sentence"
A_PASSAGE = "a passage of several sentences"


@dataclass(frozen=True)
class Kind:
    """One kind of task: what its rows are to the trainer, and which prompts ask for them."""

    name: KindName
    format: Format
    task: str
    """For the rows: what they ask for, in a word."""
    instruction: str
    """For the source: what stands in front of a query."""
    tasks_prompt: str
    rows_prompt: str
    symmetric: bool = False
    query: str = ""
    """Fills {query} in prompts: what a query looks like."""
    document: str = ""
    query_span: Span = SHORT
    document_span: Span = SHORT

    @property
    def has_labels(self) -> bool:
        return self.format != "retrieval"


def _retrieval(name: KindName, instruction: str, *, query_is_long: bool, document_is_long: bool) -> Kind:
    return Kind(
        name,
        "retrieval",
        "retrieval",
        instruction,
        "tasks-retrieval",
        "rows-retrieval",
        query=A_PASSAGE if query_is_long else A_FEW_WORDS,
        document=A_PASSAGE if document_is_long else A_FEW_WORDS,
        query_span=LONG if query_is_long else SHORT,
        document_span=LONG if document_is_long else SHORT,
    )


KINDS: dict[KindName, Kind] = {
    kind.name: kind
    for kind in (
        _retrieval(
            "short-long", "Find a passage that meets this wish", query_is_long=False, document_is_long=True
        ),
        _retrieval(
            "long-short",
            "Find the short text that belongs to this passage",
            query_is_long=True,
            document_is_long=False,
        ),
        _retrieval(
            "short-short",
            "Find a short text that matches this one",
            query_is_long=False,
            document_is_long=False,
        ),
        _retrieval(
            "long-long", "Find a passage that matches this one", query_is_long=True, document_is_long=True
        ),
        Kind(
            "paraphrase",
            "retrieval",
            "paraphrase detection",
            "Find a sentence that says the same in other words",
            "tasks-sentences",
            "rows-paraphrase",
            symmetric=True,
        ),
        Kind(
            "bitext",
            "retrieval",
            "bitext mining",
            "Find the translation of this sentence",
            "tasks-sentences",
            "rows-bitext",
            symmetric=True,
        ),
        Kind(
            "classification",
            "classification",
            "classification",
            "Name the class of this text",
            "tasks-labels",
            "rows-labels",
            query_span=Span(2, 20_000),
        ),
        Kind(
            "clustering",
            "clustering",
            "clustering",
            "Find a text of the same class",
            "tasks-labels",
            "rows-labels",
            symmetric=True,
            query_span=Span(2, 20_000),
        ),
    )
}


# --- Forms of answers. Limits stand in validators, not in the schema: servers know but a part of JSON Schema.


def _text(value: str) -> str:
    if not (text := clean(value).strip()):
        raise ValueError("the text is empty")
    return text


def _labels(values: list[str]) -> list[str]:
    if len({value.casefold() for value in values}) < max(len(values), 2):
        raise ValueError("labels must be two or more, all different")
    return values


Text = Annotated[str, AfterValidator(_text)]


class Form(BaseModel):
    """An answer. What it has beyond the form is left out."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})


class Task(Form):
    """A task to write rows for."""

    task: Text
    """In English."""

    @property
    def key(self) -> str:
        """Tasks of the same key are one."""
        return " ".join(self.task.casefold().split())


class LabelTask(Task):
    """A task to sort texts."""

    name: Text
    """What the labels tell: "mood of a review"."""
    labels: Annotated[list[Text], AfterValidator(_labels)]

    @property
    def key(self) -> str:
        return " ".join(self.name.casefold().split())


class Tasks(Form):
    """What a request for tasks gives."""

    tasks: list[Task]


class LabelTasks(Form):
    """What a request for tasks with labels gives."""

    tasks: list[LabelTask]


class Triple(Form):
    """A row of retrieval."""

    query: Text
    positive: Text
    negative: Text


class Labelled(Form):
    """A text, its label, and the label that it might be mistaken for."""

    text: Text
    label: Text
    other_label: Text


def tasks_form(kind: Kind) -> type[Tasks] | type[LabelTasks]:
    return LabelTasks if kind.has_labels else Tasks


def row_form(kind: Kind) -> type[Triple] | type[Labelled]:
    return Labelled if kind.has_labels else Triple


def schema(form: type[Form]) -> dict[str, Any]:
    """JSON schema of a form, without titles and descriptions, which some servers would put into the prompt."""
    return _bare(form.model_json_schema())


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _bare(v)
            for k, v in value.items()
            if not (k in ("title", "description") and isinstance(v, str))
        }
    return [_bare(one) for one in value] if isinstance(value, list) else value


class UnreadableError(Exception):
    """An answer that does not fill its form; the message is one of few reasons, to be counted."""


_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def read(text: str, form: type[Form]) -> Form:
    """The form that an answer fills: its JSON object may stand among words and inside ``` fences.

    Raises UnreadableError where there is no JSON, or not of this form.
    """
    text = _THOUGHTS.sub("", text)
    try:
        return form.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError as error:
        is_json = error.errors()[0]["type"] != "json_invalid"
        raise UnreadableError("wrong schema" if is_json else "not JSON") from None


def label_text(task: LabelTask, label: str) -> str:
    """A label as it stands in a row: with what it tells, so that labels of different tasks stay apart."""
    return f"{task.name}: {label}"


def bullets(texts: Sequence[str]) -> str:
    """A list as it stands in a prompt."""
    return "\n".join(f"- {text}" for text in texts) or "- (none yet)"
