"""Weights on disk, a tensor at a time: a model is read and written without ever being in memory as a whole.

Files are safetensors. What is written is float32 and to the byte what the library itself would write, so that a
model's identity does not depend on how it was saved.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from f2llm.errors import F2Error
from f2llm.files import atomic_write

HEAD = "lm_head.weight"  # a language model's output head, which no vector depends on
BYTES = 4  # of a float32


class TensorFiles:
    """The tensors of a decoder in open safetensors files, under the decoder's names."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._at = {name.removeprefix("model."): (file, name) for file in files for name in file.keys()}  # noqa: SIM118  not a dict
        self._at.pop(HEAD, None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(own).get_shape()) for name, (file, own) in self._at.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in float32."""
        file, own = self._at[name]
        tensor: Tensor = file.get_tensor(own)
        return tensor.float()


@contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[TensorFiles]:
    """The tensors of safetensors files; an F2Error names a file that is missing or cut off."""
    with ExitStack() as stack:
        opened = []
        for path in files:
            try:
                opened.append(stack.enter_context(safe_open(path, framework="pt")))
            except (FileNotFoundError, SafetensorError) as error:
                raise F2Error(f"{path} cannot be read ({error}); copy or make the folder again.") from None
        yield TensorFiles(opened)


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write float32 tensors of these shapes; `tensor_of` is asked for one after the other, by name, sorted."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + BYTES * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    with atomic_write(path) as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for name in sorted(shapes):
            tensor = tensor_of(name)
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise F2Error(
                    f"{name} came out with shape {list(tensor.shape)}, expected {list(shapes[name])}; "
                    "this is a mistake of the program: please report it."
                )
            file.write(tensor.detach().to(torch.float32).contiguous().numpy().data)
