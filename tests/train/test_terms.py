"""From a batch to its loss: token ids, roles, and the terms with a teacher's, against plain loops over texts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.train.runs import Batches, MakeModel, Settings
from torch import Tensor

from f2llm.recipe_train import TrainStage
from f2llm.train.distillation import Target
from f2llm.train.objective import NONE
from f2llm.train.sampler import Batch, Sampler
from f2llm.train.terms import Taught, Terms, make_loss, roles_of, token_ids, trained_sizes

WIDTH, WEIGHT, TEMPERATURE = 24, 0.25, 0.1
Vectors = dict[str, list[float]]  # by text


def batch_of(sampler: Sampler, source: str) -> Batch:
    return next(batch for batch in map(sampler.__getitem__, range(sampler.steps)) if batch.source == source)


# --- The loss once more, text by text


def cosine(a: list[float], b: list[float], size: int) -> float:
    a, b = a[:size], b[:size]
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def surprise(own: float, others: list[float]) -> float:
    return math.log(sum(math.exp((score - own) / TEMPERATURE) for score in [own, *others]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def naive_terms(batch: Batch, vector: Vectors, teacher: Vectors, sizes: list[int]) -> dict[str, float]:
    """Softmax over the own positive and others', softmax over the own positive and own negatives, distance."""
    queries = [batch.texts[n] for n in batch.query_B]
    positives = [batch.texts[n] for n in batch.positive_B]
    negatives = [[batch.texts[n] for n in row if n != NONE] for row in batch.negative_BK]
    terms = {"in_batch": 0.0, "hard": 0.0}
    for place, size in enumerate(reversed(sizes), start=1):
        weight = 1 / (place * math.sqrt(max(sizes) / size))
        in_batch, hard = [], []
        for i, query in enumerate(queries):
            own = cosine(vector[query], vector[positives[i]], size)
            rivals = [p for j, p in enumerate(positives) if j != i and not batch.same_BB[i, j]]
            in_batch.append(surprise(own, [cosine(vector[query], vector[p], size) for p in rivals]))
            hard.append(surprise(own, [cosine(vector[query], vector[n], size) for n in negatives[i]]))
        terms["in_batch"] += weight * mean(in_batch)
        terms["hard"] += weight * mean(hard)
    if not batch.in_batch:
        del terms["in_batch"]
    if not any(negatives):
        del terms["hard"]

    def distance(texts: list[str]) -> float:
        squares = [(s - t) ** 2 for text in texts for s, t in zip(vector[text], teacher[text], strict=True)]
        return mean(squares) if squares else 0.0

    together = [text for texts in negatives for text in texts]
    terms["teacher_mse"] = distance(queries) + distance(positives) + distance(together)
    return terms


@pytest.fixture
def config(settings: Settings) -> TrainStage:
    return settings(
        teacher="teacher", distillation={"terms": {"mse": WEIGHT}}, temperature=TEMPERATURE, steps=20
    )


@pytest.mark.parametrize(("source", "names"), [("names", {"in_batch"}), ("kinds", {"hard"})])
@pytest.mark.parametrize("matryoshka", [True, False])
def test_the_loss_is_that_of_a_naive_one(
    source: str, names: set[str], matryoshka: bool, config: TrainStage, batches: Batches
) -> None:
    config = config.model_copy(update={"matryoshka": matryoshka})
    batch = batch_of(batches(config), source)
    if source == "names":
        assert batch.same_BB.sum() > len(batch.query_B), "no query has a second right answer in this batch"
    draw = torch.Generator().manual_seed(3)
    vectors_ND, teacher_ND = torch.randn(2, len(batch.texts), WIDTH, generator=draw, dtype=torch.float64)
    vectors_ND.requires_grad_()
    taught = Taught(teacher_ND, Target(torch.arange(WIDTH)))
    terms: Terms = {}
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)
    loss = make_loss(config, batch, taught, temperature, terms)(vectors_ND)

    vector = dict(zip(batch.texts, vectors_ND.tolist(), strict=True))
    teacher = dict(zip(batch.texts, teacher_ND.tolist(), strict=True))
    sizes = [8, 16, 24] if matryoshka else [24]
    assert trained_sizes(config, WIDTH) == sizes
    expected = naive_terms(batch, vector, teacher, sizes)
    assert expected.keys() == names | {"teacher_mse"}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-10)
    contrastive = sum(value for name, value in expected.items() if name != "teacher_mse")
    assert loss.item() == pytest.approx(contrastive + WEIGHT * expected["teacher_mse"], rel=1e-10)
    assert not any(term.requires_grad for term in terms.values())

    without: Terms = {}
    make_loss(config, batch, None, temperature, without)(vectors_ND)
    assert without.keys() == names


