"""A step on several ranks: the same loss and the same gradients as on one, whatever the objective and the batch."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.train.gloo import on_ranks
from tests.train.runs import mse_to
from tests.train.test_ranks import difference, make_decoder, whole
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.train.lora import add_lora
from f2llm.train.objective import NONE, Kind, Roles, contrastive_terms, matryoshka_sizes
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
    lora: bool = False


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
    "one micro-batch more on a rank": replace(EVERYTHING, texts=7, tokens_per_microbatch=1),
    "the same, summed after each": replace(EVERYTHING, texts=7, tokens_per_microbatch=1, sum_each=True),
}
ADAPTERS = {
    "adapters": replace(EVERYTHING, tokens_per_microbatch=100, lora=True),
    "adapters, summed after each, recomputed": replace(
        EVERYTHING, tokens_per_microbatch=50, sum_each=True, activation_checkpointing=True, lora=True
    ),
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
    return Roles(
        torch.from_numpy(query_B),
        torch.from_numpy(positive_B),
        torch.from_numpy(negative_BK),
        torch.from_numpy(same_BB),
        torch.from_numpy(known_P2),
        in_batch=True,
    )


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
            terms["distillation"] = mse_to(teacher_ND, vectors_ND, roles)
        return torch.stack(list(terms.values())).sum()

    return loss_of


def make_teacher() -> Decoder:
    """Another decoder, of the same width."""
    teacher = make_decoder()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.flip(0)
    return teacher


def make_student(lora: bool) -> Decoder:
    """The decoder, or one with adapters that are not at zero as at their start."""
    decoder = make_decoder()
    if lora:
        add_lora(decoder, rank=2, alpha=4.0, seed=5)
        generator = torch.Generator().manual_seed(6)
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


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
    learnt = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    gradients = {name: whole(parameter.grad) for name, parameter in learnt.items()}
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


def steps(ranks: Ranks, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Every case on these ranks."""
    decoders = {}
    for lora, recomputed in {(case.lora, case.activation_checkpointing) for case in cases.values()}:
        shard(decoder := make_student(lora), ranks, "fp32", recomputed)
        decoders[lora, recomputed] = decoder
    shard(teacher := make_teacher(), ranks, "fp32", activation_checkpointing=False)
    outcomes = {}
    for name, case in cases.items():
        ids, budget, temperature = make_ids(case), case.tokens_per_microbatch, make_temperature(case)
        loss_of = make_loss(case, temperature, vectors_of(teacher, ids, budget, ranks))
        decoder = decoders[case.lora, case.activation_checkpointing]
        with Counted() as counted:
            step = accumulate_gradients(decoder, ids, loss_of, budget, ranks, case.sum_each)
        gathers, sums = counted.calls["_allgather_base_"], counted.calls["_reduce_scatter_base_"]
        outcomes[name] = replace(outcome(*step, temperature, decoder), gathers=gathers, sums=sums)
    return outcomes


def plain_step(case: Case) -> Outcome:
    """One plain pass over the whole batch, by autograd alone."""
    decoder, ids, temperature = make_student(case.lora), make_ids(case), make_temperature(case)
    vectors_ND = forward(decoder, ids)
    loss = make_loss(case, temperature, forward(make_teacher(), ids).detach())(vectors_ND)
    loss.backward()
    return outcome(loss, vectors_ND, temperature, decoder)


# The step of the reference code (codefuse-ai/CodeFuse-Embeddings), which is data parallel: each rank encodes rows of
# its own, sees the positives of the others through a gather without gradient, and gradients are averaged over ranks.
# It knows no pairs to leave out, and each text has one part.

PAIRS, NEGATIVES = 6, 2
PARTS_PR = torch.arange(PAIRS * (2 + NEGATIVES)).view(PAIRS, 2 + NEGATIVES)  # text of each part of each row
THEIRS = Case(texts=PARTS_PR.numel(), gather_gradient=False)


