"""Tensors one at a time: the same bytes as the library's, and what a broken file says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
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


def test_rows_are_those_of_the_whole_tensor_in_the_order_given(tmp_path: Path) -> None:
    table = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).half()
    save_file({"a": torch.ones(5).half(), "t": table}, tmp_path / "x")
    with open_tensors([tmp_path / "x"]) as files:
        for rows in (range(50), range(7, 9), range(0), [], [4], [0, 1, 2, 9, 48, 49], [5, 5, 3, 4, 0]):
            assert torch.equal(files.read_rows("t", rows), table[list(rows)].float())


def test_blocks_of_rows_are_written_as_the_whole(tmp_path: Path) -> None:
    table = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "x", {"t": (50, 3)}, lambda _: iter(table.split(7)))
    assert torch.equal(load_file(tmp_path / "x")["t"], table)
    for wrong in (table[:49], table[:, :2]):
        with pytest.raises(F2Error, match=r"expected \[50, 3\]"):
            write_tensors(tmp_path / "y", {"t": (50, 3)}, lambda _, wrong=wrong: iter(wrong.split(7)))  # type: ignore[misc]
    assert not (tmp_path / "y").exists()


def a_file(path: Path, header: object, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(written) if length is None else length).to_bytes(8, "little") + written + data)
    return path


def described(**changes: object) -> dict[str, dict[str, object]]:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        described(data_offsets=[0, 32], shape=[2, 4]),  # behind the end of the file
        described(data_offsets=[-16, 0]),
        described(data_offsets=[4, 20]),
        described(data_offsets=[0, 8], shape=[2, 1]),  # less than the file has
        described(shape=[2, 3]),
        described(shape=[-2, -2]),
        described(shape="22"),
        described(dtype="I8"),
        described(data_offsets=None),
        {**described(), "b": described()["a"]},  # two in one place
        {"a": 1},
        [],
        3,
        b"{not json",
        b"\xff\xfe",
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object) -> None:
    path = a_file(tmp_path / "x", header)
    with pytest.raises(F2Error, match="x cannot be read"), open_tensors([path]):
        pass
    if header != described(dtype="I8"):
        with pytest.raises(SafetensorError):
            load_file(path)  # the library thinks so too


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    for length in (1 << 20, 1 << 62):
        path = a_file(tmp_path / "x", described(), length=length)
        with pytest.raises(F2Error, match="x cannot be read"), open_tensors([path]):
            pass
    (tmp_path / "x").write_bytes(b"\1\2")
    with pytest.raises(F2Error, match="x cannot be read"), open_tensors([tmp_path / "x"]):
        pass
