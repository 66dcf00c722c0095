"""Vocabulary trimming: a model for some languages needs few of a multilingual tokenizer's entries.

texts -> how often each token is used -> the tokens to keep -> a smaller tokenizer.json and embedding table. A
byte-level BPE stays exact where it matters: with each kept token go the tokens that its merges join (its ancestors),
and all that no merge makes (the bytes) and all special tokens stay. Merging then makes the same choices as before on
every text whose tokens were all kept, for its merges are all still there and no new ones have come in between. Such a
text keeps its tokens, under new numbers, and so its vector, to the bit. Any other text still has tokens, but more.

Shape suffixes: V entries of the old vocabulary, K kept ones, E hidden width.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from itertools import islice
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from f2llm.errors import UsageError
from f2llm.model.decoder import Decoder
from f2llm.model.folder import Model
from f2llm.text import clean

Numbers = npt.NDArray[np.int64]

TEXTS_AT_ONCE = 4096
UNUSED = -1  # the new number of a token that was dropped


@dataclass(frozen=True)
class Coverage:
    """What trimming does to some texts."""

    texts: int
    unchanged: int  # texts whose tokens were all kept: their vectors stay as they are
    tokens: int
    tokens_trimmed: int  # of the same texts with the smaller tokenizer

    def __add__(self, other: "Coverage") -> "Coverage":
        return Coverage(*map(add, astuple(self), astuple(other)))


NOTHING = Coverage(0, 0, 0, 0)


def usage(tokenizer: Tokenizer, texts: Iterable[str]) -> Numbers:
    """How often each token is used in texts, prompts and EOS not counted [V]."""
    uses_V = np.zeros(_entries(tokenizer), np.int64)
    for some in _batches(texts):
        found = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        uses_V += np.bincount([token for e in found for token in e.ids], minlength=len(uses_V))
    return uses_V


def tokens_to_keep(
    tokenizer: Tokenizer, uses_V: Numbers | npt.NDArray[np.float64], keep: int | None = None
) -> Numbers:
    """Old numbers of the tokens to keep, ascending [K].

    Args:
        uses_V: how often each token is used, or any other weight that is 0 for those that are not.
        keep: how many at most. The most used come first, then unused ones in their order, which in a BPE is the order
            of how frequent they were where it was trained. Without it, all that are used.

    Raises:
        UsageError: the tokenizer is no BPE, or `keep` is less than what has to stay.
    """
    model = _bpe(json.loads(tokenizer.to_str()))
    parents = _parents(model)
    kept = {token for token in tokenizer.get_vocab(with_added_tokens=True).values() if token not in parents}
    kept |= tokenizer.get_added_tokens_decoder().keys()
    most = len(uses_V) if keep is None else keep
    if len(kept) > most:
        raise UsageError(
            f"{most} tokens were asked for, but bytes and special tokens alone are {len(kept)}; ask for more."
        )
    wanted = np.argsort(-uses_V, kind="stable")
    if keep is None:
        wanted = wanted[: np.count_nonzero(uses_V)]
    for token in wanted.tolist():
        new = _with_ancestors(token, parents, kept)
        if len(kept) + len(new) > most:
            break  # what is less used and would fit still would leave out a more used one
        kept |= new
    return np.array(sorted(kept), np.int64)


def trim(model: Model, kept_K: Numbers) -> Model:
    """The model with the tokens `kept_K` (old numbers, ascending, closed as `tokens_to_keep` gives them) alone."""
    number_of = {old: new for new, old in enumerate(kept_K.tolist())}
    config = replace(model.decoder.config, vocab_size=len(kept_K))
    with torch.device("meta"):
        decoder = Decoder(config)
    state = model.decoder.state_dict()
    table_VE = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = table_VE.index_select(0, torch.from_numpy(kept_K).to(table_VE.device))
    decoder.load_state_dict(state, assign=True)
    facts = replace(
        model.facts, eos_id=number_of[model.facts.eos_id], parent=model.facts.identity, recipe=None
    )
    return Model(decoder.eval(), trim_tokenizer(model.tokenizer, number_of), facts)


def trim_tokenizer(tokenizer: Tokenizer, number_of: Mapping[int, int]) -> Tokenizer:
    """The tokenizer with the tokens of `number_of` (old number -> new) alone."""
    description = json.loads(tokenizer.to_str())
    model = _bpe(description)
    vocab = {token: number_of[old] for token, old in model["vocab"].items() if old in number_of}
    merges = [pair for pair in map(_pair, model["merges"]) if {*pair, _joined(pair, model)} <= vocab.keys()]
    model |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    for added in description["added_tokens"]:
        added["id"] = number_of[added["id"]]
    description["post_processor"] = _renumbered(description["post_processor"], number_of)
    trimmed = Tokenizer.from_str(json.dumps(description))
    trimmed.no_padding()
    trimmed.no_truncation()
    return trimmed


def coverage(tokenizer: Tokenizer, trimmed: Tokenizer, kept_K: Numbers, texts: Iterable[str]) -> Coverage:
    """How many texts keep their tokens, and how many tokens all have, before and after."""
    is_kept_V = np.zeros(_entries(tokenizer), bool)
    is_kept_V[kept_K[kept_K < len(is_kept_V)]] = True
    total = NOTHING
    for some in _batches(texts):
        before, after = (t.encode_batch_fast(some, add_special_tokens=False) for t in (tokenizer, trimmed))
        total += Coverage(
            len(some),
            sum(bool(is_kept_V[e.ids].all()) for e in before),
            sum(len(e.ids) for e in before),
            sum(len(e.ids) for e in after),
        )
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, cleaned, some at a time."""
    rest = iter(texts)
    while some := [clean(text) for text in islice(rest, TEXTS_AT_ONCE)]:
        yield some


def _entries(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _bpe(description: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = description["model"]
    if model["type"] != "BPE":
        raise UsageError(f"the tokenizer is of the type {model['type']}; only a BPE can be trimmed.")
    return model


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Older files write a merge as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _joined(pair: tuple[str, str], model: dict[str, Any]) -> str:
    return pair[0] + pair[1].removeprefix(model["continuing_subword_prefix"] or "")


def _parents(model: dict[str, Any]) -> dict[int, set[int]]:
    """Token -> all tokens that any merge makes it of."""
    vocab = model["vocab"]
    parents: dict[int, set[int]] = defaultdict(set)
    for pair in map(_pair, model["merges"]):
        parents[vocab[_joined(pair, model)]].update(vocab[part] for part in pair)
    return parents


def _with_ancestors(token: int, parents: Mapping[int, set[int]], kept: set[int]) -> set[int]:
    """The token and its ancestors, those left out that are kept already."""
    found: set[int] = set()
    waiting = {token} - kept
    while waiting:
        found |= waiting
        waiting = {parent for one in waiting for parent in parents.get(one, ())} - kept - found
    return found


def _renumbered(part: Any, number_of: Mapping[int, int]) -> Any:
    """A post-processor with new numbers: `ids` of special tokens, and pairs of a token and its number."""
    if isinstance(part, dict):
        return {
            name: [number_of[old] for old in value] if name == "ids" else _renumbered(value, number_of)
            for name, value in part.items()
        }
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], number_of[part[1]]]
        return [_renumbered(value, number_of) for value in part]
    return part
