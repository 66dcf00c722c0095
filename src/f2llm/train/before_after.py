"""What a fine-tune came to: scores of two models on the same questions, how sure their difference is, and the words.

Shape suffixes: N texts, D dims, Q questions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F

from f2llm.data.rows import Format
from f2llm.model.folder import Model
from f2llm.train.own_rows import FEWEST_ROWS
from f2llm.train.ranks import Ranks
from f2llm.train.step import vectors_of
from f2llm.train.terms import TEACHER, token_ids
from f2llm.train.trials import Trial
from f2llm.train.validate import MEASURES, answers, quality

TOKENS_AT_ONCE = 8192
NORMAL_95 = 1.96  # standard errors on either side of a mean that hold it in 95 of 100 samples
FEWEST_FOR_MARGIN = 30  # questions; of fewer, the normal distribution says nothing
LABELS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "accuracy_at_1": "accuracy@1"}

Found = dict[str, np.ndarray]
"""By measure float64 [Q]: how well each question was answered, from 0 to 1."""


@dataclass(frozen=True)
class Score:
    """One measure: means over the questions, and half the width of the 95 % interval of their difference."""

    before: float
    after: float
    margin: float | None
    """None where the questions are too few to tell."""


@dataclass(frozen=True)
class Outcome:
    """What a fine-tune came to; the model folder keeps it as finetune.json."""

    model: str
    format: Format
    rows: dict[str, int]
    """How many there were to `train` on, for the `dev` score that chose the weights, and for the `test` of them."""
    steps: int
    """Of a run that does not stop early."""
    kept_step: int
    """The steps done when the weights were as they are kept; 0 means that they are the base's."""
    dev_scores: dict[int, float]
    """By steps done; empty without dev rows."""
    questions: int
    """Asked by the test rows."""
    candidates: int
    """Texts among which each of them looks."""
    scores: dict[str, Score]
    """On the test rows, by measure, the main one first; empty without test rows."""
    teacher: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each of a teacher's terms the means over the first and over the last tenth of the steps."""


def answer(model: Model, trial: Trial, max_length: int, ranks: Ranks) -> Found:
    """How well a model answers each question of a trial; in float32, on this rank alone."""
    decoder = model.decoder.to(ranks.device)
    ids = token_ids(model, trial.texts, max_length)
    unit_ND = F.normalize(vectors_of(decoder, ids, TOKENS_AT_ONCE), dim=-1)
    ranked = zip(trial.questions, answers(unit_ND, trial), strict=True)
    found = [quality(ranks_R, len(question.right_R)) for question, ranks_R in ranked]
    return {name: np.asarray([each[name] for each in found]) for name in MEASURES[trial.format]}


def compare(before: Found, after: Found) -> dict[str, Score]:
    """Means, and the margin of error of the difference: 1.96 standard errors of the paired differences."""
    return {name: _score(before[name], after_Q) for name, after_Q in after.items()}


def _score(before_Q: np.ndarray, after_Q: np.ndarray) -> Score:
    count, margin = len(after_Q), None
    if count >= FEWEST_FOR_MARGIN:
        margin = NORMAL_95 * (after_Q - before_Q).std(ddof=1) / math.sqrt(count)
    return Score(
        round(float(before_Q.mean()), 4),
        round(float(after_Q.mean()), 4),
        None if margin is None else round(float(margin), 4),
    )


WANTED = {
    "retrieval": "its answer among {:,} texts",
    "clustering": "another text of its label among {:,} texts",
    "classification": "its label among {:,}",
}


def render(outcome: Outcome) -> str:
    """The outcome for people: the table, which weights were kept and why, and where they are."""
    return "\n".join([*_table(outcome), *_learnt(outcome), *_kept(outcome), f"model: {outcome.model}"])


def _table(outcome: Outcome) -> Iterator[str]:
    if not outcome.scores:
        rows = outcome.rows["train"]
        if outcome.teacher and not outcome.questions and rows >= FEWEST_ROWS:
            yield f"no scores: {rows:,} texts that ask nothing of each other, and all were trained on"
            return
        why = f"{rows:,} rows are too few" if rows < FEWEST_ROWS else "a tenth of the rows asks nothing"
        yield f"no scores: {why}, so none were held out and all were trained on"
        return
    wanted = WANTED[outcome.format].format(outcome.candidates)
    yield f"on {outcome.rows['test']:,} rows held out, which neither trained nor chose the weights"
    yield f"({outcome.questions:,} questions, each to find {wanted}):"
    margins = all(score.margin is not None for score in outcome.scores.values())
    told = "± its 95 % margin of error" if margins else "(the questions are too few for a margin of error)"
    yield f"{'':10}  {'before':>6}  {'after':>6}  difference {told}"
    for name, score in outcome.scores.items():
        margin = "" if score.margin is None else f" ± {score.margin:.4f}"
        change = score.after - score.before
        yield f"{LABELS[name]:10}  {score.before:.4f}  {score.after:.4f}  {change:+.4f}{margin}"


def _learnt(outcome: Outcome) -> Iterator[str]:
    for name, (first, last) in outcome.teacher.items():
        term = name.removeprefix(TEACHER)
        yield f"teacher's {term}: {first:.4f} in the first tenth of the steps, {last:.4f} in the last"


def _kept(outcome: Outcome) -> Iterator[str]:
    if not outcome.dev_scores and not outcome.questions and outcome.teacher:
        yield f"kept: the weights after all {outcome.steps:,} steps"
        return
    if not outcome.dev_scores:
        yield f"kept: the weights after all {outcome.steps:,} steps; the rows are too few to choose by"
        return
    scores, last = outcome.dev_scores, max(outcome.dev_scores)
    best, others = scores[outcome.kept_step], f"{outcome.rows['dev']:,} other rows held out"
    if outcome.kept_step == 0:
        yield f"kept: the base's own weights, since training did not help: on {others}"
        yield f"nothing scored better than the base's {best:.4f} in {last:,} of {outcome.steps:,} steps"
        return
    early = f", stopped after {last:,}" if last < outcome.steps else ""
    yield f"kept: the weights after {outcome.kept_step:,} of {outcome.steps:,} steps{early}, the best on {others}"
    yield f"({LABELS[MEASURES[outcome.format][0]]} there: {scores[0]:.4f} before, {best:.4f} kept)"
