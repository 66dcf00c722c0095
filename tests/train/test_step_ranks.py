"""A step on several ranks: the same loss and the same gradients as on one, whatever the objective and the batch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.gloo import on_ranks
from tests.train.test_ranks import difference, make_decoder, whole
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.train.objective import NONE, Kind, Roles, contrastive_terms, distillation_term, matryoshka_sizes
from f2llm.train.ranks import Ranks, shard
from f2llm.train.step import Ids, accumulate_gradients, cut, vectors_of

QUERIES = 9


@dataclass(frozen=True)
class Case:
    """A batch, an objective, and how the step is computed on ranks."""

    texts: int = 40
    tokens_per_microbatch: int = 10_000
    kind: Kind = "f2llm-v2"
    gather_gradient: bool = True
    both_directions: bool = False
    hard_negatives: int = 3
    matryoshka: bool = True
    distilled: bool = False
    temperature_is_learnt: bool = False
    activation_checkpointing: bool = False
    sum_each: bool = False


JOINT = Case(kind="joint", both_directions=True)
EVERYTHING = replace(JOINT, distilled=True, temperature_is_learnt=True)
CASES = {
    "two softmaxes": Case(),
    "positives without in-batch gradient": Case(gather_gradient=False),
    "one softmax in both directions": JOINT,
    "one softmax in one direction": replace(JOINT, both_directions=False),
    "no hard negatives": Case(hard_negatives=0),
    "full width only": Case(matryoshka=False),
    "distillation": Case(distilled=True),
    "learnt temperature": Case(temperature_is_learnt=True),
    "everything": EVERYTHING,
    "recomputed activations": replace(EVERYTHING, activation_checkpointing=True),
    "some micro-batches": replace(EVERYTHING, tokens_per_microbatch=100),
    "a micro-batch a text": replace(EVERYTHING, tokens_per_microbatch=1),
    "micro-batches, recomputed": replace(EVERYTHING, tokens_per_microbatch=50, activation_checkpointing=True),
    "summed after each": replace(EVERYTHING, tokens_per_microbatch=50, sum_each=True),
    "summed after each, recomputed": replace(
        EVERYTHING, tokens_per_microbatch=100, sum_each=True, activation_checkpointing=True
    ),
    "one text": Case(texts=1, distilled=True),
    "two texts": Case(texts=2, distilled=True),
    "one micro-batch more on a rank": replace(EVERYTHING, texts=4, tokens_per_microbatch=1),
    "the same, summed after each": replace(EVERYTHING, texts=4, tokens_per_microbatch=1, sum_each=True),
}


def make_ids(case: Case) -> Ids:
    rng = np.random.default_rng(3)
    return [rng.integers(50, size=length).tolist() for length in rng.integers(1, 30, size=case.texts)]


def make_roles(case: Case) -> Roles:
    """Roles at random: texts play several parts, some negatives are missing, some pairs are known to be right."""
    rng = np.random.default_rng(4)
    negative_BK = rng.integers(NONE, case.texts, size=(QUERIES, case.hard_negatives))
    negative_BK[0] = NONE
    same_BB = rng.random((QUERIES, QUERIES)) < 0.2
    known_P2 = np.stack((rng.integers(QUERIES, size=5), rng.integers(case.texts, size=5)), axis=1)
    query_B, positive_B = (rng.integers(case.texts, size=QUERIES) for _ in range(2))
    parts = (query_B, positive_B, negative_BK, same_BB, known_P2)
    return Roles(*map(torch.from_numpy, parts), True)  # type: ignore[arg-type]


def make_loss(case: Case, temperature: Tensor, teacher_ND: Tensor) -> Callable[[Tensor], Tensor]:
    roles = make_roles(case)

    def loss_of(vectors_ND: Tensor) -> Tensor:
        width = vectors_ND.shape[1]
        terms = contrastive_terms(
            vectors_ND,
            roles,
            matryoshka_sizes(width) if case.matryoshka else [width],
            temperature,
            kind=case.kind,
            gather_gradient=case.gather_gradient,
            both_directions=case.both_directions,
        )
        if case.distilled:
            terms["distillation"] = distillation_term(vectors_ND, teacher_ND, roles)
        return torch.stack(list(terms.values())).sum()

    return loss_of


def make_teacher() -> Decoder:
    """Another decoder, of the same width."""
    teacher = make_decoder()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.flip(0)
    return teacher


def make_temperature(case: Case) -> Tensor:
    return torch.tensor(0.05, requires_grad=case.temperature_is_learnt)


@dataclass(frozen=True)
class Outcome:
    """What a step gives."""

    loss: float
    vectors_ND: Tensor
    temperature: Tensor | None  # its gradient
    gradients: dict[str, Tensor]
    gathers: int = 0  # of a group of weights from all ranks
    sums: int = 0  # of a group of gradients over all ranks


def outcome(loss: Tensor, vectors_ND: Tensor, temperature: Tensor, decoder: nn.Module) -> Outcome:
    gradients = {name: whole(parameter.grad) for name, parameter in decoder.named_parameters()}
    decoder.zero_grad(set_to_none=True)
    return Outcome(loss.item(), vectors_ND.detach(), temperature.grad, gradients)


class Counted(TorchDispatchMode):
    """Calls of collectives within it, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def all_steps(ranks: Ranks) -> dict[str, Outcome]:
    """Every case on these ranks."""
    decoders = {}
    for recomputed in (False, True):
        shard(decoder := make_decoder(), ranks, "fp32", recomputed)
        decoders[recomputed] = decoder
    shard(teacher := make_teacher(), ranks, "fp32", activation_checkpointing=False)
    outcomes = {}
    for name, case in CASES.items():
        ids, budget, temperature = make_ids(case), case.tokens_per_microbatch, make_temperature(case)
        loss_of = make_loss(case, temperature, vectors_of(teacher, ids, budget, ranks))
        decoder = decoders[case.activation_checkpointing]
        with Counted() as counted:
            step = accumulate_gradients(decoder, ids, loss_of, budget, ranks, case.sum_each)
        gathers, sums = counted.calls["_allgather_base_"], counted.calls["_reduce_scatter_base_"]
        outcomes[name] = replace(outcome(*step, temperature, decoder), gathers=gathers, sums=sums)
    return outcomes


