"""A byte-level BPE tokenizer as llama.cpp's settings: tokens, their kinds, merges, and how a text is split into words.

llama.cpp has code of its own for each way of splitting and knows it by name, so a tokenizer that splits in another way,
or changes texts beforehand (lower case, a space in front), cannot be written: it would be read without an error and
give other tokens, and so other vectors. NFC is the exception: llama.cpp leaves it to the caller.
"""

from typing import Any

from tokenizers import Tokenizer

from f2llm.errors import UsageError
from f2llm.export.runtimes import require
from f2llm.model.folder import pad_id

# The expressions that split a text into words, as in Qwen's tokenizer.json -> llama.cpp's names.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + LINES: "qwen2",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + LINES: "qwen35",
}


def tokenizer_settings(
    tokenizer: Tokenizer, description: dict[str, Any], vocab_size: int, eos_id: int
) -> dict[str, Any]:
    """Values by the names of gguf's writer (`tokenizer_model` goes to `add_tokenizer_model`).

    Args:
        description: the content of tokenizer.json.
        vocab_size: rows of the embedding table; entries that the tokenizer does not have are written as unused.

    Raises:
        UsageError: llama.cpp cannot tokenise so.
    """
    pre = _pre_tokenizer(description)
    kinds = require("gguf").TokenType
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    kind_of = {
        # As in llama.cpp's converter: what looks like a control token is one.
        number: kinds.CONTROL
        if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        else kinds.USER_DEFINED
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    numbers = range(vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in description["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": [tokens.get(number, f"[PAD{number}]") for number in numbers],
        "token_types": [kind_of.get(n, kinds.NORMAL if n in tokens else kinds.UNUSED) for n in numbers],
        "token_merges": merges,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id(tokenizer, eos_id),
        "add_bos_token": False,
        "add_eos_token": True,
        "add_space_prefix": False,
    }


def _pre_tokenizer(description: dict[str, Any]) -> str:
    """llama.cpp's name for the way of splitting."""
    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise _cannot(f"its model is {model['type']}" + (" with options" if model["type"] == "BPE" else ""))
    normalizer = description.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _cannot(f"it changes texts by {_types(normalizer)}")
    match description.get("pre_tokenizer"):
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if words in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[words]
    raise _cannot("it splits texts into words in another way than Qwen's do")


def _types(normalizer: dict[str, Any]) -> str:
    return ", ".join(part["type"] for part in normalizer.get("normalizers", [normalizer]))


def _cannot(why: str) -> UsageError:
    return UsageError(
        f"this model's tokenizer has no equal in llama.cpp: {why}; export to onnx or openvino, which take "
        "tokenizer.json as it is, or train from a base with Qwen's tokenizer."
    )
