"""The same step as the reference does it: one batch padded to its longest text, through transformers' Qwen3Model.

Shape suffixes: N texts, L tokens of the longest, D dims.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Model

from workers.train_objective import loss_of, report


def commands(model_folder: str, ids_file: str, queries: str) -> dict[str, Callable[..., Any]]:
    model = Qwen3Model.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").train()
    ids = [torch.tensor(i) for i in json.loads(Path(ids_file).read_text())]

    def step() -> dict[str, float]:
        started = time.perf_counter()
        model.zero_grad(set_to_none=True)
        ids_NL = pad_sequence(ids, batch_first=True)
        lengths_N = torch.tensor([len(i) for i in ids])
        mask_NL = (torch.arange(ids_NL.shape[1]) < lengths_N[:, None]).long()
        output = model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False)
        vectors_ND = output.last_hidden_state[torch.arange(len(ids)), lengths_N - 1]
        loss = loss_of(vectors_ND, int(queries))
        loss.backward()
        return report(time.perf_counter() - started, loss, model.parameters())

    return {"step": step}
