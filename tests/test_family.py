"""The family's sizes against the published table, and their parameters against the closed formula."""

import csv
from dataclasses import asdict
from pathlib import Path

import pytest

from f2llm.family import FAMILY, FamilyMember, parameter_count

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
