"""Texts to token ids: training a byte-level BPE, and encoding with EOS that survives truncation.

The EOS token is appended by the post-processor inside tokenizer.json, so that every runtime that reads the file
appends it; `encode` checks that it did.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.compute as pc
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from f2llm.data.rows import read_rows
from f2llm.errors import F2Error, UsageError
from f2llm.files import write_text
from f2llm.model.prompts import query_prefix
from f2llm.recipe import TokenizerStage
from f2llm.text import clean

EOS, PAD = "<|eos|>", "<|pad|>"
# A word takes the space before it. Combining marks belong to their letters: cutting there would break the vowels
# of the scripts of India and South-East Asia off their consonants.
WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

TooLong = Literal["error", "truncate"]


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = False, decompose: bool = False
) -> Tokenizer:
    """A byte-level BPE over `texts`.

    Args:
        texts: what to learn merges from.
        vocab_size: entries at most; at least 258, for the bytes, EOS and PAD.
        lowercase: capital and small letters become the same tokens.
        decompose: NFD, so that accents and the letters of Hangul syllables can be tokens of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    # A leading space makes a text's first word the same tokens with and without a prompt in front of it.
    steps = [normalizers.NFD() if decompose else normalizers.NFC(), normalizers.Prepend(" ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    append_eos(tokenizer, EOS)
    return tokenizer


def append_eos(tokenizer: Tokenizer, eos: str) -> None:
    """Make the tokenizer file itself append `eos` to every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    prefix: str = "",
    eos_id: int,
    max_length: int,
    too_long: TooLong,
    first: int = 0,
) -> list[list[int]]:
    """Token ids of each text, each ending in EOS and of at most `max_length` tokens: `token_ids`, then `fit`."""
    return fit(token_ids(tokenizer, texts, prefix, eos_id, first), max_length, too_long, first)[0]


def token_ids(
    tokenizer: Tokenizer, texts: Sequence[str], prefix: str, eos_id: int, first: int = 0
) -> list[list[int]]:
    """Token ids of each text, whatever their number, each ending in EOS.

    Args:
        texts: any strings; `f2llm.text.clean` is applied.
        prefix: the prompt, put in front of every text.
        first: number of the first text, for errors.
    """
    prefix = clean(prefix)
    encoded = [e.ids for e in tokenizer.encode_batch_fast([prefix + clean(text) for text in texts])]
    for position, ids in enumerate(encoded):
        if not ids or ids[-1] != eos_id:
            raise F2Error(
                f"the tokenizer ended text {first + position} with token {ids[-1] if ids else 'nothing'}, expected "
                f"EOS {eos_id}; its post-processor does not append EOS, so vectors would be wrong: "
                "repair tokenizer.json."
            )
    return encoded


def fit(
    ids: Sequence[list[int]], max_length: int, too_long: TooLong, first: int = 0
) -> tuple[list[list[int]], int]:
    """Token sequences of at most `max_length` tokens, EOS included, and how many of them were cut.

    Args:
        ids: each ending in EOS.
        too_long: "error" refuses a longer text; "truncate" cuts it before EOS, which stays.
        first: number of the first text, for errors.
    """
    if too_long not in get_args(TooLong):
        raise UsageError(f"too_long is {too_long!r}; expected 'error' or 'truncate'.")
    long = [position for position, sequence in enumerate(ids) if len(sequence) > max_length]
    if long and too_long == "error":
        raise UsageError(
            f"text {first + long[0]} has {len(ids[long[0]])} tokens, the limit is {max_length}; "
            'shorten it, or ask for truncation (--truncate, or too_long="truncate").'
        )
    fitting = list(ids)
    for position in long:
        fitting[position] = [*ids[position][: max_length - 1], ids[position][-1]]
    return fitting, len(long)


def tokenizer_stage(config: TokenizerStage, *, data: Path, out: Path) -> dict[str, Any]:
    """Train a tokenizer on the texts of canonical rows (training rows only) and on their instructions."""
    table, sources = read_rows(data)
    texts = pc.unique(pc.drop_null(table["query"])).to_pylist()
    texts = sorted({*texts, *pc.unique(pc.list_flatten(table["positives"])).to_pylist()})
    # Instructions stand in front of every query, so their words are frequent although each is written once here.
    prompts = [query_prefix(source.instruction) for source in sources] * (1 + len(texts) // 20)
    tokenizer = train_bpe(
        [*texts, *prompts], config.vocab_size, lowercase=config.lowercase, decompose=config.decompose
    )
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    return {"vocab_size": tokenizer.get_vocab_size(), "texts": len(texts)}
