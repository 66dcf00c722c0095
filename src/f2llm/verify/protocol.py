"""What only a server can get wrong: the protocol around the vectors, and what it does to input that it cannot take.

Nothing that a server does in silence passes: a text that is cut, token ids of another vocabulary, a list in another
order. What is refused has to be refused as OpenAI's clients expect it.

Shape suffixes: N texts, D dims.
"""

import base64
import binascii
from typing import Any

import numpy as np

from f2llm.errors import F2Error
from f2llm.verify.computed import TEXTS, cosines, same
from f2llm.verify.findings import Check, Finding, failed, passed
from f2llm.verify.server import Answer, Server

# What LangChain sends by default: OpenAI's ids (cl100k_base) instead of the text. The first 256 ids are single bytes,
# printable ones first, so that the second sequence is in range of every vocabulary.
PANGRAM_CL100K = (
    "The quick brown fox jumps over the lazy dog",
    [791, 4062, 14198, 39935, 35308, 927, 279, 16053, 5679],
)
BYTES_CL100K = ("lion", [byte - ord("!") for byte in b"lion"])
SAME_TEXT = 0.999  # cosine of a text in two roundings of a half-precision engine

LONG = 200_000  # characters of a text that is too long for nearly every model
DIFFERENT = LONG // 10  # of them, at either end, that differ between the texts compared
SAME_CUT = 0.9999  # cosine above which two long texts were the same to the model

ERROR_KEYS = {"message", "type", "param", "code"}
TRIES = 3  # at two answers with the same bytes; a busy GPU may round a request differently


def base64_is_float(server: Server) -> Finding:
    texts = list(TEXTS[:3])
    complaint: Finding | None = None
    for _ in range(TRIES):
        float_ND = server.embed(texts)
        answer = server.ask(input=texts, encoding_format="base64")
        if answer.status != 200:
            return failed(
                f"encoding_format base64 is answered with status {answer.status}, {answer.text}.",
                "OpenAI's client asks for base64 by default: set encoding_format='float' there, or use another server.",
            )
        items = sorted(_items(answer), key=lambda item: item["index"])
        complaint = _packed_wrong(float_ND, [item.get("embedding") for item in items])
        if complaint is None:
            return passed("base64 is little-endian float32, byte for byte the float answer")
    assert complaint is not None
    return complaint


def _packed_wrong(float_ND: np.ndarray, packed: list[Any]) -> Finding | None:
    """What is wrong with base64 vectors beside those of the float route; None if they are the same bytes."""
    fix = "Send base64 of little-endian float32, the numbers that the float route prints."
    if not all(isinstance(text, str) for text in packed) or len(packed) != len(float_ND):
        return failed("encoding_format base64 is ignored: lists of numbers come back.", fix)
    try:
        raw = [base64.b64decode(text, validate=True) for text in packed]
    except (binascii.Error, ValueError):
        return failed("what comes back for encoding_format base64 is no base64.", fix)
    width = float_ND.shape[1]
    expected = [vector_D.astype("<f4").tobytes() for vector_D in float_ND]
    if raw == expected:
        return None
    if raw == [vector_D.astype(">f4").tobytes() for vector_D in float_ND]:
        return failed("base64 vectors are big-endian; clients read garbage.", fix)
    if any(len(data) != 4 * width for data in raw):
        return failed(f"a base64 vector has {len(raw[0])} bytes, {width} float32 have {4 * width}.", fix)
    decoded_ND = np.stack([np.frombuffer(data, "<f4") for data in raw])
    if not same(decoded_ND, float_ND):
        return failed("base64 gives other vectors than float.", fix)
    most = float(np.abs(decoded_ND - float_ND).max())
    return failed(f"base64 differs from float in its last digits (by {most:.1e} at most).", fix)


def order(server: Server) -> Finding:
    answer = server.ask(input=list(TEXTS[:3]), encoding_format="float")
    indices = [item["index"] for item in _items(answer)]
    fix = "Give `data` in the order of the input, `index` counting from 0; OpenAI's clients do not sort it."
    if indices != [0, 1, 2]:
        return failed(f"`data` comes with the indices {indices}.", fix)
    together_ND = server.vectors_of(answer, 3)
    for n, text in enumerate(TEXTS[:3]):
        nearest = cosines(together_ND, server.embed([text]))
        if int(np.nan_to_num(nearest, nan=-1).argmax()) != n:
            return failed(f"the vector of text {n} stands at index {int(nearest.argmax())}.", fix)
    return passed("`data` is in the order of the input")


def answer_shape(server: Server) -> Finding:
    answer = server.ask(input=[TEXTS[0]], encoding_format="float")
    value = answer.value if isinstance(answer.value, dict) else {}
    usage = value.get("usage") or {}
    item = next(iter(_items(answer)), {})
    lacks = [key for key in ("object", "data", "model", "usage") if key not in value]
    lacks += [f"usage.{key}" for key in ("prompt_tokens", "total_tokens") if key not in usage]
    lacks += ["data[].object"] if item.get("object") != "embedding" else []
    if lacks:
        return failed(f"the answer has no {', '.join(lacks)}.", "Give all keys of OpenAI's answer.")
    return passed("the answer has all keys of OpenAI's")


