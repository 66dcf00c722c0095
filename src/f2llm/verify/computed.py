"""Checks of what is computed, written once for everything that turns texts into vectors: a folder or a server.

Shape suffixes: N texts, D dims.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from f2llm.errors import F2Error
from f2llm.verify.findings import Check, Finding, failed, passed

Vectors = npt.NDArray[np.float32]

TEXTS = (
    "a",
    "lion",
    "Wasser kocht",
    "今天下午三点",
    "The harbour was quiet before the storm came in.",
)
SHORT_TEXTS = TEXTS[:2]  # behind a prompt these fit into any model
SAME = 0.99999  # cosine of vectors that are one and the same but for rounding
ALIKE = 0.999  # mean cosine of vectors that tell nothing apart
UNIT = 1e-3  # how far a length may be from 1, which leaves room for float16
ODD = 11  # a size that nobody trains for


class RefusedError(F2Error):
    """The target said no to a request, as it should to a wrong one."""


class Target(Protocol):
    """What is verified: a folder or a server."""

    @property
    def width(self) -> int:
        """All dimensions of its vectors."""

    @property
    def sizes(self) -> list[int]:
        """The Matryoshka sizes that it says it was trained for; empty where it does not say."""

    @property
    def identity(self) -> str | None:
        """The hash of the model that it says it is."""

    @property
    def query_prompt(self) -> str | None:
        """What it says stands in front of queries; None where it does not say."""

    def embed(self, texts: Sequence[str], *, query: bool = False, dim: int | None = None) -> Vectors:
        """float32 [N, D] as they come, with the target's own prompt for queries if `query`.

        Raises RefusedError for what the target takes for wrong use, F2Error where it fails.
        """


def cosines(a_ND: Vectors, b_ND: Vectors) -> Vectors:
    """Cosine of each pair, float32 [N]; not a number where one vector is zero or not finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        product = (a_ND * b_ND).sum(-1) / np.linalg.norm(a_ND, axis=-1) / np.linalg.norm(b_ND, axis=-1)
    return np.asarray(product, np.float32)


def same(a_ND: Vectors, b_ND: Vectors, least: float = SAME) -> bool:
    """Whether all pairs have one shape and a cosine of at least `least`; not so for what is not finite."""
    return a_ND.shape == b_ND.shape and bool((cosines(a_ND, b_ND) > least).all())


def tried_sizes(target: Target) -> list[int]:
    """Powers of two from 8 on, an odd one, what the target names, and all."""
    powers = {8 << n for n in range(12)}
    return sorted(size for size in {*powers, ODD, *target.sizes, target.width} if size <= target.width)


def taken_sizes(target: Target) -> dict[int, Vectors]:
    """Vectors of a text at each size that the target does not refuse."""
    found = {}
    for size in tried_sizes(target):
        try:
            found[size] = target.embed(TEXTS[-1:], dim=size)
        except RefusedError:
            continue
    return found


def vectors(target: Target) -> Finding:
    found_ND = target.embed(TEXTS)
    if not np.isfinite(found_ND).all():
        return failed("some vectors are not finite.", "Copy or make the weights again.")
    between = [float(cosines(a_D, b_D)) for n, a_D in enumerate(found_ND) for b_D in found_ND[:n]]
    if not np.mean(between) <= ALIKE:
        return failed(
            f"vectors of {len(TEXTS)} different texts are alike (mean cosine {np.mean(between):.4f}).",
            "Check that tokenizer and weights are those of one trained model.",
        )
    return passed(f"{target.width} finite numbers a text, different for different texts")


def batch_invariance(target: Target) -> Finding:
    alone_ND = np.concatenate([target.embed([text]) for text in TEXTS])
    every = list(range(len(TEXTS)))
    for order, what in (
        (every, "with longer ones"),
        (every[::-1], "in another order"),
        ([every[-1]] * 2, "with one of its length"),  # where some engines leave out the causal mask
    ):
        together_ND = target.embed([TEXTS[n] for n in order])
        if not same(together_ND, alone_ND[order]):
            least = float(cosines(together_ND, alone_ND[order]).min())
            return failed(
                f"a text has another vector alone than {what} in a batch (cosine {least:.5f}).",
                "Mask padding in attention, count positions from each text's first token, and pool its own last token.",
            )
    return passed(f"a text alone, with longer ones, in another order, with itself: cosine > {SAME}")


