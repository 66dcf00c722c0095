"""What benchmarks/train.py is made of: how a batch is cut for each contender, what is counted, what figures say."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from f2llm.errors import F2Error
from f2llm.model.decoder import DecoderConfig

if TYPE_CHECKING:
    from harness import Figure, Worker
    from train_step import Outcome

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# Two queries with their positives and three hard negatives each, as every contender gets them.
ROWS = ["q0", "q1", "p0", "p1", "n00", "n01", "n02", "n10", "n11", "n12"]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Scripted:
    """Stands for a worker process: answers `call` by a function, and keeps what it was asked."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        self.calls.append({"command": command, **arguments})
        return self.answer(command, **arguments)


def scripted(answer: Callable[..., Any]) -> "Worker":
    worker: Any = Scripted(answer)
    return worker


def test_parts_of_a_batch_keep_positives_and_negatives_with_their_queries() -> None:
    from workers.train_objective import part

    assert part(ROWS, 2, 0, 1) == ROWS
    assert part(ROWS, 2, 1, 2) == ["q1", "p1", "n10", "n11", "n12"]
    assert part(["q0", "q1", "p0", "p1"], 2, 0, 2) == ["q0", "p0"]


def test_columns_for_a_trainer_have_a_row_for_each_query() -> None:
    from workers.train_objective import columns

    rows = list(zip(*columns(ROWS, 2).values(), strict=True))
    assert rows == [("q0", "p0", "n00", "n01", "n02"), ("q1", "p1", "n10", "n11", "n12")]
    assert columns(["q", "p"], 1) == {"query": ["q"], "positive": ["p"]}


def test_micro_batches_of_the_peer_hold_every_text_once_and_no_more_than_their_budget() -> None:
    from workers.train_objective import micro_batches

    lengths = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for budget in (1, 99, 500, 100_000):
        batches = micro_batches(lengths, budget)
        order = [number for batch in batches for number in batch]
        assert sorted(order) == list(range(200))
        assert [lengths[n] for n in order] == sorted(lengths)
        padded = [len(batch) * max(lengths[n] for n in batch) for batch in batches]
        assert all(tokens <= budget or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True))
    assert len(micro_batches(lengths, 100_000)) == 1
    assert micro_batches([5, 3, 5], 10) == [
        [1, 0],
        [2],
    ]  # 3 tokens padded to 5 twice, then no room for another 5


def test_names_are_pairs_of_different_names_behind_the_instruction() -> None:
    from inputs import draw_names

    texts, _ = draw_names(300)
    assert len(texts) == 600
    queries, positives = texts[:300], texts[300:]
    assert len(set(queries)) > 290
    instructed = "Instruct: Translate this name\nQuery: "
    assert all(query.startswith(instructed) for query in queries)
    names = [query.removeprefix(instructed) for query in queries]
    assert all(name != positive for name, positive in zip(names, positives, strict=True))


SECONDS = {512: 3.0, 1024: 1.0, 2048: 2.0}


def test_the_peer_is_measured_at_its_fastest_and_ours_at_its_size_as_well() -> None:
    from train_step import compare

    def peer(command: str, **options: Any) -> Any:
        if command == "peak_memory":
            return 3 << 30
        return {"seconds": SECONDS[options["tokens"]], "loss": 2.0, "largest_mini_batch": 77}

    own = iter(
        [9.0, 9.0, 5.0, 50.0, 4.0, 40.0, 6.0, 60.0]
    )  # a warm-up and three rounds, as a whole and in parts

    def ours(command: str, **options: Any) -> Any:
        return 1 << 30 if command == "peak_memory" else {"seconds": next(own), "loss": 1.5}

    our_worker = scripted(ours)
    options = [{"tokens": tokens} for tokens in SECONDS]
    comparison = compare(our_worker, scripted(peer), options, {"kind": "joint"}, cached=True)
    assert comparison.options == {"tokens": 1024}
    assert comparison.steps["peer"]["seconds"] == 1.0
    assert comparison.steps["ours"] == {"seconds": 5.0, "loss": 1.5}
    assert comparison.steps["ours, cached"]["seconds"] == 50.0
    assert comparison.difference("loss") == 0.25
    assert comparison.gigabytes == (1.0, 3.0)
    asked: Any = our_worker
    assert asked.calls[:2] == [
        {"command": "step", "kind": "joint"},
        {"command": "step", "kind": "joint", "tokens_per_microbatch": 77},
    ]


