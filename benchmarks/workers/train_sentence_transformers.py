"""The same work with sentence-transformers' own trainer: cached gradients inside a Matryoshka loss.

The trainer does real steps, with its data loader, collator, loss, backward and optimizer (SGD at rate 0, so that all
steps are of the same weights). Timed is its `training_step`: forward, loss and backward, without tokenizing, padding
and optimizer, which our side is not timed for either. Its loss is what we call the joint objective.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401  for the trainer
import torch
from datasets import Dataset  # type: ignore[import-untyped,import-not-found,unused-ignore]
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from transformers import PrinterCallback

from f2llm.train.objective import TEMPERATURE, matryoshka_sizes, matryoshka_weights
from workers.train_objective import columns, report


class TimedTrainer(SentenceTransformerTrainer):  # type: ignore[misc,unused-ignore]
    """The trainer, which keeps the report of its last training step."""

    last: dict[str, float]

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        started = time.perf_counter()
        loss: torch.Tensor = super().training_step(*arguments, **options)
        self.last = report(time.perf_counter() - started, loss, self.model.parameters())
        return loss


def commands(model_folder: str, texts_file: str, queries_in_file: str) -> dict[str, Callable[..., Any]]:
    texts, queries = json.loads(Path(texts_file).read_text(encoding="utf-8")), int(queries_in_file)
    model = SentenceTransformer(model_folder, device="cpu")
    sizes = matryoshka_sizes(model.get_embedding_dimension())
    cached = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    trainer = TimedTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(Path(model_folder).with_name("trainer")),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=queries,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns(texts, queries)),
        loss=MatryoshkaLoss(model, cached, sizes, matryoshka_weights(sizes)),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.0), None),
    )
    trainer.remove_callback(PrinterCallback)
    mini_batches: list[int] = []  # real tokens of each that went through the model
    model.register_forward_pre_hook(
        lambda _, arguments: mini_batches.append(int(arguments[0]["attention_mask"].sum()))
    )

    def step(mini_batch_size: int = 32, mini_batch_num_tokens: int | None = None) -> dict[str, float]:
        """One step with mini-batches of so many texts of a column, or of so many tokens."""
        cached.mini_batch_size, cached.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        mini_batches.clear()
        trainer.train()
        return {
            **trainer.last,
            "tokens": sum(mini_batches) // 2,  # each text is computed twice
            "largest_mini_batch": max(mini_batches),
        }

    return {"step": step}
