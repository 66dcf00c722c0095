"""Validation: the loss and a small retrieval score on rows held out of training, per source and language.

trials (trials.py) -> raw vectors of their texts -> figures (`validate`), the best so far (`Best`), a table for people.
Figures depend on the weights and the trials alone: nothing is drawn here, and ties have an order.

Shape suffixes: N texts of a trial, Q queries, C candidates, R right candidates of a query, D dims.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.cells import cell_len
from torch import Tensor

from f2llm.errors import F2Error
from f2llm.train.sampler import Batch
from f2llm.train.sources import Text
from f2llm.train.trials import Trial

Encode = Callable[[list[Text]], Tensor]
LossOf = Callable[[Batch, Tensor], dict[str, float]]
Figures = dict[str, Any]

TOP = 10  # ranks that count
FEWEST_QUERIES = 5  # a language with fewer has no figures of its own; such languages are pooled as OTHER
OTHER = "other"
CHUNK = 256  # queries whose scores against all candidates are in memory at once

# The figures of each format; the first is its main one.
MEASURES = {
    "retrieval": ("ndcg_at_10", "mrr_at_10", "accuracy_at_1"),
    "clustering": ("accuracy_at_1",),
    "classification": ("accuracy_at_1",),
}


# --- How well it is found


@torch.no_grad()
def validate(encode: Encode, trials: Sequence[Trial], loss_of: LossOf) -> Figures:
    """Figures of a model, rounded to what is logged.

    Args:
        encode: raw vectors, float [N, D] on any device, of distinct texts that already carry their prompts; in
            micro-batches, without gradient.
        loss_of: the terms of the loss of a batch, from the raw vectors of `batch.texts`.

    Returns:
        `score`, the mean over sources of their main figure, and `sources`: for each the `measure` that is its main
        one, `rows`, `queries` (rows that ask something), its MEASURES, `loss` (means over its batches) and `languages`,
        each with `queries` and the measures again. A source without questions has no measures and no part in the score.

    Raises:
        F2Error if a vector is not finite.
    """
    sources = {trial.source: _figures(encode, trial, loss_of) for trial in trials}
    scores = [found[found["measure"]] for found in sources.values() if found["queries"]]
    return {"score": round(float(np.mean(scores)), 4), "sources": sources}


def _figures(encode: Encode, trial: Trial, loss_of: LossOf) -> Figures:
    vectors_ND = encode(trial.texts).float()
    if not vectors_ND.isfinite().all():
        raise F2Error(
            f"validation on source {trial.source!r} gives vectors that are not finite; lower learning_rate or lengthen "
            "warmup_steps."
        )
    losses = defaultdict(list)
    for batch, place_N in trial.batches:
        for name, value in loss_of(batch, _rows(vectors_ND, place_N)).items():
            losses[name].append(value)
    measures = MEASURES[trial.format]
    by_language: dict[str, list[dict[str, float]]] = defaultdict(list)
    ranked = answers(F.normalize(vectors_ND, dim=-1), trial)
    for question, ranks_R in zip(trial.questions, ranked, strict=True):
        by_language[question.lang].append(quality(ranks_R, len(question.right_R)))
    everything = [found for several in by_language.values() for found in several]
    return {
        "measure": measures[0],
        "rows": trial.rows,
        **_mean(everything, measures),
        "loss": {name: round(float(np.mean(values)), 6) for name, values in losses.items()},
        "languages": _languages(by_language, measures),
    }


def _rows(vectors_ND: Tensor, place: np.ndarray) -> Tensor:
    return vectors_ND.index_select(0, torch.from_numpy(place).to(vectors_ND.device))


def answers(unit_ND: Tensor, trial: Trial) -> Iterator[np.ndarray]:
    """For each question the ranks of its best right candidates."""
    candidates_CD = _rows(unit_ND, trial.candidate_C)
    for start in range(0, len(trial.questions), CHUNK):
        questions = trial.questions[start : start + CHUNK]
        queries_QD = _rows(unit_ND, np.asarray([question.text for question in questions]))
        scores_QC = (queries_QD @ candidates_CD.T).cpu().numpy()
        for question, scores_C in zip(questions, scores_QC, strict=True):
            if question.own is not None:
                scores_C[question.own] = -np.inf
            yield ranks(scores_C, question.right_R)


def ranks(scores_C: np.ndarray, right_R: np.ndarray) -> np.ndarray:
    """Ranks, from 1 and ascending, of the TOP best right candidates (of all if they are fewer), int64.

    A wrong candidate that ties with a right one comes first, so that a model which gives all texts one vector is not
    lucky.
    """
    right_scores_R = scores_C[right_R]
    best_R = np.sort(right_scores_R)[::-1][:TOP]
    as_good_R = np.count_nonzero(scores_C >= best_R[:, None], axis=1)
    as_good_R -= np.count_nonzero(right_scores_R >= best_R[:, None], axis=1)
    return as_good_R + np.arange(1, len(best_R) + 1)


def quality(ranks_R: np.ndarray, right: int) -> dict[str, float]:
    """Accuracy@1, reciprocal rank and nDCG at TOP (binary gains, discount log2(1 + rank)) of one query.

    Args:
        ranks_R: of its best right candidates, ascending, from 1.
        right: how many right candidates there are in all.
    """
    found = ranks_R[ranks_R <= TOP]
    ideal = np.arange(1, min(right, TOP) + 1)
    return {
        "accuracy_at_1": float(ranks_R[0] == 1),
        "mrr_at_10": float(1 / found[0]) if len(found) else 0.0,
        "ndcg_at_10": float((1 / np.log2(1 + found)).sum() / (1 / np.log2(1 + ideal)).sum()),
    }


def _mean(found: Sequence[dict[str, float]], measures: Sequence[str]) -> Figures:
    means = {name: round(float(np.mean([each[name] for each in found])), 4) for name in measures if found}
    return {"queries": len(found), **means}


def _languages(by_language: dict[str, list[dict[str, float]]], measures: Sequence[str]) -> Figures:
    """Figures by language; those with few queries together, with their number, under OTHER."""
    few = [lang for lang, found in by_language.items() if len(found) < FEWEST_QUERIES]
    figures = {lang: _mean(found, measures) for lang, found in sorted(by_language.items()) if lang not in few}
    if few:
        pooled = [each for lang in few for each in by_language[lang]]
        figures[OTHER] = {"languages": len(few), **_mean(pooled, measures)}
    return figures


# --- The best so far


@dataclass(frozen=True)
class Best:
    """The best validation of a run so far, and how many came since; the weights of `step` are the ones to keep."""

    patience: int | None
    """Misses after which the run stops; None for never."""
    step: int | None = None
    score: float = -math.inf
    misses: int = 0

    def after(self, score: float, step: int) -> "Best":
        """The state after one more validation; an equal score is a miss."""
        if score > self.score:
            return replace(self, step=step, score=score, misses=0)
        return replace(self, misses=self.misses + 1)

    @property
    def stop(self) -> bool:
        return self.patience is not None and self.misses >= self.patience


def best_so_far(log: Iterable[dict[str, Any]], patience: int | None) -> Best:
    """Where a run stands by the records of its log (see watch.py)."""
    best = Best(patience)
    for record in log:
        if "validation" in record:
            best = best.after(record["validation"]["score"], record["step"])
    return best


# --- For people


def table(before: Figures, after: Figures) -> str:
    """Two results of `validate` on the same trials side by side: each source's main figure, by language as well."""
    lines = [["", "measure", "queries", "before", "after", "difference"]]
    for name, new in after["sources"].items():
        old, measure = before["sources"][name], new["measure"]
        lines.append(_line(name, measure, old, new))
        for lang, figures in new["languages"].items():
            label = f"  {lang} ({figures['languages']} languages)" if lang == OTHER else f"  {lang}"
            lines.append(_line(label, measure, old["languages"][lang], figures))
    lines.append(_line("mean over sources", "score", before, after))
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _line(label: str, measure: str, old: Figures, new: Figures) -> list[str]:
    queries = str(new.get("queries", ""))
    if measure not in new:  # a source without questions
        return [label, measure, queries, "-", "-", "-"]
    difference = f"{new[measure] - old[measure]:+.4f}"
    return [label, measure, queries, f"{old[measure]:.4f}", f"{new[measure]:.4f}", difference]


def _aligned(line: list[str], widths: list[int]) -> str:
    """Two columns of words, then columns of numbers; letters may be wide."""
    space = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
    words = [cell + fill for cell, fill in zip(line[:2], space[:2], strict=True)]
    return "  ".join([*words, *(fill + cell for cell, fill in zip(line[2:], space[2:], strict=True))])
