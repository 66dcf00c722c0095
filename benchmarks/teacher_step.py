"""A training step with a teacher: its vectors from a warm cache, against a teacher that computes beside the student.

The student has the 80M shape, the teacher the 0.6B one, both with random weights; the term is the paper's, the squared
distance to the teacher's first dimensions. Either step is a whole one: the teacher's vectors, the student's forward
and backward pass, the objective, clipping and AdamW. The batch is that of train_step.py: queries, their positives and
hard negatives, as real texts. Each contender has a process of its own, with the same weights to begin with; the cache
is filled by a third, which has ended then.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from f2llm.files import write_json
from f2llm.text import clean
from harness import Part, Row, measured, relative_difference, take_turns, worker
from inputs import (
    DOCUMENTS,
    FULL,
    QUERIES,
    SMALL,
    Size,
    describe,
    draw_texts,
    family_size,
    make_model,
    token_ids,
)
from train_step import HARD_NEGATIVES, MAX_LENGTH

TIME = Row(
    "seconds of a step with a cached teacher, peer a teacher beside the student", bar=0.25, better="lower"
)
LOSS = Row("relative difference of the loss with a cached teacher", better="lower")

MODULE = "teacher_step_ours"


def teacher_step(folder: Path, small: bool) -> Part:
    """Fill the cache, then take steps in turns."""
    student, queries = (SMALL, 3) if small else (FULL, 6)
    teacher = wider(SMALL) if small else family_size("0.6B")
    inputs = prepare(folder, student, teacher, queries)
    arguments = (folder / "student", folder / "teacher", folder / "rows.json")
    with worker(MODULE, *arguments, folder / "cache") as filling:
        filling.call("step")
    with (
        worker(MODULE, *arguments, folder / "cache", keep_memory=True) as cached,
        worker(MODULE, *arguments, keep_memory=True) as beside,
    ):
        last: dict[str, dict[str, float]] = {}

        def turn(name: str, step: Callable[[], dict[str, float]]) -> float:
            last[name] = step()
            return last[name]["seconds"]

        contenders = {"cached": cached, "beside": beside}
        steps = {name: partial(turn, name, partial(one.call, "step")) for name, one in contenders.items()}
        medians = take_turns(steps)
        figures = [
            measured(TIME, medians["cached"], medians["beside"]),
            measured(LOSS, relative_difference(last["cached"]["loss"], last["beside"]["loss"])),
        ]
        memory = {name: round(one.call("peak_memory") / 2**30, 2) for name, one in contenders.items()}
    inputs["peak_memory_in_gb"] = memory
    facts = {"student, cached teacher": cached.facts, "student and teacher": beside.facts}
    return Part(figures, {"teacher": inputs}, facts)


def wider(size: Size) -> Size:
    """A teacher's size in trials."""
    return replace(size, decoder=replace(size.decoder, hidden_size=2 * size.decoder.hidden_size))


def prepare(folder: Path, student: Size, teacher: Size, queries: int) -> dict[str, Any]:
    """Write both models and rows.json; what they are."""
    query_texts, query_origin = draw_texts(student, QUERIES, queries)
    documents, document_origin = draw_texts(student, DOCUMENTS, queries * (1 + HARD_NEGATIVES))
    texts = [clean(text) for text in (*query_texts, *documents)]
    model = make_model(folder / "student", student, texts, MAX_LENGTH)
    make_model(folder / "teacher", teacher, texts, MAX_LENGTH)
    positives, negatives = texts[queries : 2 * queries], texts[2 * queries :]
    rows = {
        "query": texts[:queries],
        "positives": [[text] for text in positives],
        "negatives": [negatives[row::queries] for row in range(queries)],
    }
    write_json(folder / "rows.json", rows)
    inputs = {
        **describe(student, model, token_ids(model, texts), f"{query_origin}; {document_origin}"),
        "teacher": f"{teacher.name} shape, random weights",
        "queries": queries,
        "hard_negatives": HARD_NEGATIVES,
    }
    print(f"teacher: {inputs}", flush=True)
    return inputs
