"""What is known of a source of rows, as a record in a YAML file: where it is, how its columns read, what it asks for.

One kind of record for all sources: the public ones of the catalogue (`sources/*.yaml` beside this module), and a user's
own files, whose record stands wherever the user keeps it. What nobody looked up is `unknown`, never a guess.

A file holds one record, or many as a list under `sources`. What many have in common may stand once under `defaults`: a
record's own keys go before these, and its `from` is added to theirs.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from f2llm import languages as lang
from f2llm.errors import UsageError
from f2llm.files import write_text
from f2llm.recipe_errors import nearest, problem
from f2llm.recipe_fields import Format
from f2llm.yaml_lines import Document, Location, read_yaml

UNKNOWN: Final = "unknown"

Layout = Literal["retrieval", "clustering", "classification", "parallel", "sts"]


def _language(given: str) -> str:
    try:
        return lang.tag(given)
    except UsageError as error:
        raise problem(str(error).rstrip(".")) from None


Tag = Annotated[str, AfterValidator(_language)]
"""ISO 639-3 with optional script; other names of a language become that."""


class Columns(BaseModel):
    """Which column of the files holds what; a name of our own where the file has that very column.

    A dotted name goes into a struct, and into each struct of a list: `answers.text`, `negative_passages.text`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # retrieval
    query: str = "query"
    positive: str = "positive"
    """A text or a list of texts."""
    negatives: str | None = "negatives"
    """A text or a list of texts; may be missing."""
    # clustering and classification
    text: str = "text"
    label: str = "label"
    # parallel: one text of one language a row, equal ids say the same
    id: str = "id"
    # sts
    sentence1: str = "sentence1"
    sentence2: str = "sentence2"
    score: str = "score"
    # languages, where a column tells them; otherwise those of the record
    lang: str | None = "lang"
    query_lang: str | None = "query_lang"
    positive_lang: str | None = "positive_lang"


class SourceRecord(BaseModel):
    """One source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    """Ours, also of the rows and of files."""
    title: str
    """Its own."""
    task: str
    """Task type: question answering, bitext mining ..."""
    format: Format
    """How its rows are trained on."""
    layout: Layout | None = None
    """How its files read, where that is not the format: parallel texts and scored pairs become retrieval rows."""
    symmetric: bool
    """Query and document are of one nature, so that either may carry the instruction."""
    instruction: Annotated[str, Field(min_length=1)]
    """What stands in front of its queries, in words of our own."""
    languages: list[Tag] | Literal["unknown"] = UNKNOWN
    """ISO 639-3 with optional script."""
    programming_languages: list[str] = []
    """Of its code, as far as they are known, in lower case."""
    language_count: Annotated[int, Field(ge=1)] | None = None
    """How many there are where `languages` is unknown; of code, programming languages."""
    samples: Annotated[int, Field(ge=0)] | None = None
    """Rows in the paper's corpus."""
    stages: list[Literal[1, 2]] = [2]
    """Of the paper's training."""
    licence: str = UNKNOWN
    """SPDX identifier, or the licence's own name."""
    revision: str = UNKNOWN
    """Commit of a hub dataset, or what else names the very bytes."""
    location: str | None = None
    """Address of a page, a repository or a file; `huggingface.co/datasets/owner/name` is read through `datasets`."""
    config: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    files: list[str] = []
    """Own files: paths, folders or globs, relative to the record's file or to a given root."""
    columns: Columns | Literal["unknown"] = Columns()
    query_lang: Tag | None = None
    """Language of all queries, where no column tells it."""
    positive_lang: Tag | None = None
    label_names: dict[str, str] = {}
    """What to call each label in words, where files have numbers or codes."""
    directions: list[tuple[str, str]] | Literal["all", "english"] = "english"
    """Of a parallel source: pairs of query and positive language, all, or all from and to English."""
    at_least: float | None = None
    """Of scored pairs: the lowest score that makes a positive."""
    from_: Annotated[dict[str, str], Field(alias="from")] = {}
    """Where each fact is from: {"samples": "arXiv 2603.19223, Table 8"}."""

    @model_validator(mode="after")
    def _one_count(self) -> Self:
        if self.languages != UNKNOWN and self.language_count is not None:
            raise problem("'language_count' is for languages that are unknown: remove it", "language_count")
        return self

    @model_validator(mode="after")
    def _origins_of_fields(self) -> Self:
        for field in self.from_:
            if field not in (fields := _keys(type(self))):
                raise problem(f"'from' speaks of {field!r}: {nearest(field, fields, 'key')}", "from", field)
        return self


