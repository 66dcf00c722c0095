"""Which documents stand in which query's denominator: the tables of docs/objective.md, cell by cell.

What a cell should say is read from the page. What is so is measured on a real batch, from rows through the sampler.
Every text has a unit vector of its own, orthogonal to all others, and so has the query of every row, even where rows
have the same one. A document can then move along one query's vector without a change to any other query's loss, and
that query's loss changes just if the document stands in its softmax.

Shape suffixes: N texts of a batch, B queries, D dims (N + B or more).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from f2llm.data.rows import Format, Source
from f2llm.model.prompts import query_prefix
from f2llm.train.objective import Kind, Roles, contrastive_terms
from f2llm.train.sampler import Batch, Sampler, SourceRows
from f2llm.train.terms import roles_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objective.md"
TEMPERATURE = 0.05
PREFIX = query_prefix("Find it")
STEPS = 300  # among which the wanted batch comes up by chance
Row = dict[str, Any]


# --- What the page says


def table(heading: str) -> dict[str, dict[str, bool]]:
    """The table below a heading of the page: cells by the line's first cell and the column's head."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (body,) = (text for text in sections if text.startswith(heading + "\n"))
    lines = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")]
    head, _, *rest = ([cell.strip() for cell in line] for line in lines)
    meaning = {"yes": True, "no": False}
    return {
        first: dict(zip(head[1:], (meaning[cell] for cell in cells), strict=True)) for first, *cells in rest
    }


NEGATIVES = table("Who is whose negative")
WAY_BACK = table("Which queries a positive is set against")


# --- What is so


def batches(format: Format, rows: list[Row], rate: float = 0.0) -> Iterator[Batch]:
    """Batches that hold all of the rows, with instructions on queries and on a share of documents."""
    source = Source(
        name="s", format=format, task="t", symmetric=True, instruction="Find it", licence="CC0-1.0"
    )
    columns = {name: [one[name] for one in rows] for name in rows[0]}
    sampler = Sampler(
        [SourceRows(source, query_lang=["und"] * len(rows), **columns)],
        seed=0,
        steps=STEPS,
        batch_size=len(rows),
        hard_negatives={"retrieval": 7, "clustering": 9, "classification": 3},
        instructions=True,
        document_instruction_rate=rate,
    )
    return (sampler[step] for step in range(STEPS))


@dataclass(frozen=True)
class Asked:
    """One query of a batch: of row i, and where the vector of each row's query lies among all."""

    batch: Batch
    i: int

    @property
    def queries(self) -> range:
        """Where the vectors of the rows' queries lie: behind those of the texts."""
        return range(len(self.batch.texts), len(self.batch.texts) + len(self.batch.query_B))

    def vector_of(self, document: str) -> int:
        """Of a document by its text, of another row's query by `query of TEXT`, of the row's own by `query`."""
        if not document.startswith("query"):
            return self.batch.texts.index(document)
        if document == "query":
            return self.queries[self.i]
        text = PREFIX + document.removeprefix("query of ")
        queries = [self.batch.texts[n] for n in self.batch.query_B]
        (other,) = (j for j, query in enumerate(queries) if query == text and j != self.i)
        return self.queries[other]

    def shares(self, term: str) -> torch.Tensor:
        """Float64 [D]: of each vector its share in the query's softmax; of the right one, less 1."""
        roles = replace(roles_of(self.batch, torch.device("cpu")), query_B=torch.tensor(self.queries))
        kind: Kind = "joint" if term == "joint" else "f2llm-v2"
        return _moved(roles, self.queries.stop, kind, term)[:, self.queries[self.i]]

    def shares_of_queries(self) -> torch.Tensor:
        """Float64 [D]: of each vector its share in the softmax of the positive, in which it has to find its query."""
        positive_B = torch.tensor(self.queries) + len(self.queries)
        roles = replace(
            roles_of(self.batch, torch.device("cpu")),
            query_B=torch.tensor(self.queries),
            positive_B=positive_B,
        )
        size = int(positive_B[-1]) + 1
        mean = _moved(roles, size, "joint", "joint", both_directions=True)
        return (2 * mean - _moved(roles, size, "joint", "joint"))[:, int(positive_B[self.i])]


def _moved(roles: Roles, size: int, kind: Kind, term: str, **options: bool) -> torch.Tensor:
    """Float64 [D, D]: what the term gains as the first vector moves along the second, B τ times; 0 without the term."""
    vectors_DD = torch.eye(size, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)
    terms = contrastive_terms(vectors_DD, roles, [size], temperature, kind=kind, **options)
    if term not in terms:
        return torch.zeros(size, size, dtype=torch.float64)
    (grad_DD,) = torch.autograd.grad(terms[term], vectors_DD)  # the vectors are the axes
    return grad_DD * len(roles.query_B) * TEMPERATURE


