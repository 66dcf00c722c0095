"""Training: sampler -> batch -> objective -> step -> checkpoint.

`train` is a plain loop over steps. A step makes its batch from (seed, step), computes each distinct text once,
takes the objective of the vectors, and moves the weights; nothing outside the checkpoint is carried from one step
to the next, so a run that is killed and continued ends in the same bits.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from f2llm.data.rows import Source, read_rows
from f2llm.errors import F2Error, UsageError
from f2llm.files import write_text
from f2llm.model.decoder import Decoder, DecoderConfig, initialise
from f2llm.model.folder import Model, ModelFacts, load_model, model_size, save_model
from f2llm.model.tokenizer import EOS, encode, load_tokenizer
from f2llm.progress import progress
from f2llm.recipe import TrainStage
from f2llm.train.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from f2llm.train.objective import Roles, contrastive_terms, distillation_terms, matryoshka_sizes
from f2llm.train.sampler import Batch, Sampler, load_sources

BETAS = (0.9, 0.98)


def train_stage(
    config: TrainStage,
    *,
    data: Path,
    base: Path | None,
    tokenizer: Path | None,
    teacher: Path | None,
    out: Path,
    seed: int,
    recipe_hash: str,
) -> dict[str, Any]:
    """Train a model on canonical rows and leave a complete model folder in `out`.

    Args:
        data: folder of canonical rows.
        base: model folder to start from, or None for random weights of `config.shape`.
        tokenizer: folder of the tokenizer that random weights start with.
        teacher: model folder to distil from, or None.
    """
    table, sources = read_rows(data)
    rows = load_sources(table, sources, config.formats)
    model = load_model(base) if base else _random_model(config, tokenizer, seed)
    sampler = Sampler(
        rows,
        seed=seed,
        steps=config.steps,
        batch_size=config.batch_size,
        hard_negatives=config.hard_negatives.model_dump(),
        instructions=config.instructions,
        document_instruction_rate=config.document_instruction_rate,
        source_weights=config.source_weights,
    )
    log = train(config, model, sampler, load_model(teacher) if teacher else None, out)
    facts = ModelFacts(
        eos_id=model.facts.eos_id,
        max_length=config.max_length,
        matryoshka_sizes=_sizes(config, model.decoder),
        instruction=_default_instruction([r.source for r in rows]) if config.instructions else "",
        parent=model.facts.identity or None,
        recipe=recipe_hash,
        kept=model.facts.kept,
    )
    facts = save_model(out, Model(model.decoder, model.tokenizer, facts))
    drop_checkpoints(out / "checkpoints")
    return {
        "parameters": model_size(model.decoder),
        "threads": torch.get_num_threads(),  # another number may give other last bits
        "identity": facts.identity,
        "last": log,
    }


def _random_model(config: TrainStage, tokenizer_folder: Path | None, seed: int) -> Model:
    assert config.shape is not None and tokenizer_folder is not None  # the recipe sees to it
    tokenizer = load_tokenizer(tokenizer_folder / "tokenizer.json")
    shape = config.shape
    decoder = Decoder(
        DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
    )
    initialise(decoder, torch.Generator().manual_seed(seed))
    eos_id = tokenizer.token_to_id(EOS)
    if eos_id is None:
        raise F2Error(
            f"{tokenizer_folder}/tokenizer.json has no token {EOS}; make it with a tokenizer stage."
        )
    return Model(
        decoder, tokenizer, ModelFacts(eos_id, config.max_length, [shape.hidden_size], instruction="")
    )


def _sizes(config: TrainStage, decoder: Decoder) -> list[int]:
    width = decoder.config.hidden_size
    return matryoshka_sizes(width) if config.matryoshka else [width]


def _default_instruction(sources: list[Source]) -> str:
    """The instruction of the largest retrieval source: what a query without an instruction of its own gets."""
    retrieval = [s for s in sources if s.format == "retrieval"] or sources
    return max(retrieval, key=lambda source: source.rows).instruction


def make_optimizer(decoder: Decoder, config: TrainStage) -> torch.optim.Optimizer:
    """AdamW; norm weights do not decay."""
    norms = [p for name, p in decoder.named_parameters() if name.endswith("norm.weight")]
    others = [p for name, p in decoder.named_parameters() if not name.endswith("norm.weight")]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)


def learning_rate_at(config: TrainStage, step: int) -> float:
    """Linear warm-up, then the schedule, which would reach zero one step after the last (or constant)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress_made = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress_made,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress_made)),
    }
    return config.learning_rate * decay[config.schedule]


