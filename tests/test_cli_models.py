"""The verbs that make models out of models, as a user calls them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from f2llm.model.folder import Model, load_model, model_size, save_model

MakeModel = Callable[..., Model]
THINGS = ["river", "mountain", "lake", "town", "bridge", "forest", "coast", "road"]
PLACES = ["Norway", "Kenya", "Peru", "Japan", "Chad", "Nepal", "Cuba", "Wales", "Laos"]


def f2llm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "f2llm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_trim_says_what_each_language_keeps(make_model: MakeModel, rows_folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model())
    out = tmp_path / "small"
    done = f2llm("trim", tmp_path / "model", out, "--corpus", rows_folder, "--languages", "en,fra")
    assert done.returncode == 0, done.stderr
    before, after = (load_model(folder).decoder.config.vocab_size for folder in (tmp_path / "model", out))
    assert f"{before:,} -> {after:,} tokens" in done.stdout
    named = {word for line in done.stdout.splitlines() if "%" in line for word in line.split()[:1]}
    assert named and named <= {"eng", "fra"}
    again = f2llm("trim", tmp_path / "model", out, "--corpus", rows_folder)
    assert (again.returncode, "exists and is not empty" in again.stderr) == (2, True)


def test_merge_needs_numbers_for_weights(make_model: MakeModel, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        save_model(folder, make_model(seed=seed))
    refused = f2llm("merge", *folders, "--out", tmp_path / "out", "--weights", "a,1")
    assert (refused.returncode, "--weights is 'a,1'" in refused.stderr) == (2, True)
    done = f2llm("merge", *folders, "--out", tmp_path / "out", "--weights", "3,1")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "out").facts.identity[:16] in done.stdout


def test_prune_to_a_budget_shows_what_else_there_was(
    make_model: MakeModel, rows_folder: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", make_model())
    whole = model_size(load_model(tmp_path / "model").decoder)
    arguments = ("prune", tmp_path / "model", tmp_path / "out", "--calibration", rows_folder)
    for wrong, message in (("much", "--params is 'much'"), ("1B", "")):
        refused = f2llm(*arguments, "--params", wrong)
        assert (refused.returncode, message in refused.stderr) == (2, True)
    done = f2llm(*arguments, "--layers", "1", "--heads", "2")
    assert done.returncode == 0, done.stderr
    small = model_size(load_model(tmp_path / "out").decoder)
    assert small < whole and f"{small:,}" in done.stdout


def test_export_names_the_precisions_there_are(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model())
    arguments = ("export", tmp_path / "model", tmp_path / "out", "--to", "static")
    refused = f2llm(*arguments, "--quantize", "q8_0")
    assert (refused.returncode, "static has no precision 'q8_0'; expected one of f32" in refused.stderr) == (
        2,
        True,
    )
    done = f2llm(*arguments, "--dim", "8")
    assert done.returncode == 0, done.stderr
    assert "nDCG@10" in done.stdout and (tmp_path / "out" / "export.json").exists()


def test_distil_learns_from_texts_alone(make_model: MakeModel, tmp_path: Path) -> None:
    """Widths differ, so cosines go through a projection; what is printed is what the log has."""
    save_model(tmp_path / "student", make_model())
    save_model(tmp_path / "teacher", make_model(seed=1, hidden_size=16))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the {thing} of {place}" for thing in THINGS for place in PLACES) + "\n\n")
    arguments = ("distil", texts, "--student", tmp_path / "student", "--teacher", tmp_path / "teacher")
    options = ("--terms", "cosine=1,similarity=0.5", "--epochs", "20", "--learning-rate", "0.003")
    done = f2llm(*arguments, "--out", tmp_path / "out", *options, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert f"no scores: {len(THINGS) * len(PLACES)} texts that ask nothing" in done.stdout
    for term in ("cosine", "similarity"):
        found = re.search(
            rf"teacher's {term}: ([\d.]+) in the first tenth of the steps, ([\d.]+) in the last", done.stdout
        )
        assert found and float(found[2]) < float(found[1])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    assert not any("in_batch" in record for record in steps)
    total = steps[0]["teacher_cosine"] + 0.5 * steps[0]["teacher_similarity"]
    assert steps[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert load_model(tmp_path / "out").decoder.config == load_model(tmp_path / "student").decoder.config

    for wrong, sentence in (
        (("--terms", "mse=much"), "--terms is 'mse=much'"),
        (("--terms", "distance=1"), "terms.distance of distillation"),
        (("--target", "kept"), "do not correspond; take 'prefix' or 'projection'"),
        (("--target", "prefix"), "take a wider teacher, or distillation's target 'projection'"),
    ):
        refused = f2llm(*arguments, "--out", tmp_path / "other", *wrong)
        assert (refused.returncode, sentence in refused.stderr) == (2, True), refused.stderr


def test_distil_from_pairs_tells_what_it_gained(make_model: MakeModel, tmp_path: Path) -> None:
    """A student that was cut from its teacher learns the dimensions that were kept, without being told to."""
    save_model(tmp_path / "teacher", make_model(seed=1))
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": f"{t} in {p}", "positive": f"the {t} of {p}"} for t in THINGS for p in PLACES]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = f2llm("prune", tmp_path / "teacher", tmp_path / "student", "--calibration", pairs, "--hidden", "16")
    assert cut.returncode == 0, cut.stderr
    arguments = ("distil", pairs, "--student", tmp_path / "student", "--teacher", tmp_path / "teacher")
    done = f2llm(*arguments, "--out", tmp_path / "out", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "nDCG@10" in done.stdout and "teacher's mse: " in done.stdout
    assert load_model(tmp_path / "out").decoder.config.hidden_size == 16


def test_slice_warns_of_what_was_not_trained(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model())
    done = f2llm("slice", tmp_path / "model", tmp_path / "out", "--layers", "1")
    assert done.returncode == 0 and "was not trained to do with 1 layers" in done.stderr
    assert load_model(tmp_path / "out").facts.identity[:16] in done.stdout
    refused = f2llm("slice", tmp_path / "model", tmp_path / "none")
    assert (refused.returncode, "nothing is to be cut" in refused.stderr) == (2, True)
