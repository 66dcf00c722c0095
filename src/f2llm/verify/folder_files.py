"""The files of a model folder, as any runtime finds them: what they name, and how a text ends.

Nothing is loaded through f2llm's own reader of models, which repairs or refuses what others take as it is.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from f2llm.errors import F2Error
from f2llm.files import read_json, read_object
from f2llm.model.folder import FACTS
from f2llm.tokenizer_file import load_tokenizer

PROBES = ("a", "The harbour was quiet before the storm came in.", "今天的会议改到星期五下午三点。")


@dataclass(frozen=True)
class Files:
    """The files of a folder, read when they are asked for; F2Error for one that is broken."""

    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where the folder has no such file."""
        path = self.folder / name
        return read_object(path) if path.is_file() else {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    @cached_property
    def modules(self) -> list[tuple[str, str]]:
        """Kind and folder of each of sentence-transformers' modules; empty where none are named."""
        path = self.folder / "modules.json"
        if not path.is_file():
            return []
        try:
            return [(module["type"].rpartition(".")[2], module["path"]) for module in read_json(path)]
        except (AttributeError, KeyError, TypeError):
            raise F2Error(f"{path} is not a list of modules; copy the folder again.") from None

    @property
    def pooling(self) -> tuple[str, dict[str, Any]]:
        """Name and content of the file that says how token vectors become one."""
        name = next((f"{path}/config.json" for kind, path in self.modules if kind == "Pooling"), None)
        name = name or "1_Pooling/config.json"
        return name, self.read(name)

    @property
    def prompts(self) -> dict[str, str]:
        """What stands in front of texts, by the name of the prompt."""
        prompts = self.read("config_sentence_transformers.json").get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise F2Error(
                f"{self.folder}/config_sentence_transformers.json has prompts that are not texts; write them anew."
            )
        return prompts

    @property
    def is_ours(self) -> bool:
        return (self.folder / FACTS).is_file()

    def endings(self) -> set[int | None]:
        """The last tokens of a few texts; one special token where the file appends EOS."""
        return {next(reversed(encoded.ids), None) for encoded in self.tokenizer.encode_batch(list(PROBES))}

    def eos_id(self) -> int | None:
        """The special token that tokenizer.json ends every text in; None if it does not."""
        endings = self.endings()
        special = {
            number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        return next(iter(endings)) if len(endings) == 1 and endings <= special else None

    def token(self, number: int | None) -> str:
        """A token as a reader knows it."""
        return "nothing" if number is None else f"{self.tokenizer.id_to_token(number)!r} ({number})"

    def named(self, name: str, key: str) -> str | None:
        """A token that a file names by text, by number or in an object; None where it names none."""
        value = self.read(name).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list):
            value = next(iter(value), None)
        if isinstance(value, int):
            return self.tokenizer.id_to_token(value)
        return value if isinstance(value, str) else None
