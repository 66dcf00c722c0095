"""What a student learns from a teacher's vectors: every term against plain loops over texts, and what it rests on.

Shape suffixes: N texts, D dims of the student, T of the teacher.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from f2llm.train import distillation
from f2llm.train.distillation import Target, distillation_terms
from f2llm.train.objective import NONE, Roles, matryoshka_weights

N, D, T, QUERIES = 30, 16, 20, 7
SIZES = [8, D]
HEAT = 0.3
ALL = {"mse": 1.0, "cosine": 1.0, "similarity": 1.0, "ranking": 1.0}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def roles(rng: np.random.Generator) -> Roles:
    """Some texts play several parts, one query is a document too, one query lacks a negative."""
    query_B, positive_B = rng.integers(N, size=QUERIES), rng.integers(N, size=QUERIES)
    negative_BK = rng.integers(N, size=(QUERIES, 3))
    negative_BK[0, 1], negative_BK[3, 2] = NONE, query_B[2]
    query, positive, negative = (torch.from_numpy(part) for part in (query_B, positive_B, negative_BK))
    none, known = torch.zeros(QUERIES, QUERIES, dtype=torch.bool), torch.empty(0, 2, dtype=torch.int64)
    return Roles(query, positive, negative, none, known, in_batch=True)


@pytest.fixture
def vectors(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Of student and teacher."""
    return torch.from_numpy(rng.normal(size=(N, D))), torch.from_numpy(rng.normal(size=(N, T)))


@pytest.fixture
def taught() -> Target:
    return Target(torch.tensor([0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15, 16, 18, 19]))


def terms_of(
    student: Tensor, teacher: Tensor, roles: Roles, target: Target, **names: float
) -> dict[str, Tensor]:
    return distillation_terms(student, teacher, roles, SIZES, target, names or ALL, HEAT)


# --- Plain loops


def unit(vector: list[float]) -> list[float]:
    return [x / math.hypot(*vector) for x in vector]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def over_parts(value: Callable[[int], float], roles: Roles) -> float:
    """The mean over queries, plus that over positives, plus that over hard negatives."""
    parts = [roles.query_B.tolist(), roles.positive_B.tolist()]
    parts.append([n for row in roles.negative_BK.tolist() for n in row if n != NONE])
    return sum(sum(map(value, part)) / len(part) for part in parts)


def naive(
    student: list[list[float]], teacher: list[list[float]], roles: Roles, dims: list[int]
) -> dict[str, float]:
    def square(n: int) -> float:
        return sum((student[n][d] - teacher[n][t]) ** 2 for d, t in enumerate(dims)) / D

    found = {"mse": over_parts(square, roles), "cosine": 0.0, "similarity": 0.0, "ranking": 0.0}
    documents = sorted({*roles.positive_B.tolist(), *roles.negative_BK.flatten().tolist()} - {NONE})
    for size, weight in zip(SIZES, matryoshka_weights(SIZES), strict=True):

        def away(n: int, size: int = size) -> float:
            return 1 - dot(unit(student[n][:size]), unit([teacher[n][t] for t in dims[:size]]))

        found["cosine"] += weight * over_parts(away, roles)
        for query in roles.query_B.tolist():
            others = [n for n in documents if n != query]
            mine = [dot(unit(student[query][:size]), unit(student[n][:size])) / HEAT for n in others]
            its = [dot(unit(teacher[query]), unit(teacher[n])) / HEAT for n in others]
            total_mine, total_its = sum(map(math.exp, mine)), sum(map(math.exp, its))
            divergence = sum(
                math.exp(t) / total_its * (t - math.log(total_its) - s + math.log(total_mine))
                for s, t in zip(mine, its, strict=True)
            )
            found["similarity"] += weight * divergence / QUERIES
            order = sorted(range(len(others)), key=lambda i: -its[i])
            ranked = order[: distillation.RANKED]
            surprise = [
                math.log(sum(math.exp(mine[j]) for j in order[place:])) - mine[i]
                for place, i in enumerate(ranked)
            ]
            found["ranking"] += weight * sum(surprise) / len(surprise) / QUERIES
    return found


@pytest.mark.parametrize("ranked", [1, 5, 16])
def test_terms_are_those_of_plain_loops(
    vectors: tuple[Tensor, Tensor], roles: Roles, taught: Target, ranked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "RANKED", ranked)
    assert taught.taught_D is not None
    student, teacher = (side.tolist() for side in vectors)
    expected = naive(student, teacher, roles, taught.taught_D.tolist())
    found = terms_of(*vectors, roles, taught)
    assert {name: float(term) for name, term in found.items()} == pytest.approx(expected, rel=1e-10)


