"""Every part of the objective against plain loops over plain numbers, and its gradients against themselves."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.train.runs import mse_to
from torch import Tensor

from f2llm.train.objective import (
    NONE,
    TEMPERATURE,
    Roles,
    contrastive_terms,
    hard_loss,
    in_batch_loss,
    matryoshka_sizes,
    matryoshka_weights,
    softmax_loss,
)

B, K, D, N = 7, 3, 20, 15
HOT, WARM = torch.tensor(0.05, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)


# --- The objective once more, one number at a time


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(sum(float(x) ** 2 for x in vector))


def naive_softmax_loss(own: float, others: list[float], temperature: float) -> float:
    denominator = math.exp(own / temperature) + sum(math.exp(other / temperature) for other in others)
    return -math.log(math.exp(own / temperature) / denominator)


def naive_in_batch(q: np.ndarray, positive: np.ndarray, same: np.ndarray, temperature: float) -> float:
    losses = []
    for i in range(len(q)):
        others = [float(q[i] @ positive[j]) for j in range(len(q)) if j != i and not same[i, j]]
        losses.append(naive_softmax_loss(float(q[i] @ positive[i]), others, temperature))
    return sum(losses) / len(losses)


def naive_hard(
    q: np.ndarray, positive: np.ndarray, negative: list[list[np.ndarray]], temperature: float
) -> float:
    losses = []
    for i in range(len(q)):
        others = [float(q[i] @ vector) for vector in negative[i]]
        losses.append(naive_softmax_loss(float(q[i] @ positive[i]), others, temperature))
    return sum(losses) / len(losses)


def naive_terms(vectors: np.ndarray, roles: Roles, sizes: list[int], temperature: float) -> dict[str, float]:
    terms = {"in_batch": 0.0, "hard": 0.0}
    for n, size in enumerate(sorted(sizes, reverse=True), start=1):
        weight = 1 / (n * math.sqrt(max(sizes) / size))
        q = np.array([unit(vectors[r][:size]) for r in roles.query_B])
        positive = np.array([unit(vectors[r][:size]) for r in roles.positive_B])
        negative = [[unit(vectors[r][:size]) for r in row if r != NONE] for row in roles.negative_BK]
        terms["in_batch"] += weight * naive_in_batch(q, positive, roles.same_BB.numpy(), temperature)
        if any(negative):
            terms["hard"] += weight * naive_hard(q, positive, negative, temperature)
    return terms


def naive_joint(
    vectors: np.ndarray, roles: Roles, sizes: list[int], temperature: float, both: bool = False
) -> float:
    total = 0.0
    queries = [int(r) for r in roles.query_B]
    own = [int(r) for r in roles.positive_B]
    hard = [{int(r) for r in row if r != NONE} for row in roles.negative_BK]
    known = {(int(i), int(r)) for i, r in roles.known_P2}
    for n, size in enumerate(sorted(sizes, reverse=True), start=1):
        score = [[float(unit(a[:size]) @ unit(b[:size])) for b in vectors] for a in vectors]
        there, back = [], []
        for i, q in enumerate(queries):
            right = {own[j] for j in range(len(own)) if roles.same_BB[i, j]} | {r for k, r in known if k == i}
            others = (set(own) | set().union(*hard)) - (right - hard[i]) - {own[i]}
            there.append(naive_softmax_loss(score[q][own[i]], [score[q][c] for c in others], temperature))
            rivals = [j for j in range(len(own)) if j != i and not roles.same_BB[j, i]]
            back.append(
                naive_softmax_loss(score[own[i]][q], [score[own[i]][queries[j]] for j in rivals], temperature)
            )
        loss = sum(there) / len(there)
        if both:
            loss = (loss + sum(back) / len(back)) / 2
        total += loss / (n * math.sqrt(max(sizes) / size))
    return total


def naive_distillation(student: np.ndarray, teacher: np.ndarray) -> float:
    squares = [
        (s - t) ** 2
        for row, target in zip(student, teacher, strict=True)
        for s, t in zip(row, target, strict=True)
    ]
    return float(sum(squares) / len(squares))


# --- Random input


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def unit_rows(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=shape)), dim=-1)


def random_roles(rng: np.random.Generator, negatives: int = K, in_batch: bool = True) -> Roles:
    """Rows repeat, as texts of a batch do."""
    same_BB = rng.random((B, B)) < 0.3
    same_BB[0] = [False, *[True] * (B - 1)]  # a query whose every other positive is masked
    negative_BK = rng.integers(N, size=(B, negatives))
    negative_BK[2, :1] = NONE  # a query with fewer negatives than others, and one with none
    negative_BK[4] = NONE
    return Roles(
        torch.from_numpy(rng.integers(N, size=B)),
        torch.from_numpy(rng.integers(N, size=B)),
        torch.from_numpy(negative_BK),
        torch.from_numpy(same_BB),
        torch.from_numpy(np.stack((rng.integers(B, size=9), rng.integers(N, size=9)), axis=1)),
        in_batch,
    )


# --- Matryoshka


def test_weights_are_the_published_ones_for_1024() -> None:
    sizes = matryoshka_sizes(1024)
    assert sizes == [8, 16, 32, 64, 128, 256, 512, 1024]
    published = [1.0, 0.354, 0.167, 0.088, 0.050, 0.030, 0.018, 0.011]
    assert list(reversed(matryoshka_weights(sizes))) == pytest.approx(published, abs=6e-4)
    assert sum(matryoshka_weights(sizes)) == pytest.approx(1.72, abs=0.005)


@pytest.mark.parametrize(
    ("dim", "sizes"), [(320, [8, 16, 32, 64, 128, 256, 320]), (8, [8]), (5, [5]), (9, [8, 9]), (16, [8, 16])]
)
def test_sizes_double_and_end_with_the_full_width(dim: int, sizes: list[int]) -> None:
    assert matryoshka_sizes(dim) == sizes


def test_weights_belong_to_sizes_in_any_order() -> None:
    assert matryoshka_weights([20, 8]) == list(reversed(matryoshka_weights([8, 20])))
    assert matryoshka_weights([8, 20]) == [1 / (2 * math.sqrt(20 / 8)), 1.0]
    assert all(small < large for small, large in pairwise(matryoshka_weights(matryoshka_sizes(896))))


# --- The terms


def test_temperature_is_the_published_one() -> None:
    assert TEMPERATURE == 0.05


@pytest.mark.parametrize("temperature", [HOT, WARM])
def test_in_batch_loss(rng: np.random.Generator, temperature: Tensor) -> None:
    q, positive = unit_rows(rng, B, D), unit_rows(rng, B, D)
    same = random_roles(rng).same_BB
    expected = naive_in_batch(q.numpy(), positive.numpy(), same.numpy(), float(temperature))
    assert float(in_batch_loss(q, positive, same, temperature)) == pytest.approx(expected, rel=1e-12)
    with_diagonal = same | torch.eye(B, dtype=torch.bool)
    assert torch.equal(
        in_batch_loss(q, positive, with_diagonal, temperature), in_batch_loss(q, positive, same, temperature)
    )


def test_a_query_without_negatives_in_the_batch_adds_nothing(rng: np.random.Generator) -> None:
    q, positive = unit_rows(rng, B, D).requires_grad_(), unit_rows(rng, B, D)
    loss = in_batch_loss(q, positive, torch.ones(B, B, dtype=torch.bool), HOT)
    loss.backward()
    assert q.grad is not None
    assert loss.item() == 0.0 and float(q.grad.abs().max()) == 0.0


@pytest.mark.parametrize("temperature", [HOT, WARM])
def test_hard_loss(rng: np.random.Generator, temperature: Tensor) -> None:
    q, positive, negative = unit_rows(rng, B, D), unit_rows(rng, B, D), unit_rows(rng, B, K, D)
    there = random_roles(rng).negative_BK != NONE
    others = [[negative[i, k].numpy() for k in range(K) if there[i, k]] for i in range(B)]
    expected = naive_hard(q.numpy(), positive.numpy(), others, float(temperature))
    assert float(hard_loss(q, positive, negative, there, temperature)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 3 * N, 1 << 20])
def test_a_softmax_in_blocks_is_the_plain_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Loss and all gradients, the temperature's too, against autograd on the whole matrix of scores."""
    monkeypatch.setattr("f2llm.train.objective.SCORES_AT_ONCE", at_once)
    own = torch.from_numpy(rng.integers(N, size=B))
    hidden = torch.from_numpy(rng.random((B, N)) < 0.4)
    hidden[torch.arange(B), own] = False
    hidden[0] = torch.arange(N) != own[0]
    inputs = [unit_rows(rng, B, D), unit_rows(rng, N, D), torch.tensor(0.1, dtype=torch.float64)]
    q, documents, temperature = (t.requires_grad_() for t in inputs)
    scores = (q @ documents.T / temperature).masked_fill(hidden, -math.inf)
    plain = torch.nn.functional.cross_entropy(scores, own)
    expected = torch.autograd.grad(3 * plain, (q, documents, temperature))
    loss = softmax_loss(q, documents, own, hidden, temperature)
    got = torch.autograd.grad(3 * loss, (q, documents, temperature))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [[D], [8, D], [8, 16, D]])
