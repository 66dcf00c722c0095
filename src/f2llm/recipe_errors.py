"""What pydantic found wrong with a recipe, said in one sentence with the file and the line."""

import reprlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from f2llm.yaml_lines import Document, Location


def problem(sentence: str, *location: str | int, more: int = 0) -> PydanticCustomError:
    """To raise in a validator: the sentence is shown as it is, with the line of `location` (seen from the model).

    Args:
        more: how many problems of the same kind the validator saw beside this one.
    """
    return PydanticCustomError(
        "problem", "{sentence}", {"sentence": sentence, "location": location, "more": more}
    )


def nearest(word: str, valid: list[str], what: str) -> str:
    """The hint that ends a sentence about a wrong word: the nearest valid one, else all of them."""
    if close := get_close_matches(word, valid, n=1):
        return f"the nearest valid {what} is {close[0]!r}"
    return f"the valid {what}s are {', '.join(map(repr, valid))}" if valid else f"there is no valid {what}"


def explain(path: Path, document: Document, error: ValidationError, root: type[BaseModel]) -> str:
    """The problem to mend first, as `path:line: sentence.`, and how many more there are."""
    problems = [_Problem.of(details, document, root) for details in error.errors(include_url=False)]
    # A misspelt key is also a missing one; and what is there and wrong comes before what is not there.
    misspelt = {(p.location[:-1], p.meant) for p in problems if p.meant}
    problems = [p for p in problems if not (p.missing and (p.location[:-1], p.location[-1]) in misspelt)]
    problems.sort(key=lambda p: (p.missing, document.line(p.location)))
    first, more = problems[0], sum(1 + p.more for p in problems) - 1
    and_more = f" (and {more} more)" if more else ""
    return f"{path}:{document.line(first.location)}: {first.sentence}{and_more}."


class _Problem(NamedTuple):
    """One of pydantic's errors, in the terms of the file."""

    location: Location
    sentence: str
    missing: bool = False
    meant: str | None = None
    more: int = 0

    @classmethod
    def of(cls, details: ErrorDetails, document: Document, root: type[BaseModel]) -> "_Problem":
        location, value, context = _location(details["loc"]), details["input"], details.get("ctx", {})
        key = str(location[-1]) if location else ""
        match details["type"]:
            case "extra_forbidden":
                fields, where = list(_fields(root, location[:-1], document)), _where(location[:-1], document)
                meant = next(iter(get_close_matches(key, fields, n=1)), None)
                return cls(
                    location, f"unknown key {key!r} in {where}: {nearest(key, fields, 'key')}", meant=meant
                )
            case "missing":
                meaning = _fields(root, location[:-1], document)[key].description
                where = _where(location[:-1], document)
                return cls(location, f"{where} lacks the key {key!r} ({meaning}); add it", missing=True)
            case "union_tag_not_found" | "union_tag_invalid":
                kinds = [kind for model in _stage_models(root) for kind in _kind(model)]
                return _of_kind(location, context.get("tag"), kinds)
            case "problem":
                where = f" in {_where(location, document)}" if location else ""
                within = (*location, *context["location"])
                return cls(within, context["sentence"] + where, more=context["more"])
            case "string_pattern_mismatch" if details["loc"][-1] == "[key]":
                rule = "start with a lower-case letter or digit and go on with those, '-' and '_'"
                return cls(location, f"{key!r} cannot be the name of a stage: it should {rule}")
            case "dict_type" | "model_type" | "model_attributes_type":
                what = f"{_where(location, document)} is {_show(value)}"
                return cls(location, f"{what}, but it should be a mapping, that is, lines of 'key: value'")
            case _:
                subject, _, should = details["msg"].partition(" should ")
                what = f"{_where(location, document)} is {_show(value)}"
                return cls(location, f"{what}, but it should {should}" if should else f"{what}: {subject}")


def _of_kind(location: Location, kind: Any, kinds: list[str]) -> _Problem:
    """A stage that does not say of which known kind it is."""
    if kind is None:
        choice = ", ".join(kinds)
        return _Problem(
            location, f"stage {location[-1]!r} lacks the key 'stage', one of {choice}; add it", missing=True
        )
    hint = nearest(str(kind), kinds, "kind")
    return _Problem((*location, "stage"), f"unknown kind {kind!r} of stage {location[-1]!r}: {hint}")


def _location(loc: Location) -> Location:
    """Where in the file: pydantic also names the kind of a stage it looked into, and marks keys with `[key]`."""
    loc = tuple(part for part in loc if part != "[key]")
    return loc[:2] + loc[3:] if loc[:1] == ("stages",) else loc


def _where(location: Location, document: Document) -> str:
    """`item 2 of 'formats' of stage 'base' (train)`: a location in words."""
    if not location:
        return "the recipe"
    *parents, last = location
    if len(parents) == 1 and parents[0] == "stages":
        stage = document.value["stages"][last]
        kind = f" ({stage['stage']})" if isinstance(stage, dict) and "stage" in stage else ""
        return f"stage {last!r}{kind}"
    inside = _where(tuple(parents), document)
    if isinstance(last, int):
        return f"item {last + 1} of {inside}"
    return repr(last) if inside == "the recipe" else f"{last!r} of {inside}"


def _show(value: Any) -> str:
    return "empty" if value is None else reprlib.repr(value)


def _fields(root: type[BaseModel], location: Location, document: Document) -> dict[str, FieldInfo]:
    """The fields that the mapping at `location` may have."""
    model = root
    if location:
        stage, name, *inner = location
        kind = document.value[stage][name]["stage"]
        model = next(model for model in _stage_models(root) if kind in _kind(model))
        for part in inner:
            model = next(_models(model.model_fields[str(part)].annotation))
    return model.model_fields


def _stage_models(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    return _models(root.model_fields["stages"].annotation)


def _kind(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields["stage"].annotation)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type, such as the `Shape` of `Shape | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
