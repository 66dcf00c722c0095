"""What each choice of making a small model is worth: recipes/ablation.yaml with three seeds, and the tables of it.

    python recipes/ablation.py            (about an hour and a quarter on 2 cores; goes on where it was stopped)

A seed holds out other rows, draws other weights and batches, and reads other rows of large sources. A score is the
mean over sources of nDCG@10 (retrieval) or accuracy@1 (clustering, classification) on rows that no model of that seed
was trained on. Differences are taken within a seed; intervals are those of Student's t at 95 %. One thread a run, and
two runs at a time, so that scores are the same on any machine that computes alike.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from f2llm.data.rows import read_rows
from f2llm.embed.embedder import Embedder
from f2llm.files import read_object, write_json, write_text
from f2llm.model.decoder import config_from_json, parameters_of
from f2llm.recipe import load
from f2llm.recipe_train import TrainStage
from f2llm.train.objective import matryoshka_sizes
from f2llm.train.sources import hold_out, load_sources
from f2llm.train.trials import Trial, prepare
from f2llm.train.validate import validate

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
SEEDS = ("1", "2", "3")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds
SHORT = 16  # dimensions of the second score in the tables

Scores = dict[str, dict[str, float]]  # model -> dimensions -> score

# What is compared with what: title, the model that others are measured against, the others.
TABLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The whole model, with and without a teacher", "whole", ("base", "whole-taught")),
    ("Medium", "medium", ("medium-cut", "medium-taught")),
    ("Small", "small", ("small-cut", "small-random", "small-taught")),
    (
        "Terms",
        "small",
        (
            "small-mse-prefix",
            "small-mse-kept",
            "small-mse-projection",
            "small-cosine",
            "small-similarity",
            "small-ranking",
            "small-taught",
            "small-teacher-alone",
        ),
    ),
    ("Layers, cut", "small-cut", ("change-cut", "even-cut")),
    ("Layers, trained", "small", ("small-change", "small-even")),
    ("Layers, taught", "small-taught", ("small-change-taught", "small-even-taught")),
    ("Calibration, cut", "small-cut", ("parallel-cut", "two-class-cut", "few-texts-cut", "taylor-cut")),
    (
        "Calibration, taught",
        "small-taught",
        ("small-parallel-taught", "small-two-class-taught", "small-few-texts-taught", "small-taylor-taught"),
    ),
    ("Matryoshka", "small-taught", ("small-one-size-taught",)),
    ("Half of the vocabulary", "small-taught", ("small-trimmed", "trimmed-small-taught")),
)
CURVES = ("whole", "medium-taught", "small", "small-taught", "small-one-size-taught")


def run(seed: str, small: bool) -> Path:
    """The folder of a seed's run, complete."""
    text = RECIPE.read_text(encoding="utf-8")
    folder = ROOT / "runs" / ("ablation-trial" if small else "ablation")
    text = text.replace("seed: 1", f"seed: {seed}").replace("runs/ablation/1", str(folder / seed))
    text = text.replace("runs/ablation-teacher/1", str(folder / f"{seed}-teacher"))
    if small:
        text = text.replace("limit: 6000", "limit: 300").replace("steps: 500", "steps: 20")
        text = text.replace("steps: 120", "steps: 20").replace("warmup_steps: 40", "warmup_steps: 2")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe := folder / f"{seed}.yaml", text)
    with open(folder / f"{seed}.log", "w") as log:
        command = [sys.executable, "-m", "f2llm", "run", str(recipe)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=one_thread, cwd=ROOT)
    return folder / seed


def scores_of(folder: Path) -> Scores:
    """Every model of a run at all its sizes, on the rows that the run held out."""
    recipe = load(folder.with_suffix(".yaml"))
    config = recipe.stages["whole"]
    assert isinstance(config, TrainStage) and config.validation
    table, sources = read_rows(folder / "clean")
    rows = load_sources(table, sources, config.formats)
    held_out = [hold_out(source, config.validation.rows, recipe.seed)[1] for source in rows]
    trials = prepare(config, held_out, recipe.seed)
    models = [name for name in recipe.stages if (folder / name / "config.json").is_file()]
    return {name: dict(curve(folder / name, trials)) for name in models}


def curve(model: Path, trials: Sequence[Trial]) -> Iterator[tuple[str, float]]:
    """Dimensions and score: 8, 16, 32 ... and all, trained for or not."""
    embedder = Embedder(model)
    texts = list(dict.fromkeys(text for trial in trials for text in trial.texts))
    row = {text: number for number, text in enumerate(texts)}
    vectors_ND = torch.from_numpy(
        embedder.encode([str(t) for t in texts], normalize=False, too_long="truncate")
    )
    for size in matryoshka_sizes(embedder.dim):

        def encode(texts: Sequence[object], size: int = size) -> torch.Tensor:
            return vectors_ND[[row[text] for text in texts], :size]

        yield str(size), validate(encode, trials, lambda *_: {})["score"]


def interval(values: Sequence[float]) -> str:
    """Mean and half of its interval, in points."""
    half = (
        T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    )
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def tables(runs: Sequence[Path], scores: Sequence[Scores]) -> str:
    lines = []
    for title, reference, others in TABLES:
        heads = ["model", "parameters", "outside the table", "score", f"at {SHORT} dimensions", "difference"]
        lines += ["", f"**{title}**", "", f"| {' | '.join(heads)} |", "| --- " + "| ---: " * 5 + "|"]
        for name in (reference, *others):
            whole = [_full(one[name]) for one in scores]
            short = [one[name][str(SHORT)] for one in scores]
            apart = [a - _full(one[reference]) for a, one in zip(whole, scores, strict=True)]
            config = config_from_json(read_object(runs[0] / name / "config.json"), name)
            total = parameters_of(config)
            outside = total - config.vocab_size * config.hidden_size
            cells = [f"`{name}`", f"{total:,}", f"{outside:,}", interval(whole), interval(short)]
            cells.append("" if name == reference else interval(apart))
            lines.append(f"| {' | '.join(cells)} |")
    sizes = list(scores[0][CURVES[0]])
    lines += [
        "",
        "**By dimensions**",
        "",
        f"| model | {' | '.join(sizes)} |",
        "| --- " + "| ---: " * len(sizes) + "|",
    ]
    for name in CURVES:
        means = [
            f"{100 * np.mean([one[name][s] for one in scores]):.1f}" if s in scores[0][name] else ""
            for s in sizes
        ]
        lines.append(f"| `{name}` | {' | '.join(means)} |")
    return "\n".join(lines)


def _full(by_size: dict[str, float]) -> float:
    return by_size[max(by_size, key=int)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few rows and steps: a trial, no figures")
    small = parser.parse_args().small
    seeds = SEEDS[:2] if small else SEEDS
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seed: run(seed, small), seeds))
    torch.set_num_threads(1)
    scores = [scores_of(folder) for folder in runs]
    write_json(runs[0].parent / "scores.json", dict(zip(seeds, scores, strict=True)))
    print(tables(runs, scores))


if __name__ == "__main__":
    main()