def weight_of(config: TrainStage, term: str) -> float:
    return config.distillation_weight if term == "distillation" else 1.0


def taught_dimensions(config: TrainStage, model: Model, teacher: Model) -> Tensor:
    """Which of the teacher's dimensions the student's are to equal: int64 [D], D the student's width."""
    width, teacher_width = model.decoder.config.hidden_size, teacher.decoder.config.hidden_size
    dimensions = list(range(width))
    if config.distillation_target == "kept":
        kept = model.facts.kept
        if kept is None or kept["of"] not in (teacher.facts.identity, teacher.facts.parent):
            raise UsageError(
                "distillation_target is 'kept', but the student was not cut from the teacher or from the model that "
                "the teacher was trained from, so their dimensions do not correspond; take 'prefix'."
            )
        dimensions = kept["hidden"]
    if max(dimensions) >= teacher_width:
        raise UsageError(
            f"the teacher is {teacher_width} wide, but its student of {width} is to learn its dimension "
            f"{max(dimensions)}; take a wider teacher."
        )
    return torch.tensor(dimensions)


def compute_terms(
    config: TrainStage,
    model: Model,
    batch: Batch,
    sizes: list[int],
    teacher: Model | None = None,
    taught: Tensor | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The terms of the loss of one batch, with their graph, and the number of tokens computed."""
    vectors_ND, tokens = embed(model, batch.texts, config.max_length)
    roles = Roles(
        torch.from_numpy(batch.query_B),
        torch.from_numpy(batch.positive_B),
        torch.from_numpy(batch.negative_BK),
        torch.from_numpy(batch.same_BB),
        batch.in_batch,
    )
    terms = contrastive_terms(vectors_ND, roles, sizes, config.temperature)
    if teacher is not None and taught is not None:
        with torch.no_grad():
            teacher_ND = embed(teacher, batch.texts, config.max_length)[0].index_select(1, taught)
        terms["distillation"] = distillation_terms(vectors_ND, teacher_ND, roles)
    return terms, tokens


def embed(model: Model, texts: list[str], max_length: int) -> tuple[Tensor, int]:
    """Raw vectors [N, D] of texts and the number of tokens computed; longer texts are cut before EOS."""
    ids = encode(
        model.tokenizer, texts, eos_id=model.facts.eos_id, max_length=max_length, too_long="truncate"
    )
    lengths = [len(sequence) for sequence in ids]
    return model.decoder(torch.tensor(list(chain.from_iterable(ids))), lengths), sum(lengths)


@contextmanager
def open_log(path: Path, done: int) -> Iterator[IO[str]]:
    """Append to a log of one JSON object a line, without the lines of steps that a resumed run does again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < done]
    write_text(path, "".join(line + "\n" for line in kept))
    with open(path, "a", encoding="utf-8", buffering=1) as file:  # a line at a time, for whoever watches
        yield file


def train(
    config: TrainStage, model: Model, sampler: Sampler, teacher: Model | None, out: Path
) -> dict[str, Any]:
    """Run the steps that are not done yet; changes `model.decoder` in place and returns the last step's log."""
    decoder = model.decoder.train()
    optimizer = make_optimizer(decoder, config)
    done = load_checkpoint(out / "checkpoints", decoder, optimizer)
    sizes = _sizes(config, decoder)
    taught = taught_dimensions(config, model, teacher) if teacher else None
    record: dict[str, Any] = {}
    with (
        open_log(out / "log.jsonl", done) as log,
        progress(total=config.steps, what=f"train {out.name}", unit="step") as bar,
    ):
        bar.advance(done)
        for step in range(done, config.steps):
            started = time.perf_counter()
            learning_rate = learning_rate_at(config, step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            batch = sampler[step]
            terms, tokens = compute_terms(config, model, batch, sizes, teacher, taught)
            loss = torch.stack([weight_of(config, name) * term for name, term in terms.items()]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.clip_norm)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise F2Error(
                    f"the loss at step {step} of {out.name} is {loss.item()} (gradient norm {norm.item()}); "
                    "lower learning_rate or lengthen warmup_steps."
                )
            optimizer.step()
            record = {"step": step, "source": batch.source, "loss": loss.item()}
            record |= {name: term.item() for name, term in terms.items()}
            record |= {"gradient_norm": norm.item(), "learning_rate": learning_rate}
            record["tokens_per_second"] = tokens / (time.perf_counter() - started)
            log.write(json.dumps(record) + "\n")
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                save_checkpoint(out / "checkpoints", step + 1, decoder, optimizer)
            bar.advance(1, note=f"loss {loss.item():.3f}")
    decoder.eval()
    return record