def unit_norm(target: Target) -> Finding:
    sizes = taken_sizes(target)
    for size, found_ND in [(target.width, target.embed(TEXTS[-1:])), *sizes.items()]:
        length = float(np.linalg.norm(found_ND[0]))
        if not abs(length - 1) < UNIT:
            return failed(
                f"a vector of {size} dimensions has length {length:.4f}.",
                "Truncate first and then divide by the length, at every size.",
            )
    return passed(f"length 1 at {', '.join(map(str, sizes)) or 'full size'}")


def prefixes(target: Target) -> Finding:
    whole_ND = target.embed(TEXTS[-1:])
    for size, found_ND in taken_sizes(target).items():
        if not same(found_ND, whole_ND[:, :size]):
            return failed(
                f"a vector of size {size} is not the first {size} numbers of the whole one, normalised.",
                "Take the first numbers of the whole vector and divide by their length.",
            )
    return passed("a shorter vector is the beginning of the whole one, normalised")


def dimensions(target: Target) -> Finding:
    for size in (target.width, *target.sizes):
        try:
            target.embed(TEXTS[:1], dim=size)
        except RefusedError as error:
            return failed(
                f"{size} dimensions are refused, which the vectors have: {error}",
                'Write "is_matryoshka": true or all sizes as matryoshka_dimensions into the model\'s config.json.',
            )
    taken = taken_sizes(target)
    if wrong := {size: found.shape[1] for size, found in taken.items() if found.shape[1] != size}:
        size, got = next(iter(wrong.items()))
        return failed(
            f"{size} dimensions were asked for and {got} came: the request is ignored.",
            "Truncate on your side and normalise, or use a server that honours `dimensions`.",
        )
    for size in (0, target.width + 1):
        try:
            got = target.embed(TEXTS[:1], dim=size).shape[1]
        except RefusedError:
            continue
        return failed(
            f"{size} dimensions are asked for, the vectors have {target.width}, and {got} come without an error.",
            f"Refuse every size outside 1 to {target.width}.",
        )
    refused = sorted(set(tried_sizes(target)) - set(taken))
    also = f"; {', '.join(map(str, refused))} are refused" if refused else ""
    return passed(f"{', '.join(map(str, taken))} are given, 0 and {target.width + 1} refused{also}")


def prompts(target: Target) -> Finding:
    prompt = target.query_prompt
    bare_ND = target.embed(SHORT_TEXTS)
    try:
        query_ND = target.embed(SHORT_TEXTS, query=True)
    except RefusedError as error:
        return Finding("skip", f"queries cannot be asked for, put the prompt in front yourself: {error}")
    differs = not same(query_ND, bare_ND, 1 - 1e-6)
    if prompt == "":
        if differs:
            return failed(
                "queries carry no prompt, but their vectors are not those of the bare texts.",
                "Check which prompt the target puts in front of queries.",
            )
        return passed("queries carry no prompt, and none is applied")
    if not differs:
        return failed(
            "a query has the same vector as the bare text: no prompt is applied.",
            "Put the model's prompt in front of queries yourself (--query-prompt '' says that the model has none).",
        )
    if prompt is None:
        return passed("a query's vector is not the bare text's; which prompt is applied is not said")
    if not same(query_ND, target.embed([prompt + text for text in SHORT_TEXTS])):
        return failed(
            f"a query's vector is not that of the text behind {prompt!r}.",
            "Apply exactly the prompt that is named, with its spaces and line breaks.",
        )
    return passed(f"a query's vector is that of the text behind {prompt!r}")


COMPUTED_CHECKS: list[Check[Target]] = [
    ("vectors", vectors),
    ("batch-invariance", batch_invariance),
    ("unit-norm", unit_norm),
    ("prefix", prefixes),
    ("dimensions", dimensions),
    ("prompts", prompts),
]