def test_contrastive_terms_over_sizes(rng: np.random.Generator, sizes: list[int]) -> None:
    vectors, roles = rng.normal(size=(N, D)), random_roles(rng)
    terms = contrastive_terms(torch.from_numpy(vectors), roles, sizes, HOT)
    expected = naive_terms(vectors, roles, sizes, 0.05)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-11)


def test_contrastive_terms_of_rows_that_are_not_retrieval(rng: np.random.Generator) -> None:
    vectors, roles = rng.normal(size=(N, D)), random_roles(rng, in_batch=False)
    terms = contrastive_terms(torch.from_numpy(vectors), roles, [8, D], HOT)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {"hard": naive_terms(vectors, roles, [8, D], 0.05)["hard"]}, rel=1e-11
    )


def test_contrastive_terms_without_hard_negatives(rng: np.random.Generator) -> None:
    vectors, roles = rng.normal(size=(N, D)), random_roles(rng, negatives=0)
    terms = contrastive_terms(torch.from_numpy(vectors), roles, [8, D], HOT)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {"in_batch": naive_terms(vectors, roles, [8, D], 0.05)["in_batch"]}, rel=1e-11
    )


@pytest.mark.parametrize("negatives", [0, K])
def test_distances_to_the_teacher_add_up_queries_positives_and_negatives(
    rng: np.random.Generator, negatives: int
) -> None:
    student, teacher = rng.normal(size=(N, D)), rng.normal(size=(N, D))
    roles = random_roles(rng, negatives)
    expected = 0.0
    for rows in (roles.query_B, roles.positive_B, roles.negative_BK[roles.negative_BK != NONE]):
        if len(rows):
            expected += naive_distillation(student[rows.numpy()], teacher[rows.numpy()])
    got = mse_to(torch.from_numpy(teacher), torch.from_numpy(student), roles)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_scale_of_the_vectors_moves_only_the_distance_to_the_teacher(rng: np.random.Generator) -> None:
    vectors, teacher = torch.from_numpy(rng.normal(size=(N, D))), torch.from_numpy(rng.normal(size=(N, D)))
    roles = random_roles(rng)
    for name, term in contrastive_terms(3 * vectors, roles, [8, D], HOT).items():
        assert float(term) == pytest.approx(
            float(contrastive_terms(vectors, roles, [8, D], HOT)[name]), rel=1e-12
        )
    assert mse_to(teacher, 3 * vectors, roles) > 1.5 * mse_to(teacher, vectors, roles)


