"""A smaller model out of a larger one without training: fewer layers, a table of a lower rank, shorter vectors.

A model that was trained for it (`exits` and `table_ranks` of a train stage, and its Matryoshka sizes) gives about what
a model of that size would; any other is cut as well, and a warning says that it was not trained for it.

Shape suffixes: R rows of the table, E hidden width.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from f2llm.compress.cutting import ROWS_AT_ONCE, TABLE
from f2llm.data.parts import carry_decontamination
from f2llm.errors import UsageError
from f2llm.files import complete_or_not_there
from f2llm.model.base import Base, read_base
from f2llm.model.folder import WEIGHTS, ModelFacts, complete_folder, open_weights
from f2llm.model.slices import load_basis, onto_rank, save_basis, table_basis
from f2llm.model.tensor_files import TensorFiles, write_tensors
from f2llm.progress import say


def slice_model(
    model: str | Path,
    out: Path,
    *,
    layers: int | None = None,
    rank: int | None = None,
    dim: int | None = None,
) -> ModelFacts:
    """Write the folder of a slice, which every tool loads like any other model's.

    Args:
        model: as `load_base` takes it.
        layers: the first so many; all if left out.
        rank: of the embedding table, projected onto the directions that training used, or, of a model that was
            trained with none, onto its strongest ones. The table keeps its shape, since no other tool knows another;
            `f2llm export --to onnx` writes it as two factors.
        dim: dimensions of the vectors, where none are asked for.

    Raises:
        UsageError: nothing is to be cut, a number that the model does not have inside, or an `out` in the way.
    """
    base = read_base(model)
    _check(layers, rank, dim, base)
    with complete_or_not_there(out) as folder:
        return slice_into(folder, base, layers=layers, rank=rank, dim=dim)


def slice_into(
    folder: Path, base: Base, *, layers: int | None = None, rank: int | None = None, dim: int | None = None
) -> ModelFacts:
    """`slice_model` into a folder that is there."""
    _check(layers, rank, dim, base)
    facts, config = base.facts, base.config
    _tell(layers, rank, dim, facts)
    small = replace(config, num_hidden_layers=layers or config.num_hidden_layers)
    with open_weights(base.folder, config) as weights:
        shapes = {
            name: shape for name, shape in weights.shapes.items() if _is_kept(name, small.num_hidden_layers)
        }
        basis_EE = load_basis(base.folder, config.hidden_size)
        if rank and basis_EE is None:
            basis_EE = table_basis(weights.read(TABLE))
        onto_EE = onto_rank(basis_EE, rank) if rank and basis_EE is not None else None

        def tensor_of(name: str) -> Tensor | Iterator[Tensor]:
            if name == TABLE and onto_EE is not None:
                return _projected(weights, config.vocab_size, onto_EE)
            return weights.read(name)

        write_tensors(folder / WEIGHTS, shapes, tensor_of)
    if basis_EE is not None:
        save_basis(folder, basis_EE)
    carry_decontamination([base.folder], folder)
    cut = replace(
        facts,
        parent=facts.identity,
        recipe=None,
        exits=[exit for exit in facts.exits if exit < small.num_hidden_layers],
        table_ranks=[other for other in facts.table_ranks if rank is None or other < rank],
        table_rank=rank or facts.table_rank,
        dim=dim or facts.dim,
        matryoshka_sizes=facts.matryoshka_sizes if dim is None else _sizes_to(dim, facts),
    )
    return complete_folder(folder, small, base.tokenizer, cut)


def _check(layers: int | None, rank: int | None, dim: int | None, base: Base) -> None:
    if layers is None and rank is None and dim is None:
        raise UsageError("nothing is to be cut; give --layers, --rank or --dim.")
    for name, value, most in (
        ("layers", layers, base.config.num_hidden_layers),
        ("rank", rank, base.facts.table_rank or base.config.hidden_size),
        ("dim", dim, base.facts.dim or base.config.hidden_size),
    ):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name} is {value}; the model has 1 to {most}.")


def _tell(layers: int | None, rank: int | None, dim: int | None, facts: ModelFacts) -> None:
    """Warn of what the model was not trained for."""
    for what, value, trained in (
        ("layers", layers, facts.exits),
        ("ranks of the table", rank, facts.table_ranks),
        ("dimensions", dim, facts.matryoshka_sizes),
    ):
        if value is not None and value not in trained:
            known = f"{', '.join(map(str, trained))}" if trained else "none fewer"
            say(
                f"warning: the model was not trained to do with {value} {what} (but with {known}); compare the slice."
            )


def _is_kept(name: str, layers: int) -> bool:
    return not name.startswith("layers.") or int(name.split(".")[1]) < layers


def _projected(weights: TensorFiles, entries: int, onto_EE: Tensor) -> Iterator[Tensor]:
    for start in range(0, entries, ROWS_AT_ONCE):
        yield weights.read_rows(TABLE, range(start, min(start + ROWS_AT_ONCE, entries))) @ onto_EE


def _sizes_to(dim: int, facts: ModelFacts) -> list[int]:
    return sorted({size for size in facts.matryoshka_sizes if size < dim} | {dim})
