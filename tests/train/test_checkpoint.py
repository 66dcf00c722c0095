"""Checkpoints: everything comes back on any number of ranks, and what is half-written or damaged does not count."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.gloo import on_ranks
from torch import Tensor

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.train import checkpoint
from f2llm.train.checkpoint import (
    check_same,
    drop_checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from f2llm.train.ranks import ALONE, Ranks, shard

TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 2], [9, 1], [3, 3, 3], [7, 2, 9, 1]]

Pair = tuple[Decoder, torch.optim.AdamW]
Named = dict[str, dict[str, Tensor]]


def make(seed: int, ranks: Ranks = ALONE, width: int = 24) -> Pair:
    """A decoder with random weights and its optimizer, all of whose tensors are there."""
    decoder = Decoder(DecoderConfig(50, width, 40, 2, 4, 2, 8))
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    shard(decoder, ranks, "fp32", activation_checkpointing=False)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)
    for p in decoder.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return decoder, optimizer


def train(pair: Pair, ranks: Ranks = ALONE) -> None:
    """One step on the texts, dealt out over the ranks."""
    decoder, optimizer = pair
    mine = TEXTS[ranks.rank :: ranks.world]
    vectors = decoder(torch.tensor([token for text in mine for token in text]), [len(text) for text in mine])
    optimizer.zero_grad()
    (vectors.square() + vectors.tanh()).sum().backward()
    optimizer.step()


def state(pair: Pair) -> Named:
    """What is saved, live."""
    decoder, optimizer = pair
    moments = {
        f"{name}/{key}": value
        for name, parameter in decoder.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {"model": decoder.state_dict(), "optimizer": moments}


def copied(pair: Pair) -> Named:
    """What is saved, whole and on its own."""
    return {part: {name: whole(t) for name, t in tensors.items()} for part, tensors in state(pair).items()}


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def same(a: Named, b: Named) -> bool:
    return all(
        a[part].keys() == b[part].keys() and all(torch.equal(t, b[part][name]) for name, t in a[part].items())
        for part in ("model", "optimizer")
    )


def save(folder: Path, step: int, pair: Pair, keep: int = 1, ranks: Ranks = ALONE) -> None:
    save_checkpoint(folder, step, state(pair), {"note": [step, "ß"]}, keep, ranks)


def load(folder: Path, pair: Pair) -> int:
    found = find_checkpoint(folder, ALONE)
    assert found is not None
    return load_checkpoint(found, state(pair))


@pytest.fixture
def pairs() -> list[Pair]:
    """Three models, each after two steps."""
    made = [make(seed) for seed in range(3)]
    for pair in made:
        train(pair)
        train(pair)
    return made


def go_on(ranks: Ranks, first: Path, second: Path) -> dict[str, Any]:
    """Load, make a step, save, make another."""
    pair = make(9, ranks)
    found = find_checkpoint(first, ranks)
    assert found is not None
    facts: dict[str, Any] = {"step": load_checkpoint(found, state(pair)), "meta": read_meta(found)}
    facts["loaded"] = copied(pair)
    train(pair, ranks)
    save(second, facts["step"] + 1, pair, ranks=ranks)
    facts["saved"] = copied(pair)
    train(pair, ranks)
    facts["last"] = copied(pair)
    return facts


def go_on_and_fail(ranks: Ranks, first: Path, second: Path, third: Path) -> tuple[dict[str, Any], str, str]:
    """The same, and then the disk of rank 1 is full at the second of two checkpoints; the first is damaged later."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    facts, refusal, pair = go_on(ranks, first, second), "none", make(9, ranks)
    save(third, 3, pair, ranks=ranks)
    if ranks.rank == 1:
        FileSystemWriter.write_data = full  # type: ignore[assignment, method-assign]
    try:
        save(third, 6, pair, ranks=ranks)
    except OSError as error:
        refusal = f"{error.errno}"
    found = str(find_checkpoint(third, ranks))
    if ranks.is_main:
        (third / "step-00000003" / "__1_0.distcp").unlink()
    return facts, refusal, found + str(find_checkpoint(third, ranks))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in one process, which two ranks go on with, which four ranks go on with; and the folders of all."""
    folder = tmp_path_factory.mktemp("runs")
    pair = make(0)
    train(pair)
    train(pair)
    save(folder / "one", 2, pair)
    facts: dict[str, Any] = {"folder": folder, "one": copied(pair)}
    for _ in range(3):
        train(pair)
    facts["straight"] = copied(pair)
    facts["two"] = on_ranks(
        2, go_on_and_fail, folder / "one", folder / "two", folder / "failing", timeout=120
    )
    facts["four"] = on_ranks(4, go_on, folder / "two", folder / "four")
    return facts


def test_any_number_of_ranks_reads_the_same_bits(runs: dict[str, Any]) -> None:
    """1 -> 2 -> 4, 2 -> 1 and 4 -> 1."""
    for facts, _, _ in runs["two"]:
        assert (facts["step"], facts["meta"]) == (2, {"note": [2, "ß"]})
        assert same(facts["loaded"], runs["one"])
    two, four = runs["two"][0][0], runs["four"][0]
    for facts in runs["four"]:
        assert facts["step"] == 3
        assert same(facts["loaded"], two["saved"])
    alone = make(1)
    assert load(runs["folder"] / "two", alone) == 3
    assert same(copied(alone), two["saved"])
    assert load(runs["folder"] / "four", alone) == 4
    assert same(copied(alone), four["saved"])


def test_any_number_of_ranks_goes_on_to_the_same_model(runs: dict[str, Any]) -> None:
    """Two steps alone, one on two ranks and two on four, or the last of them alone: up to the order of sums."""
    alone = make(1)
    load(runs["folder"] / "four", alone)
    train(alone)
    for last in (copied(alone), runs["four"][0]["last"]):
        for name, tensor in runs["straight"]["model"].items():
            torch.testing.assert_close(last["model"][name], tensor, rtol=1e-5, atol=1e-5)


def test_ranks_agree_on_failures(runs: dict[str, Any]) -> None:
    expected = ("28", f"{runs['folder'] / 'failing' / 'step-00000003'}None")
    assert [(refusal, found) for _, refusal, found in runs["two"]] == [expected] * 2


def test_everything_comes_back(pairs: list[Pair], tmp_path: Path) -> None:
    saved, other, _ = pairs
    save(tmp_path, 123, saved)
    assert not same(state(saved), state(other))
    assert load(tmp_path, other) == 123
    assert same(state(saved), state(other))
    assert read_meta(tmp_path / "step-00000123") == {"note": [123, "ß"]}


def test_without_a_checkpoint_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_checkpoint(tmp_path / "none", ALONE) is None
    (tmp_path / "step-by-step").mkdir()
    assert find_checkpoint(tmp_path, ALONE) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(keep: int, pairs: list[Pair], tmp_path: Path) -> None:
    for step in (9, 10, 11):
        save(tmp_path, step, pairs[step % 3], keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"][-keep:]
    assert load(tmp_path, pairs[0]) == 11
    assert same(state(pairs[0]), state(pairs[2]))


@pytest.mark.parametrize(
    "moment", ["before the tensors", "after the tensors", "before the facts", "before the name"]
)
def test_killed_while_writing_leaves_the_old_one(
    moment: str, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = pairs
    save(tmp_path, 5, first)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    writer = "torch.distributed.checkpoint.filesystem.FileSystemWriter"
    where = {
        "before the tensors": f"{writer}.write_data",
        "after the tensors": f"{writer}.finish",
        "before the facts": "f2llm.train.checkpoint.write_json",
        "before the name": "f2llm.train.checkpoint.os.replace",
    }
    with monkeypatch.context() as patched:
        patched.setattr(where[moment], killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10, second)
    assert len(list(tmp_path.glob(".step-*.partial"))) == 1
    assert load(tmp_path, third) == 5
    assert same(state(first), state(third))
    save(tmp_path, 15, second)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000015"]


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda c: flip(c / "__0_0.distcp"), "__0_0.distcp does not hold what was written"),
    "a bit of the index": (lambda c: flip(c / ".metadata"), ".metadata does not hold what was written"),
    "an end": (lambda c: (c / "__0_0.distcp").write_bytes(b"torn"), "__0_0.distcp has 4 bytes, written were"),
    "a file": (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "the facts": (lambda c: (c / "state.json").unlink(), "state.json"),
    "half of the facts": (lambda c: (c / "state.json").write_text('{"step": 10'), "state.json"),
    "other facts": (lambda c: (c / "state.json").write_text('{"step": 10}'), "state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(
    damage: str, pairs: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = pairs
    save(tmp_path, 5, first, keep=2)
    save(tmp_path, 10, second, keep=2)
    make_damage, words = DAMAGES[damage]
    make_damage(tmp_path / "step-00000010")
    assert load(tmp_path, third) == 5
    assert same(state(first), state(third))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"checkpoint {tmp_path / 'step-00000010'} is damaged ({words}" in said

    save(tmp_path, 8, third)  # the run goes on from 5; what it once did later is void
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_damaged_one_is_replaced(pairs: list[Pair], tmp_path: Path) -> None:
    save(tmp_path, 5, pairs[0])
    flip(tmp_path / "step-00000005" / "__0_0.distcp")
    assert find_checkpoint(tmp_path, ALONE) is None
    save(tmp_path, 5, pairs[1])
    assert load(tmp_path, pairs[2]) == 5
    assert same(state(pairs[1]), state(pairs[2]))


def test_if_all_are_damaged_there_is_none(
    pairs: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 5, pairs[0])
    (tmp_path / "step-00000005" / "state.json").unlink()
    assert find_checkpoint(tmp_path, ALONE) is None
    assert f"no checkpoint in {tmp_path} is whole" in capsys.readouterr().err


def test_killed_while_removing_leaves_none_that_lacks_files(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 5, pairs[0])

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / ".metadata").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("f2llm.train.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_checkpoints(folder)
    monkeypatch.undo()
    assert find_checkpoint(folder, ALONE) is None
    drop_checkpoints(folder)
    assert not folder.exists()
    shutil.rmtree(folder, ignore_errors=True)
    drop_checkpoints(folder)  # nothing there is no error


def test_other_tensors_are_refused(pairs: list[Pair], tmp_path: Path) -> None:
    save(tmp_path, 5, pairs[0])
    path, own = tmp_path / "step-00000005", state(pairs[0])
    averaged = {**own, "ema": {"a": torch.zeros(1), "b": torch.zeros(1)}}
    with pytest.raises(F2Error, match="step-00000005 lacks 2 tensors, ema/a first; "):
        load_checkpoint(path, averaged)
    moments = 3 * len(own["model"])
    with pytest.raises(
        F2Error, match=f"has beside this run's {moments} tensors, optimizer/embed_tokens.weight"
    ):
        load_checkpoint(path, {"model": own["model"]})
    with pytest.raises(F2Error, match=r"lacks 1 tensors, x/y first and has beside"):
        load_checkpoint(path, {"model": own["model"], "x": {"y": torch.zeros(1)}})
    with pytest.raises(F2Error, match=r"float32 \[50, 24\] in .*, and torch.float32 \[50, 32\] in this run"):
        load_checkpoint(path, state(make(0, width=32)))
    doubled = {name: tensor.double() for name, tensor in own["model"].items()}
    with pytest.raises(F2Error, match=r"is torch.float32 \[50, 24\] in .*, and torch.float64"):
        load_checkpoint(path, {**own, "model": doubled})


def metas(**changes: Any) -> dict[str, Any]:
    recipe = {"learning_rate": 0.01, "hard_negatives": {"retrieval": 2}, "sizes": (8, 16), **changes}
    return {
        "must_match": {"recipe": recipe, "data": "abc"},
        "may_differ": {"ranks": changes.get("ranks", 1)},
        "validation": {"best": changes.get("best", 0.5)},
    }


def test_a_run_goes_on_as_it_began(capsys: pytest.CaptureFixture[str]) -> None:
    then = json.loads(json.dumps(metas()))
    check_same(then, metas(), force=False)
    changed = metas(learning_rate=0.02, hard_negatives={"retrieval": 3, "clustering": 1})
    words = (
        "recipe.hard_negatives.clustering was absent and is 1, recipe.hard_negatives.retrieval was 2 and is 3, "
        "recipe.learning_rate was 0.01 and is 0.02"
    )
    with pytest.raises(UsageError, match=words):
        check_same(then, changed, force=False)
    assert capsys.readouterr().err == ""
    check_same(then, changed, force=True)
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and words in said and said.count("\n") == 1


def test_what_may_differ_is_only_told(capsys: pytest.CaptureFixture[str]) -> None:
    now = {**metas(), "may_differ": {"ranks": 2, "versions": {"torch": "2.13"}}, "validation": {"best": 0.7}}
    check_same(metas(), now, force=False)
    said = capsys.readouterr().err
    assert 'ranks was 1 and is 2, versions.torch was absent and is "2.13"' in said
    assert "last bits" in said and "validation" not in said


def test_the_module_writes_what_it_says(pairs: list[Pair], tmp_path: Path) -> None:
    """The format of the docstring, with sizes and hashes that hold."""
    save(tmp_path, 5, pairs[0])
    folder = tmp_path / "step-00000005"
    facts = json.loads((folder / checkpoint.STATE).read_text())
    assert sorted(p.name for p in folder.iterdir()) == [".metadata", "__0_0.distcp", "state.json"]
    assert {name: f["bytes"] for name, f in facts["files"].items()} == {
        name: (folder / name).stat().st_size for name in (".metadata", "__0_0.distcp")
    }
