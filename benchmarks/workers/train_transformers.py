"""The same step through transformers' Qwen3Model: one batch padded to its longest text, as the reference does it, or
length-sorted micro-batches, each padded to its own longest.

Micro-batches keep their graphs until one backward pass for all: that takes memory, but no text is computed twice.
On a CPU everything is float32, on a GPU bfloat16.

Shape suffixes: N texts of a micro-batch, L tokens of its longest, D dims.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Model
from transformers.utils import is_flash_attn_2_available

from workers.train_objective import clock, loss_of, micro_batches, report


def commands(
    model_folder: str, ids_file: str, queries: str, device: str = "cpu"
) -> dict[str, Callable[..., Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Qwen3Model.from_pretrained(model_folder, dtype=dtype).train().to(device)
    ids = [torch.tensor(i, device=device) for i in json.loads(Path(ids_file).read_text())]

    def vectors(texts: list[Tensor], mask: bool) -> Tensor:
        """[N, D], padded on the right; a causal decoder gives the last real token the same vector without a mask."""
        ids_NL = pad_sequence(texts, batch_first=True)
        lengths_N = torch.tensor([len(i) for i in texts], device=device)
        mask_NL = (torch.arange(ids_NL.shape[1], device=device) < lengths_N[:, None]).long() if mask else None
        output = model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False)
        return output.last_hidden_state[torch.arange(len(texts)), lengths_N - 1]

    def step(
        padded_tokens: int | None = None, mask: bool = True, attention: str = "sdpa"
    ) -> dict[str, float]:
        """One step, in one batch or in micro-batches of at most `padded_tokens`."""
        model.set_attn_implementation(attention)
        started = clock(device)
        model.zero_grad(set_to_none=True)
        cuts = micro_batches([len(i) for i in ids], padded_tokens) if padded_tokens else [range(len(ids))]
        sorted_ND = torch.cat([vectors([ids[n] for n in cut], mask) for cut in cuts])
        restore_N = torch.tensor([n for cut in cuts for n in cut], device=device).argsort()
        loss = loss_of(sorted_ND[restore_N], int(queries))
        loss.backward()
        return report(clock(device) - started, loss, model.parameters())

    def attentions() -> list[str]:
        """Implementations of attention that can be had here."""
        return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]

    return {"step": step, "attentions": attentions}
