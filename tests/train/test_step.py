"""The gradients of a batch: the same however it is cut into micro-batches."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tests.train.runs import mse_to
from torch import Tensor

from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.model.folder import Model
from f2llm.train.objective import NONE, Kind, Roles, contrastive_terms, matryoshka_sizes
from f2llm.train.ranks import ALONE
from f2llm.train.step import accumulate_gradients, cut, vectors_of

TEXTS, QUERIES = 40, 9


@pytest.fixture
def ids() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, 90, size=length).tolist() for length in rng.integers(1, 30, size=TEXTS)]


def random_roles() -> Roles:
    rng = np.random.default_rng(4)
    negative_BK = rng.integers(TEXTS, size=(QUERIES, 3))
    negative_BK[0, 2] = NONE
    same_BB = rng.random((QUERIES, QUERIES)) < 0.2
    known_P2 = np.stack((rng.integers(QUERIES, size=5), rng.integers(TEXTS, size=5)), axis=1)
    query_B, positive_B = rng.integers(TEXTS, size=QUERIES), rng.integers(TEXTS, size=QUERIES)
    query, positive, negative, same, known = (
        torch.from_numpy(part) for part in (query_B, positive_B, negative_BK, same_BB, known_P2)
    )
    return Roles(query, positive, negative, same, known, in_batch=True)


def make_loss(decoder: Decoder, kind: Kind, temperature: Tensor) -> Callable[[Tensor], Tensor]:
    """All terms at once: contrastive over Matryoshka sizes, and distillation from made-up teacher vectors."""
    roles, sizes = random_roles(), matryoshka_sizes(decoder.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    teacher_ND = torch.randn(TEXTS, decoder.config.hidden_size, generator=generator)

    def loss_of(vectors_ND: Tensor) -> Tensor:
        terms = contrastive_terms(vectors_ND, roles, sizes, temperature, kind=kind)
        return torch.stack([*terms.values(), mse_to(teacher_ND, vectors_ND, roles)]).sum()

    return loss_of


def gradient_of(scalar: Tensor) -> float:
    assert scalar.grad is not None
    return scalar.grad.item()


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    named = {name: p.grad for name, p in decoder.named_parameters()}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("kind", ["f2llm-v2", "joint"])
@pytest.mark.parametrize("budget", [1, 30, 100, 400, 10_000])
def test_gradients_do_not_depend_on_the_micro_batches(
    make_model: Callable[..., Model], ids: list[list[int]], kind: Kind, budget: int
) -> None:
    """Against one plain forward and backward of everything: 1e-5 of each tensor's largest gradient, in float32."""
    decoder = make_model(vocab_size=100).decoder.train()
    temperature = torch.tensor(0.05, requires_grad=True)
    loss_of = make_loss(decoder, kind, temperature)
    plain = loss_of(forward(decoder, ids))
    plain.backward()
    expected, expected_temperature = gradients(decoder), gradient_of(temperature)
    decoder.zero_grad(set_to_none=True)
    temperature.grad = None

    loss, vectors_ND = accumulate_gradients(decoder, ids, loss_of, budget)
    assert not loss.requires_grad and not vectors_ND.requires_grad
    assert float(loss) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert gradient_of(temperature) == pytest.approx(expected_temperature, rel=1e-5)
    got = gradients(decoder)
    assert got.keys() == expected.keys() == {name for name, _ in decoder.named_parameters()}
    for name, grad in expected.items():
        assert float((got[name] - grad).abs().max() / grad.abs().max()) < 1e-5, name


def test_gradients_are_added_to_those_that_are_there(
    make_model: Callable[..., Model], ids: list[list[int]]
) -> None:
    decoder = make_model(vocab_size=100).decoder.train()
    loss_of = make_loss(decoder, "joint", torch.tensor(0.05))
    accumulate_gradients(decoder, ids, loss_of, 100)
    once = gradients(decoder)
    accumulate_gradients(decoder, ids, loss_of, 100)
    for name, grad in gradients(decoder).items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


def test_a_batch_that_fits_into_one_micro_batch_is_computed_once(
    make_model: Callable[..., Model], ids: list[list[int]]
) -> None:
    """And one of several micro-batches twice, but for the last."""
    decoder = make_model(vocab_size=100).decoder.train()
    loss_of = make_loss(decoder, "f2llm-v2", torch.tensor(0.05))
    computed: list[int] = []
    decoder.register_forward_pre_hook(lambda module, inputs: computed.append(len(inputs[0])))
    tokens = sum(map(len, ids))
    accumulate_gradients(decoder, ids, loss_of, 10_000)
    assert computed == [tokens]
    computed.clear()
    accumulate_gradients(decoder, ids, loss_of, tokens // 3)
    assert max(computed) <= tokens // 3
    last = next(t for t in reversed(computed[: len(computed) // 2 + 1]))
    assert sum(computed) == 2 * tokens - last


def test_vectors_are_in_the_order_of_the_texts(
    make_model: Callable[..., Model], ids: list[list[int]]
) -> None:
    decoder = make_model(vocab_size=100).decoder
    got_ND = vectors_of(decoder, ids, 50)
    assert not got_ND.requires_grad
    for text, vector_D in zip(ids, got_ND, strict=True):
        torch.testing.assert_close(vector_D, forward(decoder, [text])[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[4], [3, 9, 1, 4, 4, 30, 2], list(range(1, 60))])
def test_ranks_share_a_batch_evenly(lengths: Sequence[int], world: int) -> None:
    """Each text on one rank, as many micro-batches everywhere, none above the budget that has more than one text."""
    cuts = [cut(lengths, 20, type(ALONE)(rank, world, torch.device("cpu"))) for rank in range(world)]
    order = [n for one in cuts for batch in one.micro_batches for n in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert len({len(one.micro_batches) for one in cuts}) == 1
    for rank, one in enumerate(cuts):
        mine = [n for batch in one.micro_batches for n in batch]
        assert one.counts == cuts[0].counts and one.counts[rank] == len(mine)
        assert one.place_N == cuts[0].place_N
        assert all(order[place] == n for n, place in enumerate(one.place_N))
        assert all(len(b) <= 1 or sum(lengths[n] for n in b) <= 20 for b in one.micro_batches)
        assert abs(sum(lengths[n] for n in mine) - sum(lengths) / world) <= max(lengths)
