"""The step of benchmarks/train.py on the CPU: its peers as data, and how each is compared with ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from f2llm.errors import F2Error
from f2llm.files import write_json
from f2llm.model.decoder import DecoderConfig
from f2llm.plan.cost import Load, training_flops
from f2llm.text import clean
from harness import (
    Figure,
    Part,
    PeerMissing,
    Row,
    Worker,
    measured,
    relative_difference,
    skipped,
    take_turns,
    worker,
)
from inputs import DOCUMENTS, QUERIES, Size, describe, draw_texts, make_model, token_ids

HARD_NEGATIVES = 7
# Padded to 512 tokens the step of the peer would take more than 20 GB. A longer limit would favour us.
MAX_LENGTH = 256  # tokens

# One batch of all is the padded step. Padding on the right needs no mask in a causal decoder, and transformers is
# faster without.
MICRO_BATCHES = [{"padded_tokens": tokens, "mask": False} for tokens in (512, 1024, 2048, 4096)]
# Of a column (queries, positives, first negatives ...), which has a text for each query.
MINI_BATCHES = [
    *({"mini_batch_size": texts} for texts in (1, 2, 3, 6)),
    *({"mini_batch_num_tokens": tokens} for tokens in (256, 512)),
]

MEMORY = Row("peak memory in GB, peer padded to the longest", bar=0.5, better="lower")
LOSS = Row("relative difference of the loss", bar=1e-4, better="lower")
GRADIENT = Row("relative difference of the gradient's norm", bar=1e-4, better="lower")
ARITHMETIC = Row("billion multiply-adds/s of the step, peer torch.mm alone", bar=0.55)


@dataclass(frozen=True)
class Peer:
    """One way in which a peer takes our step."""

    name: str  # its process, in the result
    speed: Row
    module: str  # its worker
    options: Sequence[dict[str, Any]]  # of its `step`: the fastest count
    keep_memory: bool
    reads: str = "ids.json"
    our_options: dict[str, Any] = field(default_factory=dict)
    cached: Row | None = None  # the same, with ours in micro-batches of the peer's size


PADDED = Peer(
    "transformers, padded",
    Row("tokens/s, peer padded to the longest", bar=4),
    "train_transformers",
    [{}],
    keep_memory=False,
)
PEERS = [
    PADDED,
    Peer(
        "transformers, padded, our memory policy",
        Row("tokens/s, peer padded to the longest and with our memory policy"),
        "train_transformers",
        [{}],
        keep_memory=True,
    ),
    Peer(
        "transformers, micro-batches",
        Row("tokens/s, peer in length-sorted micro-batches", bar=1.7),
        "train_transformers",
        MICRO_BATCHES,
        keep_memory=False,
    ),
    Peer(
        "transformers, micro-batches, our memory policy",
        Row("tokens/s, peer in length-sorted micro-batches and with our memory policy", bar=1.5),
        "train_transformers",
        MICRO_BATCHES,
        keep_memory=True,
    ),
    Peer(
        "sentence-transformers' trainer",
        Row("tokens/s, peer sentence-transformers' trainer", bar=2),
        "train_sentence_transformers",
        MINI_BATCHES,
        keep_memory=False,
        reads="texts.json",
        our_options={"kind": "joint"},
        cached=Row("tokens/s, both with cached gradients"),
    ),
    Peer(
        "sentence-transformers' trainer, our memory policy",
        Row("tokens/s, peer sentence-transformers' trainer with our memory policy", bar=2),
        "train_sentence_transformers",
        MINI_BATCHES,
        keep_memory=True,
        reads="texts.json",
        our_options={"kind": "joint"},
        cached=Row("tokens/s, both with cached gradients and our memory policy"),
    ),
]


@dataclass(frozen=True)
class Comparison:
    """What came of ours and a peer in turns."""

    steps: dict[str, dict[str, float]]  # by contender: the last report, with the median of seconds
    gigabytes: tuple[float, float]  # peak memory of ours and of the peer
    options: dict[str, Any]  # the peer's fastest

    def tokens_per_second(self, tokens: int, ours: str = "ours") -> tuple[float, float]:
        """Of ours and of the peer."""
        return tokens / self.steps[ours]["seconds"], tokens / self.steps["peer"]["seconds"]

    def difference(self, what: str) -> float:
        return relative_difference(self.steps["ours"][what], self.steps["peer"][what])


Outcome = Comparison | PeerMissing


def step_on_cpu(folder: Path, size: Size, queries: int) -> Part:
    """All figures of one batch of `queries` queries, their positives and hard negatives."""
    inputs, lengths = make_batch(folder, size, queries)
    with worker("train_ours", folder / "model", folder / "ids.json", queries, keep_memory=True) as ours:
        workers = {"ours": ours.facts}
        outcomes: dict[str, Outcome] = {}
        missing: dict[str, PeerMissing] = {}  # by module
        for peer in PEERS:  # one after the other: two padded steps would not fit into memory together
            outcomes[peer.name] = missing.get(peer.module) or _meet(ours, peer, folder, queries, workers)
            if isinstance(reason := outcomes[peer.name], PeerMissing):
                missing[peer.module] = reason
        arithmetic = share_of_arithmetic(ours, size.decoder, lengths)
    return Part([*figures(outcomes, sum(lengths)), arithmetic], inputs, workers)


def make_batch(folder: Path, size: Size, queries: int) -> tuple[dict[str, Any], list[int]]:
    """Write model, texts.json and ids.json (queries, positives, negatives); what they are, and tokens of each text.

    Which document belongs to which query makes no difference to the work, so they are drawn apart.
    """
    query_texts, query_origin = draw_texts(size, QUERIES, queries)
    document_texts, document_origin = draw_texts(size, DOCUMENTS, queries * (1 + HARD_NEGATIVES))
    texts = [clean(text) for text in (*query_texts, *document_texts)]
    model = make_model(folder / "model", size, texts, MAX_LENGTH)
    ids = token_ids(model, texts)
    write_json(folder / "texts.json", texts)
    write_json(folder / "ids.json", ids)
    inputs = {
        **describe(size, model, ids, f"{query_origin}; {document_origin}"),
        "queries": queries,
        "hard_negatives": HARD_NEGATIVES,
        "padded_tokens": len(ids) * max(map(len, ids)),
    }
    print(f"batch: {inputs}", flush=True)
    return inputs, [len(sequence) for sequence in ids]


def _meet(
    ours: Worker, peer: Peer, folder: Path, queries: int, workers: dict[str, dict[str, Any]]
) -> Outcome:
    """Start the peer, compare, and note its process in `workers`."""
    print(f"peer: {peer.name}", flush=True)
    arguments = (folder / "model", folder / peer.reads, queries)
    try:
        with worker(peer.module, *arguments, peer=True, keep_memory=peer.keep_memory) as process:
            comparison = compare(ours, process, peer.options, peer.our_options, cached=bool(peer.cached))
    except PeerMissing as missing:
        return missing
    workers[peer.name] = {**process.facts, **comparison.options}
    return comparison


def compare(
    ours: Worker,
    peer: Worker,
    options: Sequence[dict[str, Any]],
    our_options: dict[str, Any],
    cached: bool = False,
) -> Comparison:
    """Ours and the peer in turns, the peer at its fastest; if `cached`, ours in micro-batches of its size as well."""
    best = fastest(peer, options)
    contenders = {
        "ours": partial(ours.call, "step", **our_options),
        "peer": partial(peer.call, "step", **best),
    }
    if cached:
        tokens = contenders["peer"]()["largest_mini_batch"]
        contenders["ours, cached"] = partial(contenders["ours"], tokens_per_microbatch=tokens)
    last: dict[str, dict[str, float]] = {}

    def turn(name: str, step: Callable[[], dict[str, float]]) -> float:
        last[name] = step()
        return last[name]["seconds"]

    medians = take_turns({name: partial(turn, name, step) for name, step in contenders.items()})
    return Comparison(
        {name: {**last[name], "seconds": seconds} for name, seconds in medians.items()},
        (ours.call("peak_memory") / 2**30, peer.call("peak_memory") / 2**30),
        best,
    )


def fastest(peer: Worker, options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of the peer's fastest step, each tried once after a warm-up."""
    if len(options) == 1:
        return options[0]
    peer.call("step", **options[0])
    seconds = [peer.call("step", **some)["seconds"] for some in options]
    tried = [(some, round(value, 2)) for some, value in zip(options, seconds, strict=True)]
    print(f"seconds by option: {tried}", flush=True)
    return options[seconds.index(min(seconds))]


