"""What pruning and distilling keep: family_quality.yaml with three seeds, scored on names held out.

The score is accuracy@1 of names of things that training did not see, the mean over the languages with three or more of
them, of 1,600 English names. A seed holds out other names and draws other weights and batches.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from f2llm.files import read_object, write_text
from f2llm.model.decoder import DecoderConfig, config_from_json, parameters_of
from harness import Part, Row, measured

RECIPE = Path(__file__).with_name("family_quality.yaml")
SEEDS = (1, 2, 3)
FASTER = {  # for a trial
    "min_names: 100": "min_names: 1500",
    "steps: 950": "steps: 3",
    "steps: 140": "steps: 3",
    "warmup_steps: 40": "warmup_steps: 1",
    "warmup_steps: 20": "warmup_steps: 1",
}

SHARE = Row("share of the parameters outside the table that the cut model has", bar=1 / 3, better="lower")
KEPT = Row("quality kept, cut and taught, mean of three seeds", bar=0.95)
WORST = Row("quality kept, cut and taught, the worst of three seeds")
ALONE = Row("quality kept, cut and trained without a teacher")
RANDOM = Row("quality of the cut shape from random weights, as a share")
AHEAD = Row("points by which the whole model is ahead of random weights, the least of three seeds", bar=5)


def family_quality(folder: Path, small: bool) -> Part:
    """Run the recipe for each seed; `small` is one seed and three steps."""
    seeds = SEEDS[:1] if small else SEEDS
    scores = [_scores(folder / str(seed), seed, small) for seed in seeds]
    kept = {name: [one[name] / one["whole"] for one in scores] for name in ("taught", "alone", "random")}
    ahead = [100 * (one["whole"] - one["random"]) for one in scores]
    run = folder / str(seeds[0])
    figures = [
        measured(SHARE, _outside_the_table(run / "taught") / _outside_the_table(run / "whole")),
        measured(KEPT, statistics.mean(kept["taught"])),
        measured(WORST, min(kept["taught"])),
        measured(ALONE, statistics.mean(kept["alone"])),
        measured(RANDOM, statistics.mean(kept["random"])),
        measured(AHEAD, min(ahead)),
    ]
    by_seed = {
        str(seed): {name: round(value, 4) for name, value in one.items()}
        for seed, one in zip(seeds, scores, strict=True)
    }
    return Part(figures, {"quality": {"recipe": f"benchmarks/{RECIPE.name}", "scores": by_seed}}, {})


def _scores(run: Path, seed: int, small: bool) -> dict[str, float]:
    """The mean accuracy@1 of each model at its full width."""
    text = RECIPE.read_text(encoding="utf-8").replace("seed: 1", f"seed: {seed}")
    text = text.replace("output: runs/family-quality", f"output: {run}")
    for long, short in FASTER.items() if small else ():
        text = text.replace(long, short)
    write_text(recipe := run.with_suffix(".yaml"), text)
    subprocess.run([sys.executable, "-m", "f2llm", "run", str(recipe)], check=True, stdout=subprocess.DEVNULL)
    models: list[dict[str, Any]] = read_object(run / "report.json")["models"]
    return {one["name"]: one["accuracy_at_1"][str(one["dim"])]["mean"] for one in models}


def _outside_the_table(folder: Path) -> int:
    config: DecoderConfig = config_from_json(read_object(folder / "config.json"), str(folder))
    return parameters_of(config) - config.vocab_size * config.hidden_size