# --- Gradients


def test_documents_learn_from_the_in_batch_term(rng: np.random.Generator) -> None:
    """The reference code's gather carries gradients to queries alone; ours carries them to both sides."""
    vectors = torch.from_numpy(rng.normal(size=(2 * B, D))).requires_grad_()
    rows = torch.arange(B)
    none = torch.zeros(B, B, dtype=torch.bool)
    known = torch.empty(0, 2, dtype=torch.int64)
    roles = Roles(rows, rows + B, torch.empty(B, 0, dtype=torch.int64), none, known, in_batch=True)
    contrastive_terms(vectors, roles, [D], HOT)["in_batch"].backward()
    assert vectors.grad is not None
    assert float(vectors.grad.norm(dim=1).min()) > 0
    term = contrastive_terms(vectors, roles, [D], HOT, gather_gradient=False)["in_batch"]
    (as_reference,) = torch.autograd.grad(term, vectors)
    torch.testing.assert_close(as_reference[:B], vectors.grad[:B])
    assert float(as_reference[B:].abs().max()) == 0


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("sizes", [[D], [8, 16, D]])
def test_joint_objective(rng: np.random.Generator, sizes: list[int], both: bool) -> None:
    vectors, roles = rng.normal(size=(N, D)), random_roles(rng)
    terms = contrastive_terms(
        torch.from_numpy(vectors), roles, sizes, HOT, kind="joint", both_directions=both
    )
    expected = {"joint": naive_joint(vectors, roles, sizes, 0.05, both)}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-11)


def test_joint_objective_of_rows_that_are_not_retrieval_is_the_hard_term(rng: np.random.Generator) -> None:
    vectors, roles = torch.from_numpy(rng.normal(size=(N, D))), random_roles(rng, in_batch=False)
    joint = contrastive_terms(vectors, roles, [8, D], HOT, kind="joint")
    assert joint == contrastive_terms(vectors, roles, [8, D], HOT)
    assert list(joint) == ["hard"]


def test_gradients_are_right(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.normal(size=(N, D))).requires_grad_()
    teacher = torch.from_numpy(rng.normal(size=(N, D)))
    roles = random_roles(rng)

    def total(vectors: Tensor) -> Tensor:
        terms = contrastive_terms(vectors, roles, [8, D], WARM)
        return terms["in_batch"] + terms["hard"] + mse_to(teacher, vectors, roles)

    assert torch.autograd.gradcheck(total, (vectors,))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_the_same_bits_every_time(rng: np.random.Generator) -> None:
    """A run that is continued must end in the same weights, so no sum may depend on which thread came first."""
    queries, width, texts = 512, 80, 300
    vectors = torch.from_numpy(rng.normal(size=(texts, width))).float().requires_grad_()
    teacher = torch.from_numpy(rng.normal(size=(texts, width))).float()
    roles = Roles(
        torch.from_numpy(rng.integers(texts, size=queries)),
        torch.from_numpy(rng.integers(2, size=queries)),  # two labels, the positives of all queries
        torch.from_numpy(rng.integers(texts, size=(queries, 4))),
        torch.zeros(queries, queries, dtype=torch.bool),
        torch.empty(0, 2, dtype=torch.int64),
        in_batch=True,
    )
    gradients = set()
    for _ in range(4):
        terms = contrastive_terms(vectors, roles, [8, width], torch.tensor(0.05))
        total = terms["in_batch"] + terms["hard"] + mse_to(teacher, vectors, roles)
        (gradient,) = torch.autograd.grad(total, vectors)
        gradients.add(gradient.numpy().tobytes())
    assert len(gradients) == 1, "different gradients of the same step"