def step_of_the_reference_code(ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of the decoder."""
    decoder, ids, here = make_decoder(), make_ids(THEIRS), PAIRS // ranks.world
    mine = PARTS_PR[ranks.rank * here : (ranks.rank + 1) * here]
    parts_PRD = forward(decoder, [ids[text] for text in mine.flatten().tolist()]).unflatten(0, mine.shape)
    positives_PD = parts_PRD[:, 1].detach().contiguous()
    gathered_PD = [torch.empty_like(positives_PD) for _ in range(ranks.world)]
    dist.all_gather(gathered_PD, positives_PD)
    loss = torch.zeros(())
    for size, weight in ((8, 1 / (3 * math.sqrt(24 / 8))), (16, 1 / (2 * math.sqrt(24 / 16))), (24, 1.0)):
        q_PD, *documents = F.normalize(parts_PRD[..., :size], dim=-1).unbind(1)
        everybody = F.normalize(torch.cat(gathered_PD)[:, :size], dim=-1)
        own_P = torch.arange(here) + here * ranks.rank
        in_batch = F.cross_entropy(q_PD @ everybody.T / 0.05, own_P)
        scores = [(q_PD * document_PD).sum(-1) / 0.05 for document_PD in documents]
        hard = F.cross_entropy(torch.stack(scores, dim=1), torch.zeros(here, dtype=torch.int64))
        loss = loss + weight * (in_batch + hard)
    loss.backward()
    averaged = {name: whole(parameter.grad) for name, parameter in decoder.named_parameters()}
    for tensor in (mean := loss.detach().clone(), *averaged.values()):
        dist.all_reduce(tensor)
        tensor /= ranks.world
    return mean.item(), averaged


def our_step(ranks: Ranks, gather_gradient: bool) -> tuple[float, dict[str, Tensor]]:
    """The same batch as ours, in micro-batches."""
    shard(decoder := make_decoder(), ranks, "fp32", activation_checkpointing=False)
    nothing_known = torch.zeros(PAIRS, PAIRS, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.int64)
    roles = Roles(PARTS_PR[:, 0], PARTS_PR[:, 1], PARTS_PR[:, 2:], *nothing_known, in_batch=True)

    def loss_of(vectors_ND: Tensor) -> Tensor:
        temperature = torch.tensor(0.05)
        terms = contrastive_terms(
            vectors_ND, roles, matryoshka_sizes(24), temperature, gather_gradient=gather_gradient
        )
        return terms["in_batch"] + terms["hard"]

    loss, _ = accumulate_gradients(decoder, make_ids(THEIRS), loss_of, 100, ranks)
    return loss.item(), {name: whole(parameter.grad) for name, parameter in decoder.named_parameters()}


@dataclass(frozen=True)
class Done:
    """What one rank did."""

    steps: dict[str, Outcome]
    theirs: tuple[float, dict[str, Tensor]]
    ours: dict[bool, tuple[float, dict[str, Tensor]]]  # by gather_gradient


def work(ranks: Ranks) -> Done:
    ours = {gather_gradient: our_step(ranks, gather_gradient) for gather_gradient in (True, False)}
    return Done(steps(ranks, CASES), step_of_the_reference_code(ranks), ours)


@pytest.fixture(scope="module")
def one() -> dict[str, Outcome]:
    """Every case in one process."""
    return {name: plain_step(case) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[Done]:
    return on_ranks(request.param, work)


@pytest.fixture
def several(ranks: list[Done]) -> list[dict[str, Outcome]]:
    """Every case on each rank."""
    return [rank.steps for rank in ranks]


def check_same(got: Outcome, expected: Outcome) -> None:
    """Loss, vectors, and each tensor's gradient to 1e-5 of its largest element, in float32."""
    assert all(gradient.abs().max() > 0 for gradient in expected.gradients.values())
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(got.vectors_ND, expected.vectors_ND, rtol=1e-5, atol=1e-5)
    assert difference(got.gradients, expected.gradients) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_do_the_step_of_one(
    name: str, one: dict[str, Outcome], several: list[dict[str, Outcome]]
) -> None:
    for rank in several:
        check_same(rank[name], one[name])


@pytest.mark.slow  # peft takes seconds to import, on each rank
def test_ranks_together_do_the_step_of_one_with_adapters() -> None:
    """Of the adapters alone, since nothing else is learnt."""
    for rank in on_ranks(3, steps, ADAPTERS):
        for name, case in ADAPTERS.items():
            check_same(rank[name], expected := plain_step(case))
            assert len(expected.gradients) == 2 * 7 * 2  # A and B of seven projections in two layers


def test_a_gather_without_gradient_is_the_reference_codes(ranks: list[Done]) -> None:
    for rank in ranks:
        (their_loss, their_gradients), (loss, gradients) = rank.theirs, rank.ours[False]
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert difference(gradients, their_gradients) < 1e-5
        assert rank.ours[True][0] == pytest.approx(their_loss, rel=1e-5)
        assert difference(rank.ours[True][1], their_gradients) > 0.1  # where positives learn from it as well


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
