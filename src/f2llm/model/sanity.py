"""Damage to a model that no file tells of: it reads without an error, and its vectors are of no use.

Shape suffixes: V rows of the embedding table, E hidden width, N texts.
"""

from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F

from f2llm.model.folder import Model, pad_id

SENTENCES = (
    "The harbour was quiet before the storm came in.",
    "Prices of bread rose by four percent last year.",
    "Water boils at a lower temperature on high mountains.",
    "Elle a oublié ses clés dans la voiture de son frère.",
    "Der Zug nach Hamburg fährt heute von Gleis sieben.",
    "Los volcanes de la isla llevan siglos dormidos.",
    "Врач посоветовал ему больше гулять по вечерам.",
    "今天的会议改到星期五下午三点。",
    "彼女は毎朝公園で犬を散歩させます。",
    "كتبت المعلمة الدرس الجديد على السبورة.",
    "बाज़ार में आज ताज़े आम मिल रहे हैं।",
    "def add(a, b): return a + b",
)
NORM_FACTOR = 10  # times more or less than the median norm of the table's rows
SAME_ROW = 0.01  # distance of two rows, relative to the length of one
ALIKE = 0.999  # mean cosine of vectors that tell nothing apart


def check_base(model: Model) -> list[str]:
    """What is wrong with a model that reads without an error: sentences, none if all is well."""
    return [*_check_eos_token(model), *_check_eos_row(model), *_check_vectors(model)]


def _check_eos_token(model: Model) -> Iterator[str]:
    """Whether other runtimes, which have tokenizer.json alone, would pool where we do."""
    tokenizer, eos_id = model.tokenizer, model.facts.eos_id
    whole = tokenizer.encode_batch(list(SENTENCES))
    tokenizer.enable_truncation(4)
    cut = tokenizer.encode_batch(list(SENTENCES))
    tokenizer.no_truncation()
    # The post-processor is lost when a tokenizer is saved by a tool that knows none (as in early GGUF files). EOS by
    # another way, a normalizer for one, is not there any more when a text is cut.
    if any(encoded.ids[-1:] != [eos_id] for encoded in [*whole, *cut]):
        yield f"the tokenizer does not end every text, whole or cut, in EOS ({eos_id}), so another token is pooled."
    # Qwen3-Embedding has one token for both; what drops padding by its id drops EOS with it.
    if pad_id(tokenizer, eos_id) == eos_id:
        yield f"EOS ({eos_id}) is also the only token to pad with, so other runtimes may take it for padding."


def _check_eos_row(model: Model) -> Iterator[str]:
    """Whether EOS's embedding was ever trained.

    The chat tokens of a language model before chat training never were: their rows are zero, nearly so, or one and
    the same vector, since nothing but weight decay and the output softmax moved them.
    """
    eos_id = model.facts.eos_id
    rows_VE = model.decoder.embed_tokens.weight.detach().float()
    norm_V = torch.linalg.vector_norm(rows_VE, dim=1)
    eos_E, norm, median = rows_VE[eos_id], float(norm_V[eos_id]), float(norm_V.median())
    if not median / NORM_FACTOR <= norm <= median * NORM_FACTOR:
        yield (
            f"the embedding of EOS ({eos_id}) has norm {norm:.3g}, the median of all tokens is {median:.3g}: it "
            "was not trained; take another base, or another eos_token."
        )
    # |a - b|^2 by parts: the difference itself would be a second table.
    squares_V = norm_V**2 - 2 * (rows_VE @ eos_E) + norm**2
    squares_V[eos_id] = torch.inf
    if norm and float(squares_V.min()) <= (SAME_ROW * norm) ** 2:
        yield (
            f"the embedding of EOS ({eos_id}) is that of token {int(squares_V.argmin())} as well, as if neither had "
            "been trained; take another base, or another eos_token."
        )


@torch.no_grad()
def _check_vectors(model: Model) -> Iterator[str]:
    """Whether texts get vectors at all, and different ones."""
    ids = [encoded.ids for encoded in model.tokenizer.encode_batch(list(SENTENCES))]
    device = model.decoder.embed_tokens.weight.device
    vectors_NE = model.decoder(
        torch.tensor(list(chain.from_iterable(ids)), device=device), list(map(len, ids))
    )
    # Weights that overflowed in half precision, or a file filled with what was in memory.
    if not vectors_NE.isfinite().all():
        yield "some vectors are not finite: the weights are damaged; copy or make the model again."
        return
    unit_NE = F.normalize(vectors_NE.float(), dim=-1)
    count = len(unit_NE)
    alike = float(unit_NE.sum(0).square().sum() - unit_NE.square().sum()) / (count * (count - 1))
    # Weights that a sharded run saved as zeros, or a tokenizer of another model that knows no word: EOS is all that
    # is left of a text. A zero vector has cosine 0 with all others, so it is asked for by itself.
    if alike > ALIKE or not vectors_NE.any(dim=1).all():
        yield (
            f"the vectors of {count} different sentences are alike (mean cosine {alike:.4f}): the texts do not "
            "reach the token that is pooled, so weights or tokenizer are not those of a trained model."
        )
