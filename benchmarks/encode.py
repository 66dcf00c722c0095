"""Encoding on the CPU: `Embedder.encode` against sentence-transformers, same weights, same texts, in turns.

The peer runs at its default batch size and at its best of 1, 2, 4 ... 32 (found first, one pass each), both without
and with our memory policy; tokens are real ones, and both sides are timed from strings to vectors. Counted as
multiply-adds are those that the vectors cannot be had without. Then int8, as told in encode_int8.py, and short queries
behind one instruction, with and without computing it once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encode_int8 import int8_part
from f2llm.files import write_json
from f2llm.model.decoder import DecoderConfig
from f2llm.model.folder import Model
from f2llm.model.prompts import query_prefix
from f2llm.plan.cost import Load, forward_flops
from harness import Figure, Part, PeerMissing, Row, Worker, benchmark, measured, skipped, take_turns, worker
from inputs import EVERYTHING, FULL, QUERIES, SMALL, Size, describe, draw_texts, make_model, token_ids

DEFAULT_BATCH = 32  # sentence-transformers' own
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_LENGTH = 512  # tokens
QUERY_TOKENS = range(11, 14)
QUERIES_IN_TURN = 256
INSTRUCTION = "Given a question in any language, find the passages that answer it in a collection of texts"

AT_DEFAULT = Row("tokens/s, peer at its default batch size", bar=6)
AT_BEST = Row("tokens/s, peer at its best batch size", bar=1.9)
COSINE = Row("smallest cosine between our vectors and the peer's", bar=0.99999)
ARITHMETIC = Row("billion multiply-adds/s of encoding, peer torch.mm alone", bar=0.75)
SHARED_PREFIX = Row("queries/s of 12 tokens behind 25 of an instruction, peer without sharing them", bar=2)
SAME_BEHIND = Row("smallest cosine between their vectors with and without sharing", bar=0.99999)
AT_BEST_POLICY = Row("tokens/s, peer at its best batch size and with our memory policy")


def best_batch(peer: Worker) -> int:
    """The peer's fastest batch size, after a warm-up."""
    peer.call("encode", batch_size=DEFAULT_BATCH)
    seconds = {size: peer.call("encode", batch_size=size) for size in BATCH_SIZES}
    print(
        f"seconds by batch size: { {size: round(value, 2) for size, value in seconds.items()} }", flush=True
    )
    return min(seconds, key=lambda size: seconds[size])


def smallest_cosine(ours: Worker, peer: Worker, folder: Path) -> float:
    vectors = []
    for contender in (ours, peer):
        path = folder / f"{contender.name}.npy"
        contender.call("save_vectors", path=str(path))
        vectors.append(np.load(path).astype(np.float64))
    ours_ND, peer_ND = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    return float((ours_ND * peer_ND).sum(axis=1).min())


def against_default_allocator(
    ours: Worker, peer: Worker, folder: Path, tokens: int
) -> tuple[list[Figure], int]:
    """The promised figures, and the batch size at which the peer was best."""
    best = best_batch(peer)
    seconds = take_turns(
        {
            "ours": lambda: ours.call("encode"),
            "default": lambda: peer.call("encode", batch_size=DEFAULT_BATCH),
            "best": lambda: peer.call("encode", batch_size=best),
        }
    )
    speed = {name: tokens / value for name, value in seconds.items()}
    figures = [
        measured(AT_DEFAULT, speed["ours"], speed["default"]),
        measured(AT_BEST, speed["ours"], speed["best"]),
        measured(COSINE, smallest_cosine(ours, peer, folder)),
    ]
    return figures, best


def against_our_policy(ours: Worker, peer: Worker, tokens: int) -> tuple[Figure, int]:
    """The same with our memory policy on the peer's side too: what is left is the decoder and the batching."""
    best = best_batch(peer)
    seconds = take_turns(
        {"ours": lambda: ours.call("encode"), "peer": lambda: peer.call("encode", batch_size=best)}
    )
    return measured(AT_BEST_POLICY, tokens / seconds["ours"], tokens / seconds["peer"]), best