def model_name(server: Server) -> Finding:
    value = server.ask(input=[TEXTS[0]], encoding_format="float").value
    said = value.get("model") if isinstance(value, dict) else None
    if not isinstance(said, str) or not said:
        return failed(
            f"the answer's model is {said!r}.", "Echo the name of the model that computed the vectors."
        )
    if server.model is None:
        return passed(f"it calls itself {said!r}; no name was asked for")
    if said != server.model:
        return failed(
            f"{server.model!r} was asked for, and {said!r} answered.",
            "Ask for the model under the name that the server gives it (--model).",
        )
    return passed(f"{said!r}, as asked for")


def error_shape(server: Server) -> Finding:
    """A request without input has to be refused so that OpenAI's clients understand it."""
    answer = server.ask(again=False)
    fix = 'Answer wrong requests with status 400 and {"error": {"message", "type", "param", "code"}}.'
    if not 400 <= answer.status < 500:
        return failed(f"a request without `input` is answered with status {answer.status}.", fix)
    error = answer.value.get("error") if isinstance(answer.value, dict) else None
    if not isinstance(error, dict) or not error.keys() >= ERROR_KEYS:
        return failed(f"a refusal (status {answer.status}) has another shape: {answer.text}.", fix)
    return passed(f"a wrong request is refused with status {answer.status} in OpenAI's shape")


def empty_list(server: Server) -> Finding:
    answer = server.ask(again=False, input=[])
    if 400 <= answer.status < 500:
        return passed(f"refused with status {answer.status}")
    return failed(
        f"an empty list is answered with status {answer.status}, which clients take for vectors or for a failure.",
        "Refuse an empty `input` with status 400.",
    )


def too_long(server: Server) -> Finding:
    """Long texts that differ at one end alone must not have one vector."""
    start, middle, end = (_filling(word, size) for word, size in _LONG_PARTS)
    answer = server.ask(again=False, input=[start + middle + end], encoding_format="float")
    if 400 <= answer.status < 500:
        return passed(f"a text of {LONG:,} characters is refused with status {answer.status}")
    if answer.status != 200:
        return failed(
            f"a text of {LONG:,} characters is answered with status {answer.status}, after which clients try again.",
            "Refuse a text that is too long with status 400, its tokens and the limit.",
        )
    whole_ND = server.vectors_of(answer, 1)
    other = _filling("other", DIFFERENT)
    for text, where in ((start + middle + other, "end"), (other + middle + end, "beginning")):
        if not cosines(server.embed([text]), whole_ND)[0] < SAME_CUT:
            return failed(
                f"a text of {LONG:,} characters is cut in silence: another {where} leaves its vector as it is.",
                "Refuse longer texts, or switch automatic truncation off, and split them before they are sent.",
            )
    return passed(f"a text of {LONG:,} characters is read to its end")


_LONG_PARTS = (("start", DIFFERENT), ("middle", LONG - 2 * DIFFERENT), ("end", DIFFERENT))


def _filling(word: str, size: int) -> str:
    """Numbered words, `size` characters in all."""
    count = size // (len(word) + 2) + 1
    return " ".join(f"{word}{n}" for n in range(count))[: size - 1] + " "


def token_arrays(server: Server) -> Finding:
    fix = (
        "Refuse token ids, or decode them with OpenAI's vocabulary; in LangChain set "
        "check_embedding_ctx_length=False."
    )
    statuses = set()
    for text, ids in (PANGRAM_CL100K, BYTES_CL100K):
        answer = server.ask(again=False, input=[ids], encoding_format="float")
        statuses.add(answer.status)
        if 400 <= answer.status < 500:
            continue
        if answer.status != 200:
            return failed(f"token ids are answered with status {answer.status}.", fix)
        if not same(server.vectors_of(answer, 1), server.embed([text]), SAME_TEXT):
            return failed(
                "token ids of OpenAI's vocabulary (cl100k_base), which LangChain sends by default, are read as ids "
                f"of another one: {ids} gives another vector than {text!r}.",
                fix,
            )
    if statuses == {200}:
        return passed("OpenAI's token ids (cl100k_base) are decoded: their vectors are the texts'")
    return passed(f"refused with status {max(statuses)}; LangChain needs check_embedding_ctx_length=False")


def _items(answer: Answer) -> list[dict[str, Any]]:
    """The `data` of an answer, as it comes."""
    items = answer.value.get("data") if isinstance(answer.value, dict) else None
    if not isinstance(items, list) or not all(isinstance(item.get("index"), int) for item in items):
        raise F2Error(f"the answer (status {answer.status}) has no list of embeddings: {answer.text}.")
    return items


PROTOCOL_CHECKS: list[Check[Server]] = [
    ("base64", base64_is_float),
    ("order", order),
    ("answer-shape", answer_shape),
    ("model-name", model_name),
    ("error-shape", error_shape),
    ("empty-list", empty_list),
    ("too-long", too_long),
    ("token-arrays", token_arrays),
]
