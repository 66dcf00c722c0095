"""How well a model finds the English name of a thing from its name in another language.

names.parquet -> exam (candidates, held-out questions, their answers, what is left out) -> vectors, once at
full size -> ranks at every Matryoshka size -> accuracy@1 and mean reciprocal rank per language -> scores.json.

Shapes: Q questions, C candidates, D dims, N distinct texts.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from f2llm.embed.embedder import Embedder, truncate
from f2llm.errors import F2Error
from f2llm.evaluate.baselines import baseline_ranks
from f2llm.evaluate.exam import MIN_QUERIES, Exam, Floats, Integers, chunks, ranks, read_exam
from f2llm.files import write_json
from f2llm.languages import script
from f2llm.model.tokenizer import TooLong
from f2llm.progress import Bar, progress
from f2llm.recipe import EvaluateStage

SCHEMA_VERSION = 1
WORST = 10
CHUNK = 4096


class Model(Protocol):
    """What is asked of an embedder; `f2llm.embed.embedder.Embedder` has it."""

    dim: int
    sizes: list[int]
    parameters: int

    def encode(
        self, texts: list[str], *, prompt: str | None, normalize: bool, too_long: TooLong
    ) -> Floats: ...

    def tokens(self, texts: list[str], prompt: str | None) -> int: ...


def vector_ranks(queries_QD: Floats, candidates_CD: Floats, answers_Q: Integers, size: int) -> Integers:
    """Ranks [Q] by cosine of the first `size` dimensions of un-normalised vectors."""
    queries_QD, candidates_CD = truncate(queries_QD, size), truncate(candidates_CD, size)
    ranks_Q = np.empty(len(answers_Q), dtype=np.int64)
    for chunk in chunks(len(answers_Q), CHUNK):
        ranks_Q[chunk] = ranks(queries_QD[chunk] @ candidates_CD.T, answers_Q[chunk])
    return ranks_Q


def summarise(langs: Sequence[str], ranks_Q: Integers) -> dict[str, Any]:
    """Figures of one list of ranks: per language, and over the languages with at least MIN_QUERIES questions.

    Gives languages, queries, accuracy_at_1 and mrr (mean, median, p10 over languages), worst (ten languages),
    scripts (mean over the script's languages) and per_language; empty if no language has enough questions.
    """
    by_lang: dict[str, list[int]] = {}
    for lang, rank in zip(langs, ranks_Q.tolist(), strict=True):
        by_lang.setdefault(lang, []).append(rank)
    per_language = {
        lang: {
            "accuracy_at_1": round(float(np.mean(np.array(found) == 1)), 4),
            "mrr": round(float(np.mean(1 / np.array(found))), 4),
            "queries": len(found),
        }
        for lang, found in sorted(by_lang.items())
        if len(found) >= MIN_QUERIES
    }
    if not per_language:
        return {}
    by_script: dict[str, list[float]] = {}
    for lang, figures in per_language.items():
        by_script.setdefault(script(lang), []).append(figures["accuracy_at_1"])
    worst = sorted(per_language, key=lambda lang: (per_language[lang]["accuracy_at_1"], lang))[:WORST]
    return {
        "languages": len(per_language),
        "queries": sum(figures["queries"] for figures in per_language.values()),
        "accuracy_at_1": _spread([figures["accuracy_at_1"] for figures in per_language.values()]),
        "mrr": _spread([figures["mrr"] for figures in per_language.values()]),
        "worst": [{"language": lang, **per_language[lang]} for lang in worst],
        "scripts": {
            name: {"languages": len(values), "accuracy_at_1": round(float(np.mean(values)), 4)}
            for name, values in sorted(by_script.items(), key=lambda item: (-len(item[1]), item[0]))
        },
        "per_language": per_language,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(values)), 4),
        "median": round(float(np.median(values)), 4),
        "p10": round(float(np.percentile(values, 10)), 4),
    }


def score_model(name: str, model: Model, exam: Exam) -> tuple[dict[str, Any], float]:
    """Scores of one model at all its sizes, and the tokens per second of their encoding.

    Equal texts are encoded once. Raises F2Error if the model gives a number that is not finite.
    """
    distinct = list(dict.fromkeys(text for asked in exam.questions.values() for text in asked.texts))
    row = {text: number for number, text in enumerate(distinct)}
    with progress(total=len(distinct) + len(exam.candidates), what=f"score {name}", unit="text") as bar:
        started = time.perf_counter()
        queries_ND = _encode(model, distinct, "query", bar)
        candidates_CD = _encode(model, exam.candidates, "document", bar)
        seconds = time.perf_counter() - started
    if not (np.isfinite(queries_ND).all() and np.isfinite(candidates_CD).all()):
        raise F2Error(f"model {name!r} gives numbers that are not finite; lower its learning_rate.")

    scores: dict[str, Any] = {
        "name": name,
        "parameters": model.parameters,
        "dim": model.dim,
        "sizes": list(model.sizes),
    }
    for which, asked in exam.questions.items():
        queries_QD = queries_ND[[row[text] for text in asked.texts]]
        scores[which] = {
            str(size): summarise(asked.langs, vector_ranks(queries_QD, candidates_CD, asked.answers_Q, size))
            for size in model.sizes
        }
    tokens = model.tokens(distinct, "query") + model.tokens(exam.candidates, "document")
    return scores, tokens / seconds


def _encode(model: Model, texts: list[str], prompt: Literal["query", "document"], bar: Bar) -> Floats:
    parts = []
    for chunk in chunks(len(texts), CHUNK):
        # A trimmed vocabulary takes more tokens for a name than training saw; it is cut, as training would.
        parts.append(model.encode(texts[chunk], prompt=prompt, normalize=False, too_long="truncate"))
        bar.advance(len(texts[chunk]))
    return np.concatenate(parts)


def evaluate_stage(
    config: EvaluateStage, *, data: Path, models: dict[str, Path], out: Path
) -> dict[str, Any]:
    """Score `models` (name -> model folder) on data/names.parquet and write out/scores.json.

    scores.json is a function of data and weights alone; the speeds are in the facts that are returned.
    """
    exam = read_exam(data / "names.parquet")
    facts: dict[str, Any] = {
        "candidates": len(exam.candidates),
        "questions": {which: len(asked.texts) for which, asked in exam.questions.items()},
        "left_out": exam.left_out,
        # What is spelt as in English anybody can find; among things held out altogether that is not rare.
        "spelt_as_in_english": {
            which: sum(
                text == exam.candidates[answer]
                for text, answer in zip(asked.texts, asked.answers_Q, strict=True)
            )
            for which, asked in exam.questions.items()
        },
    }
    scores: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "min_queries": MIN_QUERIES, **facts}
    scores |= {"models": [], "baseline": {}}
    facts |= {"tokens_per_second": {}, "accuracy_at_1": {}}
    for name, path in models.items():
        figures, speed = score_model(name, Embedder(path), exam)
        scores["models"].append(figures)
        facts["tokens_per_second"][name] = round(speed)
        facts["accuracy_at_1"][name] = figures["pairs"][str(figures["dim"])]["accuracy_at_1"]["mean"]
    for name, ranks_of in baseline_ranks(exam).items() if config.baselines else ():
        scores["baseline"][name] = {
            which: {"full": summarise(asked.langs, ranks_of[which])}
            for which, asked in exam.questions.items()
        }
    write_json(out / "scores.json", scores)
    return facts