def share_of_arithmetic(ours: Worker, config: DecoderConfig, lengths: Sequence[int]) -> Figure:
    """Multiply-adds that encoding cannot do without, a second, beside the most that `torch.mm` did; in turns."""
    products: list[float] = []

    def product() -> float:
        products.append(ours.call("matrix_product"))
        return products[-1]

    medians = take_turns({"encode": lambda: ours.call("encode"), "product": product})
    needed = sum(forward_flops(config, Load.of(lengths))) / 2
    return measured(ARITHMETIC, needed / medians["encode"] / 1e9, max(products) / 1e9)


def shared_prefix(folder: Path, size: Size, model: Model) -> Part:
    """Queries of about the published length behind one instruction, computed once or with each query."""
    drawn, origin = draw_texts(size, QUERIES, 4096 if size.real else 256)
    lengths = {text: len(ids) for text, ids in zip(drawn, token_ids(model, drawn), strict=True)}
    queries = [text for text in drawn if lengths[text] in QUERY_TOKENS][:QUERIES_IN_TURN]
    write_json(folder / "queries.json", queries)
    with worker(
        "encode_queries", folder / "model", folder / "queries.json", INSTRUCTION, keep_memory=True
    ) as one:
        seconds = take_turns(
            {
                "shared": lambda: one.call("encode", share=True),
                "whole": lambda: one.call("encode", share=False),
            }
        )
        figures = [
            measured(SHARED_PREFIX, len(queries) / seconds["shared"], len(queries) / seconds["whole"]),
            measured(SAME_BEHIND, one.call("smallest_cosine")),
        ]
    prompt = token_ids(model, [query_prefix(INSTRUCTION)])[0]
    facts = {
        "queries": len(queries),
        "origin": origin,
        "tokens_of_a_query": sum(lengths[text] for text in queries) / len(queries),
        "tokens_of_the_instruction": len(prompt) - 1,
    }
    return Part(figures, {"prefix": facts}, {"prefix": one.facts})


def parts(folder: Path, small: bool) -> list[Part]:
    size, count = (SMALL, 24) if small else (FULL, 128)
    texts, origin = draw_texts(size, EVERYTHING, count)
    model = make_model(folder / "model", size, texts, MAX_LENGTH)
    inputs: dict[str, Any] = describe(size, model, token_ids(model, texts), origin)
    print(f"texts: {inputs}", flush=True)
    write_json(folder / "texts.json", texts)
    arguments = (folder / "model", folder / "texts.json")
    peer_name = "encode_sentence_transformers"
    with worker("encode_ours", *arguments, keep_memory=True) as ours:
        tokens = ours.call("tokens")
        arithmetic = share_of_arithmetic(ours, size.decoder, list(map(len, token_ids(model, texts))))
        workers = {"ours": ours.facts}
        try:
            with worker(peer_name, *arguments, peer=True) as peer:
                figures, batch = against_default_allocator(ours, peer, folder, tokens)
                workers["peer"] = {**peer.facts, "best_batch_size": batch}
            with worker(peer_name, *arguments, peer=True, keep_memory=True) as peer:
                figure, batch = against_our_policy(ours, peer, tokens)
                figures.append(figure)
                workers["peer, our memory policy"] = {**peer.facts, "best_batch_size": batch}
        except PeerMissing as missing:
            rows = (AT_DEFAULT, AT_BEST, COSINE, AT_BEST_POLICY)
            figures = [skipped(row, str(missing)) for row in rows]
    return [
        Part([*figures, arithmetic], inputs, workers),
        int8_part(folder, size, MAX_LENGTH),
        shared_prefix(folder, size, model),
    ]


def main() -> None:
    benchmark(__doc__, parts)


if __name__ == "__main__":
    main()