def outcomes(**other: "Outcome") -> "dict[str, Outcome]":
    """For every peer the same comparison, or another one by the name of its module."""
    from train_step import PEERS, Comparison

    def steps(peer_loss: float) -> dict[str, dict[str, float]]:
        ours = {"seconds": 2.0, "loss": 1.0, "gradient_norm": 3.0}
        peer = {"seconds": 8.0, "loss": peer_loss, "gradient_norm": 3.0, "tokens": 100}
        return {"ours": ours, "ours, cached": {**ours, "seconds": 4.0}, "peer": peer}

    losses = {peer.name: 1.0 if number else 1.25 for number, peer in enumerate(PEERS)}
    return {
        peer.name: other.get(peer.module) or Comparison(steps(losses[peer.name]), (2.0, 8.0), {})
        for peer in PEERS
    }


def by_name(figures: "list[Figure]") -> "dict[str, Figure]":
    return {figure.name: figure for figure in figures}


def test_figures_of_all_comparisons() -> None:
    from train_step import figures

    found = by_name(figures(outcomes(), tokens=100))
    padded = found["tokens/s, peer padded to the longest"]
    assert (padded.ours, padded.peer, padded.ratio, padded.met) == (50.0, 12.5, 4.0, True)
    cached = found["tokens/s, both with cached gradients"]
    assert (cached.ours, cached.peer, cached.met) == (25.0, 12.5, None)
    assert found["peak memory in GB, peer padded to the longest"].ratio == 0.25
    loss = found["relative difference of the loss"]  # the largest of all
    assert (loss.ours, loss.met) == (0.2, False)
    assert found["relative difference of the gradient's norm"].ours == 0.0


def test_figures_without_a_peer() -> None:
    from harness import PeerMissing
    from train_step import figures

    found = by_name(figures(outcomes(train_sentence_transformers=PeerMissing("no data sets")), tokens=100))
    without = [name for name, figure in found.items() if figure.status == "skipped: no data sets"]
    assert len(without) == 4 and all("trainer" in name or "cached" in name for name in without)
    assert found["relative difference of the loss"].ours == 0.2

    found = by_name(figures(outcomes(train_transformers=PeerMissing("no transformers")), tokens=100))
    assert found["peak memory in GB, peer padded to the longest"].status == "skipped: no transformers"
    assert found["relative difference of the loss"].ours == 0.0


def test_a_peer_that_computed_other_texts_is_refused() -> None:
    from train_step import figures

    with pytest.raises(F2Error, match="padded computed 100 tokens, ours 101"):
        figures(outcomes(), tokens=101)


def test_share_of_arithmetic_is_of_the_best_product_there_was() -> None:
    from train_step import share_of_arithmetic

    # One layer, in which only keys and values (2 * 4 * 2) are for all tokens, the rest (2 * 4 * 4 + 3 * 4 * 5) for the
    # final one, whose query meets all 3 keys: forward 140 and 24, backward twice and 2.5 times as much.
    multiply_adds = 3 * (3 * 16 + 92) + 3.5 * (2 * 4 * 3)
    products = iter([1e9, 7e9, 8e9, 6e9])

    def ours(command: str) -> Any:
        return {"seconds": 1e-7} if command == "step" else next(products)

    figure = share_of_arithmetic(scripted(ours), DecoderConfig(10, 4, 5, 1, 2, 1, 2), [3])
    assert figure.ours == pytest.approx(multiply_adds / 1e-7 / 1e9)
    assert figure.peer == 8.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peak_of_a_gpu_is_found_by_its_name(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_gpu import share_of_peak

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    figure = share_of_peak(peak * 1e12 / 2)
    assert (figure.peer, figure.ratio, figure.met) == (peak, 0.5, True)


def test_an_unknown_gpu_has_no_share_of_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from train_gpu import share_of_peak

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Acme 1")
    assert share_of_peak(1e12).status == "skipped: no peak known for Acme 1"
