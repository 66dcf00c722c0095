"""A training step on the CPU: ours, ragged, against one batch padded to its longest through transformers.

Same weights, same texts, same objective (queries, their positives and seven hard negatives each, drawn from the
length mix of the development data); forward, objective and backward, no optimizer step on either side. Tokens are
real ones. The peer runs twice: as it is, and with our memory policy.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from f2llm.files import write_json
from harness import (
    Figure,
    PeerMissing,
    Row,
    Worker,
    finish,
    measured,
    relative_difference,
    skipped,
    start,
    take_turns,
    worker,
)
from inputs import DOCUMENTS, FULL, QUERIES, SMALL, Size, describe, draw_texts, make_model, token_ids

HARD_NEGATIVES = 7
# Padded to 512 tokens the step of the peer would take more than 20 GB. A longer limit would favour us.
MAX_LENGTH = 256  # tokens

SPEED = Row("tokens/s, peer padded to the longest", bar=4)
MEMORY = Row("peak memory in GB, peer padded to the longest", bar=0.5, better="lower")
LOSS = Row("relative difference of the loss", bar=1e-4, better="lower")
GRADIENT = Row("relative difference of the gradient's norm", bar=1e-4, better="lower")
SPEED_POLICY = Row("tokens/s, peer padded to the longest and with our memory policy")


def draw_batch(size: Size, queries: int) -> tuple[list[str], str]:
    """Texts (queries, positives, negatives) and where they come from.

    Which document belongs to which query makes no difference to the work, so they are drawn apart.
    """
    query_texts, query_origin = draw_texts(size, QUERIES, queries)
    document_texts, document_origin = draw_texts(size, DOCUMENTS, queries * (1 + HARD_NEGATIVES))
    return [*query_texts, *document_texts], f"{query_origin}; {document_origin}"


def compare(ours: Worker, peer: Worker) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of both, with loss and gradient norm of their last step."""
    last: dict[str, dict[str, float]] = {}

    def turn(name: str, contender: Worker) -> Callable[[], float]:
        def step() -> float:
            last[name] = contender.call("step")
            return last[name]["seconds"]

        return step

    seconds = take_turns({"ours": turn("ours", ours), "peer": turn("peer", peer)})
    return last["ours"] | {"seconds": seconds["ours"]}, last["peer"] | {"seconds": seconds["peer"]}


def against_default_allocator(ours: Worker, peer: Worker, tokens: int) -> list[Figure]:
    """The promised figures, and the checks that both did the same work."""
    our_step, peer_step = compare(ours, peer)
    our_gigabytes, peer_gigabytes = (contender.call("peak_memory") / 2**30 for contender in (ours, peer))
    return [
        measured(SPEED, tokens / our_step["seconds"], tokens / peer_step["seconds"]),
        measured(MEMORY, our_gigabytes, peer_gigabytes),
        measured(LOSS, relative_difference(our_step["loss"], peer_step["loss"])),
        measured(GRADIENT, relative_difference(our_step["gradient_norm"], peer_step["gradient_norm"])),
    ]


def against_our_policy(ours: Worker, peer: Worker, tokens: int) -> Figure:
    """The same with our memory policy on the peer's side too: what is left is padding and the decoder."""
    our_step, peer_step = compare(ours, peer)
    return measured(SPEED_POLICY, tokens / our_step["seconds"], tokens / peer_step["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--small", action="store_true", help="a tiny model and few texts: a trial, no figures"
    )
    size, queries = (SMALL, 3) if parser.parse_args().small else (FULL, 6)
    started = start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts, origin = draw_batch(size, queries)
        model = make_model(folder / "model", size, texts, MAX_LENGTH)
        ids = token_ids(model, texts)
        tokens = sum(map(len, ids))
        inputs: dict[str, Any] = {
            **describe(size, model, ids, origin),
            "queries": queries,
            "hard_negatives": HARD_NEGATIVES,
            "padded_tokens": len(ids) * max(map(len, ids)),
        }
        print(f"batch: {inputs}", flush=True)
        write_json(folder / "ids.json", ids)
        arguments = (folder / "model", folder / "ids.json", queries)
        with worker("train_ours", *arguments, keep_memory=True) as ours:
            workers = {"ours": ours.facts}
            try:
                # One peer after the other: two padded steps would not fit into memory together.
                with worker("train_transformers", *arguments, peer=True) as peer:
                    figures = against_default_allocator(ours, peer, tokens)
                    workers["peer"] = peer.facts
                with worker("train_transformers", *arguments, peer=True, keep_memory=True) as peer:
                    figures.append(against_our_policy(ours, peer, tokens))
                    workers["peer, our memory policy"] = peer.facts
            except PeerMissing as missing:
                rows = (SPEED, MEMORY, LOSS, GRADIENT, SPEED_POLICY)
                figures = [skipped(row, str(missing)) for row in rows]
    finish(figures, started, inputs=inputs, workers=workers)


if __name__ == "__main__":
    main()