def test_few_documents_are_ranked_to_the_last_but_one(vectors: tuple[Tensor, Tensor], taught: Target) -> None:
    """Fewer than RANKED: each query orders them all, so a student with its teacher's order has less to learn."""
    none = torch.zeros(3, 3, dtype=torch.bool)
    known = torch.empty(0, 2, dtype=torch.int64)
    roles = Roles(
        torch.tensor([0, 1, 2]),
        torch.tensor([3, 4, 5]),
        torch.empty(3, 0, dtype=torch.int64),
        none,
        known,
        True,
    )
    _, teacher = vectors
    same = teacher[:, :D]
    opposite = torch.cat((-same[:3], same[3:]))  # queries point away from what was near
    alike, apart = (
        distillation_terms(student, same, roles, [D], taught, {"ranking": 1.0}, HEAT)["ranking"]
        for student in (same, opposite)
    )
    assert 0 < float(alike) < float(apart)


def test_two_documents_leave_nothing_to_compare(vectors: tuple[Tensor, Tensor], taught: Target) -> None:
    none, known = torch.zeros(2, 2, dtype=torch.bool), torch.empty(0, 2, dtype=torch.int64)
    roles = Roles(
        torch.tensor([0, 1]), torch.tensor([3, 4]), torch.empty(2, 0, dtype=torch.int64), none, known, True
    )
    found = terms_of(*vectors, roles, taught, similarity=1.0, ranking=1.0)
    assert found == {"similarity": 0.0, "ranking": 0.0}


@pytest.mark.parametrize("projected", [False, True])
def test_gradients_are_right(
    vectors: tuple[Tensor, Tensor], roles: Roles, taught: Target, projected: bool, rng: np.random.Generator
) -> None:
    student, teacher = vectors
    matrix = torch.from_numpy(rng.normal(size=(T, D))).requires_grad_(projected)

    def total(student: Tensor, matrix: Tensor) -> Tensor:
        found = terms_of(student, teacher, roles, Target(projection_TD=matrix) if projected else taught)
        return torch.stack(list(found.values())).sum()

    assert torch.autograd.gradcheck(total, (student.requires_grad_(), matrix))


def test_blocks_of_queries_add_up(
    vectors: tuple[Tensor, Tensor], roles: Roles, taught: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = vectors
    outcomes = []
    for elements in (1, 60, 10**6):
        monkeypatch.setattr(distillation, "SCORES_AT_ONCE", elements)
        copy = student.clone().requires_grad_()
        terms = terms_of(copy, teacher, roles, taught, similarity=1.0, ranking=1.0)
        torch.stack(list(terms.values())).sum().backward()
        assert copy.grad is not None
        outcomes.append(torch.cat((torch.stack(list(terms.values())).detach(), copy.grad.flatten())))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outcomes[0], outcomes[2], rtol=1e-12, atol=1e-12)


def test_a_student_that_agrees_has_nothing_to_learn(vectors: tuple[Tensor, Tensor], roles: Roles) -> None:
    """A turned and stretched copy of the teacher: the same similarities; and the same vectors, through a matrix."""
    student, _ = vectors
    turn, _ = torch.linalg.qr(
        torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    teacher = 3 * student @ turn
    names = {"mse": 1.0, "cosine": 1.0, "similarity": 1.0}

    def at_full_width(target: Target) -> dict[str, Tensor]:
        return distillation_terms(student, teacher, roles, [D], target, names, HEAT)

    bare, seen = at_full_width(Target(torch.arange(D))), at_full_width(Target(projection_TD=3 * turn.T))
    assert float(bare["similarity"]) == pytest.approx(0, abs=1e-12)
    assert float(bare["mse"]) > 1 and float(bare["cosine"]) > 1
    assert [float(term) for term in seen.values()] == pytest.approx([0, 0, 0], abs=1e-12)


def test_lengths_matter_to_mse_alone(vectors: tuple[Tensor, Tensor], roles: Roles, taught: Target) -> None:
    """So a teacher that gives vectors of unit length can teach all the others."""
    student, teacher = vectors
    lengths_N1 = torch.linspace(0.5, 3, N, dtype=torch.float64)[:, None]
    raw, other = (
        terms_of(student, teacher, roles, taught),
        terms_of(student, teacher * lengths_N1, roles, taught),
    )
    same = {name for name in raw if float(raw[name]) == pytest.approx(float(other[name]), rel=1e-10)}
    assert same == {"cosine", "similarity", "ranking"}
