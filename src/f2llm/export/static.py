"""Token vectors for the smallest devices: no decoder is left, a text's vector is the mean of its tokens' vectors.

The manner is Model2Vec's (github.com/MinishLab/model2vec): each token alone goes through the model, principal
components reduce the vectors and take away what all share, and frequent tokens weigh less. Token numbers of a BPE are
in the order of frequency, so Zipf's law stands for counts, and no corpus is needed.

Shape suffixes: V tokens, E hidden width, D dims.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer

from f2llm.errors import UsageError
from f2llm.files import atomic_write, write_json, write_text
from f2llm.model.batches import forward
from f2llm.model.folder import Model
from f2llm.progress import progress

DEFAULT_DIM = 256
TOKENS_AT_ONCE = 2048
SIF = 1e-4  # a of the weight a / (a + p) (Arora et al. 2017, "smooth inverse frequency")
FOLDER = "0_StaticEmbedding"

Floats = npt.NDArray[np.float32]


def write_static(model: Model, folder: Path, dim: int) -> None:
    """Write a folder that sentence-transformers loads as a StaticEmbedding, followed by Normalize.

    Args:
        dim: of the vectors, at most the model's width and less than the number of tokens.
    """
    table_VE = token_vectors(model)
    used = _used_tokens(model.tokenizer, len(table_VE))
    if dim > len(used):
        raise UsageError(f"dim is {dim}, but the tokenizer has {len(used)} tokens; ask for less.")
    table_VD = np.zeros((len(table_VE), dim), np.float32)
    table_VD[used] = principal_components(table_VE[used], dim) * zipf_weights(len(used))[:, None]
    with atomic_write(folder / FOLDER / "model.safetensors") as file:
        file.write(save({"embedding.weight": table_VD}, metadata={"format": "pt"}))
    write_text(folder / FOLDER / "tokenizer.json", _without_eos(model.tokenizer))
    (folder / "1_Normalize").mkdir()
    modules = ((FOLDER, "StaticEmbedding"), ("1_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})


@torch.inference_mode()
def token_vectors(model: Model) -> Floats:
    """The model's vector of each token followed by EOS, raw [V, E]; V is the tokenizer's, not the table's."""
    count = max(model.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    parts = []
    with progress(total=count, what="vectors of tokens", unit="token") as bar:
        for start in range(0, count, TOKENS_AT_ONCE):
            some = range(start, min(start + TOKENS_AT_ONCE, count))
            parts.append(forward(model.decoder, [[token, model.facts.eos_id] for token in some]).numpy())
            bar.advance(len(some))
    vectors_VE: Floats = np.concatenate(parts)
    return vectors_VE


def principal_components(x_VE: Floats, dim: int) -> Floats:
    """Coordinates [V, D] of the rows, less their mean, on the `dim` directions in which they vary most."""
    centred_VE = x_VE - x_VE.mean(0)
    _, directions_EE = np.linalg.eigh(centred_VE.T.astype(np.float64) @ centred_VE)
    directions_ED = directions_EE[:, ::-1][:, :dim].astype(np.float32)
    coordinates_VD: Floats = centred_VE @ directions_ED
    return coordinates_VD


def zipf_weights(count: int) -> Floats:
    """Weights [V] of tokens in the order of frequency, under Zipf's law p ~ 1 / rank."""
    p_V = 1 / np.arange(2, count + 2)
    return (SIF / (SIF + p_V / p_V.sum())).astype(np.float32)


def _used_tokens(tokenizer: Tokenizer, count: int) -> npt.NDArray[np.int64]:
    """Numbers of the tokens that texts are made of, ascending: all but the special ones."""
    special = {n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return np.array([n for n in range(count) if n not in special], np.int64)


def _without_eos(tokenizer: Tokenizer) -> str:
    """tokenizer.json without a post-processor: EOS is part of no mean."""
    return json.dumps({**json.loads(tokenizer.to_str()), "post_processor": None}, ensure_ascii=False)