def figures(outcomes: dict[str, Outcome], tokens: int) -> list[Figure]:
    """The figures of all comparisons, or why there are none."""

    def figure(row: Row, outcome: Outcome, values: Callable[[Comparison], tuple[float, ...]]) -> Figure:
        return (
            skipped(row, str(outcome))
            if isinstance(outcome, PeerMissing)
            else measured(row, *values(outcome))
        )

    def speed(row: Row, outcome: Outcome, ours: str = "ours") -> Figure:
        return figure(row, outcome, lambda comparison: comparison.tokens_per_second(tokens, ours))

    def largest_difference(row: Row, what: str) -> Figure:
        found = [outcome for outcome in outcomes.values() if isinstance(outcome, Comparison)]
        return figure(
            row,
            found[0] if found else outcomes[PADDED.name],
            lambda _: (max(comparison.difference(what) for comparison in found),),
        )

    for name, outcome in outcomes.items():
        computed = outcome.steps["peer"].get("tokens", tokens) if isinstance(outcome, Comparison) else tokens
        if computed != tokens:
            raise F2Error(
                f"{name} computed {computed} tokens, ours {tokens}; they must be given the same texts."
            )
    return [
        *(speed(peer.speed, outcomes[peer.name]) for peer in PEERS),
        *(speed(peer.cached, outcomes[peer.name], "ours, cached") for peer in PEERS if peer.cached),
        figure(MEMORY, outcomes[PADDED.name], lambda comparison: comparison.gigabytes),
        largest_difference(LOSS, "loss"),
        largest_difference(GRADIENT, "gradient_norm"),
    ]


def share_of_arithmetic(ours: Worker, config: DecoderConfig, lengths: Sequence[int]) -> Figure:
    """Multiply-adds that our step cannot do without, a second, beside the most that `torch.mm` did; in turns."""
    products: list[float] = []

    def product() -> float:
        products.append(ours.call("matrix_product"))
        return products[-1]

    medians = take_turns({"step": lambda: ours.call("step")["seconds"], "product": product})
    step = training_flops(config, Load.of(lengths)) / 2 / medians["step"]
    return measured(ARITHMETIC, step / 1e9, max(products) / 1e9)
