"""What the stages of a recipe have in common: strict models, and marks on the fields that name what a stage reads."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from f2llm.yaml_lines import Location

Format = Literal["retrieval", "clustering", "classification"]
FORMATS: list[Format] = ["retrieval", "clustering", "classification"]


# `owner/name` or `owner/name@revision` of the Hugging Face hub.
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class Takes(NamedTuple):
    """Marks a field that names what a stage reads: earlier stages of these kinds, files and folders, hub models."""

    kinds: tuple[str, ...] = ()
    or_path: bool = False
    or_hub: bool = False
    or_url: bool = False


ROWS = (
    "names",
    "files",
    "sources",
    "synthetic",
    "clean",
    "decontaminate",
    "mine",
)  # kinds of stages that end in rows
DATA = Takes(ROWS)
DATA_OR_FOLDER = Takes(ROWS, or_path=True)
NAMES = Takes(("names",))
TOKENIZER = Takes(("tokenizer",))
TRAINED_OR_MODEL = Takes(("train", "merge"), or_path=True, or_hub=True)
TEACHER = Takes(("train", "merge"), or_path=True, or_hub=True, or_url=True)
MODELS = ("train", "prune", "slice", "trim", "merge")  # kinds of stages that end in a model
MODEL = Takes(MODELS)
STAGE_OR_MODEL = Takes(MODELS, or_path=True, or_hub=True)
FILES = Takes(or_path=True)


class Input(NamedTuple):
    """One thing that a stage takes: where its config says so, the name of the stage or the path, and the mark."""

    location: Location
    name: str
    takes: Takes

    @property
    def is_path(self) -> bool:
        """Where both are allowed, a path is known by its slash, which no stage's name has."""
        return self.takes.or_path and not self.is_url and (not self.takes.kinds or "/" in self.name)

    @property
    def is_url(self) -> bool:
        """Whether it is a server, where that is allowed."""
        return self.takes.or_url and is_url(self.name)

    @property
    def is_on_hub(self) -> bool:
        """What looks like a hub model's name is one where there is no such folder."""
        return self.takes.or_hub and bool(HUB_NAME.fullmatch(self.name)) and not Path(self.name).exists()


class Strict(BaseModel):
    """No unknown keys, no guessed types (`"3"` is not 3), no infinities, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