# --- Rows among which a document stands as its line says. The query is `q` and, unless said, its positive `p`.


@dataclass(frozen=True)
class Case:
    rows: list[Row]
    document: str = "d"
    positive: str = "p"
    rate: float = 0.0  # share of documents with the instruction
    of_another_row: bool = False  # the document must not be a hard negative of the query itself


def row(query: str, positives: str, negatives: str = "", label: str | None = None) -> Row:
    return {"query": query, "positives": positives.split(), "negatives": negatives.split(), "label": label}


def either_form(rows: list[Row], document: str) -> list[Case]:
    """The document bare, and with the instruction, as documents of symmetric sources may be."""
    return [
        Case(rows, document),
        Case(rows, PREFIX + document, positive=PREFIX + "p", rate=1.0),
    ]


def other_form(rows: list[Row], document: str) -> list[Case]:
    """The query's own document bare, and as another row's with the instruction."""
    return [Case(rows, PREFIX + document, rate=0.5, of_another_row=True)]


STRANGERS = [row("t", "u", "v")]
CASES = {
    "the query's own positive": [Case([row("q", "p", "n"), *STRANGERS], document="p")],
    "its own hard negative": either_form([row("q", "p", "d"), *STRANGERS], "d"),
    "positive of another row": either_form([row("q", "p", "n"), row("r", "d")], "d"),
    "hard negative of another row": either_form([row("q", "p", "n"), row("r", "s", "d")], "d"),
    "own hard negative that is another row's positive": either_form([row("q", "p", "d"), row("r", "d")], "d"),
    "own hard negative that is another row's hard negative": either_form(
        [row("q", "p", "d"), row("r", "s", "d")], "d"
    ),
    "own hard negative, as another row's hard negative in another form": other_form(
        [row("q", "p", "d"), row("r", "s", "d")], "d"
    ),
    "own hard negative, as another row's positive in another form": other_form(
        [row("q", "p", "d"), row("r", "d")], "d"
    ),
    "own positive, as another row's positive in another form": other_form(
        [row("q", "p", "n"), row("r", "p"), *STRANGERS], "p"
    ),
    "own positive, as another row's hard negative in another form": other_form(
        [row("q", "p", "n"), row("r", "s", "p")], "p"
    ),
    "positive of another row that names the same thing (equal label)": either_form(
        [row("q", "p", "n", "x"), row("r", "d", "", "x"), *STRANGERS], "d"
    ),
    "hard negative of another row, positive of a third that names the same thing": either_form(
        [row("q", "p", "n", "x"), row("r", "d", "", "x"), row("s", "o", "d")], "d"
    ),
    "positive of another row that has the same query": either_form(
        [row("q", "p", "n"), row("q", "d"), *STRANGERS], "d"
    ),
    "positive of another row that is known to be right for the query": either_form(
        [row("q", "p d", "n"), row("r", "d"), *STRANGERS], "d"
    ),
    "positive of another row that is the query's own text": either_form(
        [row("q", "p", "n"), row("r", "q"), *STRANGERS], "q"
    ),
    "positive of a row that names what the same query names in a third row": either_form(
        [row("q", "p", "n", "x"), row("q", "o", "", "y"), row("r", "d", "", "y")], "d"
    ),
    "hard negative of another row that is known to be right for the query": either_form(
        [row("q", "p d", "n"), row("r", "s", "d")], "d"
    ),
    "hard negative of another row that is the query's own text": either_form(
        [row("q", "p", "n"), row("r", "s", "q")], "q"
    ),
    "another query": [Case([row("q", "p", "n"), row("r", "s", "m")], document="query of r")],
}
BACK_CASES = {
    "its own query": Case([row("q", "p", "n"), *STRANGERS], document="query"),
    "query of another row": Case([row("q", "p"), row("r", "s")], document="query of r"),
    "query of another row for which it is known to be right": Case(
        [row("q", "p"), row("r", "p s"), *STRANGERS], document="query of r"
    ),
    "query of another row that names the same thing (equal label)": Case(
        [row("q", "p", label="x"), row("r", "s", label="x"), *STRANGERS], document="query of r"
    ),
    "query of another row that has the same text as its own": Case(
        [row("q", "p"), row("q", "s"), *STRANGERS], document="query of q"
    ),
    "query of another row of which it is the text": Case(
        [row("q", "p"), row("p", "s"), *STRANGERS], document="query of p"
    ),
    "another document": Case([row("q", "p", "n"), row("r", "s")], document="n"),
}