def test_the_loss_goes_down_its_gradient(config: TrainStage, batches: Batches) -> None:
    """In vectors and in the temperature, where that is learnt: differences of the loss are what the gradient says."""
    batch = batch_of(batches(config), "names")
    draw = torch.Generator().manual_seed(4)
    vectors_ND, teacher_ND = torch.randn(2, len(batch.texts), WIDTH, generator=draw, dtype=torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    taught = Taught(teacher_ND, Target(torch.arange(WIDTH)))
    way_ND = torch.randn(vectors_ND.shape, generator=draw, dtype=torch.float64)

    def loss_at(step: float, warmer: Tensor) -> Tensor:
        return make_loss(config, batch, taught, warmer, {})(vectors_ND + step * way_ND)

    vectors_ND.requires_grad_()
    loss_at(0.0, temperature).backward()
    assert vectors_ND.grad is not None and temperature.grad is not None
    tiny = 1e-6
    with torch.no_grad():
        slope = (loss_at(tiny, temperature) - loss_at(-tiny, temperature)) / (2 * tiny)
        by_heat = (loss_at(0.0, temperature + tiny) - loss_at(0.0, temperature - tiny)) / (2 * tiny)
    assert slope.item() == pytest.approx((vectors_ND.grad * way_ND).sum().item(), rel=1e-6)
    assert by_heat.item() == pytest.approx(temperature.grad.item(), rel=1e-6)


# --- Roles


@pytest.mark.parametrize("source", ["names", "kinds", "country"])
def test_roles_are_those_of_the_batch(source: str, config: TrainStage, batches: Batches) -> None:
    batch = batch_of(batches(config), source)
    one_way_BB = np.triu(np.ones_like(batch.same_BB))  # right for earlier queries and not the other way round
    batch = replace(batch, same_BB=one_way_BB)
    roles = roles_of(batch, torch.device("cpu"))
    for name in ("query_B", "positive_B", "negative_BK", "same_BB", "known_P2"):
        assert getattr(roles, name).tolist() == getattr(batch, name).tolist(), name
    assert roles.in_batch == batch.in_batch == (source == "names")
    assert roles.same_BB.dtype == torch.bool and roles.query_B.dtype == torch.int64


# --- Token ids


def test_queries_carry_their_instruction_and_end_in_eos(
    config: TrainStage, batches: Batches, make_model: MakeModel
) -> None:
    """Decoded, they are the prompt of the paper and the name; documents of this source carry it in a part of cases."""
    model, batch = make_model(), batch_of(batches(config), "names")
    ids = token_ids(model, batch.texts, 200)
    assert all(
        sequence[-1] == model.facts.eos_id and model.facts.eos_id not in sequence[:-1] for sequence in ids
    )
    # The tokenizer puts a space in front of every text.
    said = [model.tokenizer.decode(sequence, skip_special_tokens=True)[1:] for sequence in ids]
    assert said == batch.texts
    prompt = "Instruct: Find this name in another language\nQuery: "
    assert all(said[n].startswith(prompt) for n in batch.query_B)
    assert not all(said[n].startswith(prompt) for n in batch.positive_B)


@pytest.mark.parametrize("max_length", [2, 5, 17, 47])
def test_a_text_that_is_cut_keeps_its_beginning_and_eos(
    max_length: int, config: TrainStage, batches: Batches, make_model: MakeModel
) -> None:
    model, batch = make_model(), batch_of(batches(config), "names")
    whole, cut = (token_ids(model, batch.texts, limit) for limit in (200, max_length))
    assert any(len(sequence) > max_length for sequence in whole)
    for all_of_it, some in zip(whole, cut, strict=True):
        assert len(some) == min(len(all_of_it), max_length)
        assert some[:-1] == all_of_it[: len(some) - 1]
        assert some[-1] == model.facts.eos_id
