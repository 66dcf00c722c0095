"""The large batch of benchmarks/train.py: what a pair costs among 8,192 against among 512, and the memory for it.

The objective compares every query with every positive, so its work grows with the square of the batch, while that of
the decoder grows with the batch. 16 batches of 512 have the pairs of the large one, and all are cut into micro-batches
of as many tokens: small ones, since a batch's last micro-batch alone is spared the second forward pass of cached
gradients, which must not help a batch of few. Pairs are names in two languages, the queries with their instruction.
"""

from pathlib import Path

from f2llm.files import write_json
from f2llm.model.decoder import DecoderConfig
from harness import Part, Row, measured, take_turns, worker
from inputs import Size, describe, draw_names, make_model, token_ids

PAIRS = Size("5M", DecoderConfig(8000, 256, 768, 4, 4, 2, 64), real=False)
SMALL_BATCHES = 16  # have the pairs of the large one
MAX_LENGTH = 128  # tokens

TIME = Row("milliseconds a pair in a batch of 8,192, peer batches of 512", bar=1.15, better="lower")
MEMORY = Row("peak memory in GB of a batch of 8,192 pairs", bar=4, better="lower")


def large_batch(folder: Path, size: Size, pairs: int, tokens_per_microbatch: int) -> Part:
    """Time a pair and peak memory, in a process of its own."""
    texts, origin = draw_names(pairs)
    model = make_model(folder / "model", size, texts, MAX_LENGTH)
    ids = token_ids(model, texts)
    write_json(folder / "ids.json", ids)
    inputs = {
        **describe(size, model, ids, origin),
        "pairs": pairs,
        "tokens_per_microbatch": tokens_per_microbatch,
    }
    print(f"pairs: {inputs}", flush=True)
    with worker("train_ours", folder / "model", folder / "ids.json", pairs, keep_memory=True) as ours:

        def seconds(batches: int) -> float:
            report = ours.call("step", tokens_per_microbatch=tokens_per_microbatch, batches=batches)
            return float(report["seconds"])

        medians = take_turns({"one": lambda: seconds(1), "many": lambda: seconds(SMALL_BATCHES)})
        figures = [
            measured(TIME, *(1000 * medians[name] / pairs for name in ("one", "many"))),
            measured(MEMORY, ours.call("peak_memory") / 2**30),
        ]
        return Part(figures, {"large_batch": inputs}, {"ours, large batch": ours.facts})