@pytest.fixture(scope="module")
def one() -> dict[str, Outcome]:
    """Every case in one plain pass over the whole batch, by autograd alone."""
    outcomes = {}
    for name, case in CASES.items():
        decoder, ids, temperature = make_decoder(), make_ids(case), make_temperature(case)
        vectors_ND = forward(decoder, ids)
        loss = make_loss(case, temperature, forward(make_teacher(), ids).detach())(vectors_ND)
        loss.backward()
        outcomes[name] = outcome(loss, vectors_ND, temperature, decoder)
    return outcomes


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    return on_ranks(request.param, all_steps)


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_do_the_step_of_one(
    name: str, one: dict[str, Outcome], several: list[dict[str, Outcome]]
) -> None:
    """Loss and each tensor's gradient to 1e-5 of its largest element, in float32."""
    expected = one[name]
    assert all(gradient.abs().max() > 0 for gradient in expected.gradients.values())
    for rank in several:
        got = rank[name]
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(got.vectors_ND, expected.vectors_ND, rtol=1e-5, atol=1e-5)
        assert difference(got.gradients, expected.gradients) < 1e-5


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.temperature_is_learnt])
def test_a_learnt_temperature_has_one_gradient_everywhere(
    name: str, one: dict[str, Outcome], several: list[dict[str, Outcome]]
) -> None:
    """It is no part of the decoder, so nothing sums it over ranks: each has the whole, the same to the bit."""
    expected = one[name].temperature
    first, *others = (rank[name].temperature for rank in several)
    assert first is not None and expected is not None
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=0)
    assert all(other is not None and torch.equal(other, first) for other in others)


def test_what_travels_between_ranks(several: list[dict[str, Outcome]]) -> None:
    """Two layers and the rest: gradients once a step, or once a micro-batch if asked for; weights likewise."""
    parts = 3
    for rank in several:
        for name, case in CASES.items():
            lengths = list(map(len, make_ids(case)))
            budget = case.tokens_per_microbatch
            micro_batches = len(
                cut(lengths, budget, Ranks(0, len(several), torch.device("cpu"))).micro_batches
            )
            got = rank[name]
            assert got.sums == parts * (micro_batches if case.sum_each else 1), name
            if micro_batches > 1 and not case.sum_each:
                assert got.gathers == parts, name
            elif case.sum_each:  # for each forward pass at least, and all but the last micro-batch have two
                assert got.gathers >= parts * (2 * micro_batches - 1), name