def find(case: Case) -> Asked:
    """The query with the case's positive, in the first batch in which the document is there as the case wants it."""
    for batch in batches("retrieval", case.rows, case.rate):
        pairs = [batch.texts[n] for n in batch.query_B], [batch.texts[n] for n in batch.positive_B]
        for i in (
            i for i, pair in enumerate(zip(*pairs, strict=True)) if pair == (PREFIX + "q", case.positive)
        ):
            own = [batch.texts[n] for n in batch.negative_BK[i] if n >= 0]
            there = case.document in batch.texts or case.document.startswith("query")
            if there and not (case.of_another_row and case.document in own):
                return Asked(batch, i)
    raise AssertionError(f"none of {STEPS} batches is as the case wants it")


TERMS = {"in-batch": "in_batch", "hard": "hard", "joint": "joint"}


def test_every_line_has_a_case() -> None:
    assert NEGATIVES.keys() == CASES.keys() and WAY_BACK.keys() == BACK_CASES.keys()
    assert all(line.keys() == TERMS.keys() for line in NEGATIVES.values())


@pytest.mark.parametrize("column", TERMS)
@pytest.mark.parametrize("line", CASES)
def test_who_is_whose_negative(line: str, column: str) -> None:
    for case in CASES[line]:
        asked = find(case)
        share = asked.shares(TERMS[column])[asked.vector_of(case.document)]
        assert bool(share.abs() > 1e-9) == NEGATIVES[line][column], case.document


@pytest.mark.parametrize("line", BACK_CASES)
def test_which_queries_a_positive_is_set_against(line: str) -> None:
    case = BACK_CASES[line]
    asked = find(case)
    share = asked.shares_of_queries()[asked.vector_of(case.document)]
    assert bool(share.abs() > 1e-9) == WAY_BACK[line]["both directions"]


# --- What the page says beside the tables


def test_the_joint_term_counts_a_text_once_and_the_in_batch_term_once_for_each_row() -> None:
    """`d` is the positive of two other rows and a hard negative of two, one of them the query's."""
    rows = [row("q", "p", "d n"), row("r", "d"), row("s", "d"), row("t", "u", "d")]
    asked = find(Case(rows))
    where = [asked.vector_of(text) for text in "pdnu"]
    joint, in_batch = (asked.shares(term)[where].tolist() for term in ("joint", "in_batch"))
    assert joint == pytest.approx([1 / 4 - 1, 1 / 4, 1 / 4, 1 / 4])
    assert in_batch == pytest.approx([1 / 4 - 1, 2 / 4, 0, 1 / 4])


def test_a_shared_positive_stands_once_for_both_of_its_rows() -> None:
    asked = find(Case([row("q", "p"), row("r", "p"), row("s", "d")]))
    for term in ("joint", "in_batch"):
        assert asked.shares(term)[[asked.vector_of(text) for text in "pd"]].tolist() == pytest.approx(
            [1 / 2 - 1, 1 / 2]
        )


def test_what_is_known_to_be_right_is_never_drawn_as_the_querys_own_hard_negative() -> None:
    rows = [row("q", "p d", "d o e q n", "x"), row("q", "o"), row("r", "e", "", "x")]
    for rate in (0.0, 0.5):
        for batch in batches("retrieval", rows, rate):
            drawn = {batch.texts[n].removeprefix(PREFIX) for n in batch.negative_BK.ravel() if n >= 0}
            assert drawn == {"n"}


@pytest.mark.parametrize("format", ["clustering", "classification"])
def test_labelled_rows_have_the_hard_term_alone(format: Format) -> None:
    """Each query against its own hard negatives and nothing else of the batch, whatever the objective."""
    batch = next(batches(format, [row(f"t{n}", "", label=f"k{n % 3}") for n in range(9)]))
    roles, temperature = roles_of(batch, torch.device("cpu")), torch.tensor(TEMPERATURE)
    kinds: list[Kind] = ["f2llm-v2", "joint"]
    for kind in kinds:
        assert contrastive_terms(torch.eye(30), roles, [30], temperature, kind=kind).keys() == {"hard"}
    for i in range(9):
        asked = Asked(batch, i)
        assert not asked.shares("in_batch").any()
        own = {int(batch.positive_B[i]), *batch.negative_BK[i].tolist()}
        assert set(asked.shares("hard").nonzero().flatten().tolist()) == own
