"""Tensors one at a time: the same bytes as the library's, and what a broken file says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from f2llm.errors import F2Error
from f2llm.model.tensor_files import open_tensors, write_tensors


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 5), "a.weight": (7,), "é": (2, 2, 2), "empty": (0, 4), "c": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_file_is_the_librarys_to_the_byte(tmp_path: Path) -> None:
    tensors = some_tensors()
    asked = []

    def tensor_of(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name].t() if tensors[name].dim() == 2 and len(tensors[name]) == 2 else tensors[name]

    write_tensors(tmp_path / "x", {name: tuple(t.shape) for name, t in tensors.items()}, tensor_of)
    assert (tmp_path / "x").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert asked == sorted(tensors)


def test_tensors_of_several_files_come_by_name_in_float32_without_the_head(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in some_tensors().items()}
    first = {f"model.{name}": t for name, t in tensors.items() if name < "c"}
    rest = {name: t for name, t in tensors.items() if name >= "c"} | {"lm_head.weight": torch.ones(2)}
    save_file(first, tmp_path / "1")
    save_file(rest, tmp_path / "2")
    with open_tensors([tmp_path / "1", tmp_path / "2"]) as files:
        assert files.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
        for name, tensor in tensors.items():
            assert files.read(name).dtype == torch.float32
            assert torch.equal(files.read(name), tensor.float())


def test_a_missing_and_a_cut_off_file_are_named(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-8])
    for name in ("cut", "absent"):
        with pytest.raises(F2Error, match=f"{name} cannot be read"), open_tensors([tmp_path / name]):
            pass


def test_a_wrong_shape_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"a came out with shape \[2\], expected \[3\]"):
        write_tensors(tmp_path / "x", {"a": (3,)}, lambda _: torch.ones(2))
    assert not list(tmp_path.iterdir())
    write_tensors(tmp_path / "x", {"a": (3,)}, lambda _: torch.ones(3))
    assert load_file(tmp_path / "x")["a"].tolist() == [1, 1, 1]
