"""The same folder in the hands of sentence-transformers: its vectors beside ours.

The two read the same files and take different ones at their word, so a folder that only one of them loads rightly
shows here.

Shape suffixes: N texts, D dims.
"""

import numpy as np

from f2llm.embed.embedder import truncate
from f2llm.errors import F2Error
from f2llm.verify.computed import SHORT_TEXTS, TEXTS, UNIT, Target, Vectors, cosines
from f2llm.verify.findings import Finding, failed, passed
from f2llm.verify.folder_files import Files

AGREE = 0.9999  # cosine of two engines' vectors
SHORT = 8  # a size at which they are compared too


def agrees_with_peer(files: Files, target: Target) -> Finding:
    """Vectors of sentence-transformers beside ours: bare, as queries, shortened; in float32, in one padded batch."""
    import sentence_transformers

    theirs = _theirs(files)
    ours = {"bare texts": target.embed(TEXTS), "queries": target.embed(SHORT_TEXTS, query=True)}
    version = f"sentence-transformers {sentence_transformers.__version__}"
    least = 1.0
    for what, theirs_ND in theirs.items():
        ours_ND = ours[what]
        if theirs_ND.shape != ours_ND.shape:
            return failed(
                f"{version} gives {theirs_ND.shape[1]} dimensions, f2llm {ours_ND.shape[1]}.",
                "Check truncate_dim in config_sentence_transformers.json.",
            )
        for size in (SHORT, target.width):
            cosine = float(cosines(truncate(theirs_ND, size), truncate(ours_ND, size)).min())
            least = min(least, cosine) if np.isfinite(cosine) else -1.0
        if not least > AGREE:
            return failed(
                f"{version} gives other vectors of {what} (least cosine {least:.4f}).",
                "Mend what the checks of pooling, EOS and prompts name; the two read the same files.",
            )
        length = float(np.abs(np.linalg.norm(theirs_ND, axis=-1) - 1).max())
        if not length < UNIT:
            return failed(
                f"{version} gives {what} vectors that are not of unit length (off by {length:.3f}).",
                "End modules.json in Normalize; where the folder has truncate_dim, ask for normalize_embeddings=True.",
            )
    return passed(f"{version}: least cosine {least:.6f} over {' and '.join(theirs)}")


def _theirs(files: Files) -> dict[str, Vectors]:
    """float32 [N, D] of bare texts and of queries, in the library's own batches."""
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            str(files.folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        found = {"bare texts": model.encode(list(TEXTS))}
        if "query" in files.prompts:
            found["queries"] = model.encode(list(SHORT_TEXTS), prompt_name="query")
    except Exception as error:  # whatever a library of another's raises on a broken folder
        raise F2Error(
            f"sentence-transformers does not compute with the folder ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})."
        ) from None
    return {what: np.asarray(vectors_ND, np.float32) for what, vectors_ND in found.items()}
