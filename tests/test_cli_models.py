"""The verbs that make models out of models, as a user calls them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from f2llm.model.folder import Model, load_model, model_size, save_model

MakeModel = Callable[..., Model]


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
