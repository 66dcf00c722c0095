"""The family's sizes and stages against the published tables, and their parameters against the closed formula."""

import csv
from dataclasses import asdict
from pathlib import Path

import pytest

from f2llm.family import FAMILY, STAGES, FamilyMember, parameter_count, size_in

SHAPE = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size")


def shape(member: FamilyMember) -> dict[str, int]:
    return {name: getattr(member, name) for name in SHAPE}


def test_sizes_are_the_published_ones(shared: Path) -> None:
    with open(shared / "spec/family.csv", newline="") as file:
        published = {row.pop("size"): row for row in csv.DictReader(file)}
    assert list(FAMILY) == list(published)
    for size, row in published.items():
        for name, value in asdict(FAMILY[size]).items():
            assert value == (type(value)(row[name]) if value is not None else row[name] or None), (size, name)


@pytest.mark.parametrize("size", FAMILY)
def test_parameter_count_is_exact(size: str) -> None:
    member = FAMILY[size]
    assert parameter_count(**shape(member)) == member.total_parameters
    assert member.vocab_size * member.hidden_size == member.embedding_parameters


@pytest.mark.parametrize("size", FAMILY)
def test_references_point_to_larger_members(size: str) -> None:
    member = FAMILY[size]
    if member.teacher:
        assert FAMILY[member.teacher].total_parameters > member.total_parameters
    if member.pruned_from:  # heads stay as they were, widths and depth only shrink
        whole = FAMILY[member.pruned_from]
        assert (member.heads, member.kv_heads) == (whole.heads, whole.kv_heads)
        assert member.hidden_size < whole.hidden_size and member.layers < whole.layers


def test_stages_have_the_published_rows(shared: Path) -> None:
    """Stage 1 is seven sources; stage 2's number lies between what the two readings of its cap allow."""
    with open(shared / "spec/sources.csv", newline="") as file:
        sources = list(csv.DictReader(file))
    first = [row for row in sources if row["stage1"] == "true"]
    assert STAGES["stage1"].rows == sum(int(row["samples"]) for row in first)
    assert set(STAGES["stage1"].formats) == {row["format"] for row in first}
    cap = STAGES["stage2"].cap
    assert cap
    least = sum(min(int(row["samples"]), cap) for row in sources)
    most = sum(
        min(int(row["samples"]), cap * (int(row["languages"]) if row["languages"].isdecimal() else 1))
        for row in sources
    )
    assert least < STAGES["stage2"].rows < most
    assert set(STAGES["stage2"].formats) == {row["format"] for row in sources}


def test_who_goes_through_which_stage() -> None:
    """Cut sizes begin where stage 1 of another one ended."""
    assert {size for size, member in FAMILY.items() if "stage1" in member.stages} == {
        "0.6B",
        "1.7B",
        "4B",
        "8B",
        "14B",
    }
    assert all("stage2" in member.stages for member in FAMILY.values())


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("models/Qwen3-0.6B/", "0.6B"),
        ("Qwen/Qwen3-8B", "8B"),
        ("Qwen/Qwen3-8B@main", "8B"),
        ("runs/family/80M/stage2/", "80M"),
        ("models/4B/copy-of-14B", "14B"),  # the last part that names one
        ("models/20.6B", None),
        ("models/Qwen3-32B", None),
        ("models/mine", None),
    ],
)
def test_a_path_speaks_of_a_size(path: str, size: str | None) -> None:
    assert size_in(path) == size