class Placed(NamedTuple):
    """A record and where it stands, for errors: `sources/sts.yaml:12`."""

    record: SourceRecord
    place: str


def read_record(path: Path) -> SourceRecord:
    """The one record of a file; UsageError with file and line where it is not one."""
    records = read_records(path)
    if len(records) != 1:
        raise UsageError(
            f"{path} has {len(records)} records, expected one; name a file with a single record."
        )
    return records[0].record


def read_records(path: Path) -> list[Placed]:
    """All records of a file, in order; whatever is wrong is a UsageError of one sentence with file and line."""
    document = read_yaml(path)
    value, lines = document.value, document.lines
    if not isinstance(value, dict):
        raise UsageError(f"{path}:1: expected a record, that is, lines of 'key: value'; see the catalogue's.")
    if "sources" not in value:
        return [_placed(path, document, (), {})]
    if unknown := [key for key in value if key not in ("sources", "defaults")]:
        raise UsageError(
            f"{path}:{lines[(unknown[0],)]}: unknown key {unknown[0]!r} beside 'sources': "
            f"{nearest(unknown[0], ['defaults'], 'key')}."
        )
    defaults, sources = value.get("defaults") or {}, value["sources"]
    if not isinstance(defaults, dict) or not isinstance(sources, list):
        raise UsageError(
            f"{path}:1: expected 'defaults' to be lines of 'key: value' and 'sources' a list of records; mend it."
        )
    return [_placed(path, document, ("sources", number), defaults) for number in range(len(sources))]


def write_record(path: Path, record: SourceRecord) -> None:
    """Write what is said in a record, so that `read_record` gives it back."""
    values = record.model_dump(by_alias=True, exclude_unset=True)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    write_text(path, text)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that other readers than PyYAML take for numbers, such as the commit 12e4."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if text[:1] in (*"0123456789+-.",) else None
    ),
)


def _placed(path: Path, document: Document, location: Location, defaults: dict[str, Any]) -> Placed:
    value: Any = document.value
    for step in location:
        value = value[step]
    place = f"{path}:{document.line(location)}"
    if not isinstance(value, dict):
        raise UsageError(f"{place}: expected a record, that is, lines of 'key: value', got {value!r:.60}.")
    origins = [part.get("from") or {} for part in (defaults, value)]
    merged = {**defaults, **value}
    if all(isinstance(part, dict) for part in origins) and any(origins):
        merged["from"] = origins[0] | origins[1]
    try:
        return Placed(SourceRecord.model_validate(merged), place)
    except ValidationError as error:
        raise UsageError(_explain(path, document, location, merged, error)) from None


def _explain(
    path: Path, document: Document, location: Location, merged: dict[str, Any], error: ValidationError
) -> str:
    """The first problem of a record as `path:line: sentence.`, and how many more there are."""
    errors = error.errors(include_url=False)
    # What is there and wrong comes before what is not there: a misspelt key is also a missing one.
    errors.sort(key=lambda details: details["type"] == "missing")
    details, more = errors[0], len(errors) - 1
    inside = (*details["loc"], *details.get("ctx", {}).get("location", ()))
    own, common = (*location, *inside[:1]), ("defaults", *inside[:1])
    at = common if own not in document.lines and common in document.lines else own
    line = document.line(_in_file((*at, *inside[1:])))
    who = repr(merged["name"]) if isinstance(merged.get("name"), str) else "the record"
    and_more = f" (and {more} more)" if more else ""
    return f"{path}:{line}: {_sentence(details, who)}{and_more}."


def _in_file(location: Location) -> Location:
    """Without the names of alternatives that pydantic puts between keys of a union."""
    return tuple(
        part for part in location if part != "Columns" and not str(part).startswith(("list[", "lit"))
    )


def _sentence(details: ErrorDetails, who: str) -> str:
    location = _in_file(details["loc"])
    key = ".".join(map(str, location))
    match details["type"]:
        case "missing":
            return f"{who} lacks the key {key!r}; add it"
        case "extra_forbidden":
            fields = _keys(Columns if location[0] == "columns" else SourceRecord)
            return f"unknown key {key!r} of {who}: {nearest(str(location[-1]), fields, 'key')}"
        case "problem":
            return f"{details['ctx']['sentence']} in {key!r} of {who}" if key else details["ctx"]["sentence"]
        case _:
            what, _, should = details["msg"].partition(" should ")
            wish = f", but it should {should}" if should else f": {what}"
            return f"{key!r} of {who} is {details['input']!r:.60}{wish}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
