"""Smaller models inside a larger one: which layers, ranks of the table and dimensions were trained to be enough alone.

ML-Embed calls this three-dimensional Matryoshka. A model is trained with several exits (vectors after fewer layers,
through the same final norm) and with an embedding table that is now and then projected onto its strongest directions.
The directions are those of the table that training began with, and stay the same throughout; they lie beside the
weights, so that a slice projects as training did.

Shape suffixes: V vocabulary, E hidden width, R rank.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from f2llm.errors import F2Error
from f2llm.files import atomic_write

BASIS_FILE, BASIS = "table_basis.safetensors", "basis"


def table_basis(table_VE: Tensor) -> Tensor:
    """Orthonormal directions of a table's rows, the strongest first: float32 [E, E], one in each column.

    The right singular vectors, from the eigenvectors of the table's products with itself in float64: E * E numbers
    instead of V * E. Each column's largest number is positive, so that its sign is no accident.
    """
    gram_EE = torch.zeros(table_VE.shape[1], table_VE.shape[1], dtype=torch.float64)
    for part in table_VE.cpu().split(1 << 14):
        gram_EE.addmm_(part.double().T, part.double())
    basis_EE = torch.linalg.eigh(gram_EE).eigenvectors.flip(1)
    largest_E = basis_EE.gather(0, basis_EE.abs().argmax(0, keepdim=True))[0]
    return (basis_EE * largest_E.sign()).float()


def onto_rank(basis_EE: Tensor, rank: int) -> Tensor:
    """What projects rows onto the strongest `rank` directions: [E, E], symmetric."""
    strongest_ER = basis_EE[:, :rank]
    return strongest_ER @ strongest_ER.T


def save_basis(folder: Path, basis_EE: Tensor) -> None:
    with atomic_write(folder / BASIS_FILE) as file:
        file.write(save({BASIS: basis_EE.contiguous()}))


def load_basis(folder: Path, width: int) -> Tensor | None:
    """The directions that a model was trained with; None where it was not trained with any."""
    path = folder / BASIS_FILE
    if not path.exists():
        return None
    basis_EE = load_file(path).get(BASIS)
    if basis_EE is None or basis_EE.shape != (width, width):
        raise F2Error(
            f"{path} does not hold {width} directions of {width} numbers; copy the model's folder again."
        )
    return basis_EE
