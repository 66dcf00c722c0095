"""Training as a stage of a run: canonical rows and a base model in, a complete model folder out."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from f2llm.data.parts import carry_decontamination
from f2llm.data.rows import Source, read_rows
from f2llm.data.token_store import TokenStore, open_store
from f2llm.data.token_store_format import STORE_FILE
from f2llm.endpoints import api_key
from f2llm.errors import F2Error, UsageError
from f2llm.files import sha256_file
from f2llm.model.base import Base, load_base, read_base
from f2llm.model.decoder import Decoder, DecoderConfig, initialise
from f2llm.model.folder import Model, ModelFacts, model_size, save_model
from f2llm.model.prompts import TEMPLATE, query_prefix
from f2llm.model.sanity import check_base
from f2llm.model.tokenizer import EOS
from f2llm.progress import say
from f2llm.recipe_fields import is_url
from f2llm.recipe_train import TrainStage
from f2llm.tokenizer_file import load_tokenizer
from f2llm.train.checkpoint import drop_checkpoints
from f2llm.train.ranks import ALONE, Ranks, on_main, same_on_all, whole_weights
from f2llm.train.sampler import Sampler, prompt_of
from f2llm.train.sources import SourceRows, hold_out, load_sources
from f2llm.train.teacher_endpoint import Endpoint
from f2llm.train.terms import token_ids, trained_sizes
from f2llm.train.trainer import train
from f2llm.train.training import reader_of


def train_stage(
    config: TrainStage,
    *,
    data: Path,
    base: str | Path | None,
    tokenizer: Path | None,
    teacher: str | Path | None,
    out: Path,
    seed: int,
    recipe_hash: str,
    inputs: dict[str, str] | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a model on canonical rows and leave a complete model folder in `out`; every rank calls it.

    Args:
        data: folder of canonical rows, or of the token store made of them, which gives the same weights.
        base: model to start from (see `load_base`), or None for random weights of `config.shape`.
        tokenizer: folder of the tokenizer that random weights start with.
        teacher: model or URL to distil from, or None.
        inputs: hashes of what the stage reads, by name; a run is not continued with others, unless `force`.

    Returns:
        Facts for the manifest.
    """
    same_on_all(recipe_hash, "the recipe's hash", ranks)
    store = open_store(data) if (data / STORE_FILE).exists() else None
    content, sources = (store, store.sources) if store else read_rows(data)
    rows, held_out = split(config, load_sources(content, sources, config.formats), seed)
    model = open_base(config, base, tokenizer, seed, ranks)
    taught_by = _teacher(config, teacher) if teacher else None
    if store:
        check_tokenizer(store, model, base or tokenizer, "model")
        check_prompts(store, [part.source for part in rows], config.instructions, model.facts.template)
    if store and isinstance(taught_by, Base):
        check_tokenizer(store, taught_by, teacher, "teacher")
    if config.instructions:
        check_instructions(model, [source.source for source in rows], config.max_length)
    sampler = make_sampler(config, rows, seed, model.facts.template)
    record = train(
        config,
        model,
        sampler,
        taught_by,
        out,
        held_out=held_out,
        read=reader_of(store) if store else token_ids,
        inputs=inputs,
        force=force,
        ranks=ranks,
    )
    facts = ModelFacts(
        eos_id=model.facts.eos_id,
        max_length=config.max_length,
        matryoshka_sizes=trained_sizes(config, model.decoder.config.hidden_size),
        instruction=_default_instruction([r.source for r in rows]) if config.instructions else "",
        template=model.facts.template,
        parent=model.facts.identity or None,
        recipe=recipe_hash,
        kept=model.facts.kept,
        exits=config.exits,
        table_ranks=config.table_ranks,
    )
    whole = Model(whole_weights(model.decoder, ranks), model.tokenizer, facts)
    known = [data] if base is None else [data, Path(base)]
    on_main(lambda: carry_decontamination(known, out), ranks)
    facts = on_main(lambda: save_model(out, whole), ranks)
    on_main(lambda: drop_checkpoints(out / "checkpoints"), ranks)
    return {
        "parameters": model_size(whole.decoder),
        "threads": torch.get_num_threads(),  # another number may give other last bits
        "ranks": ranks.world,
        "identity": facts.identity,
        "last": record,
    }


def split(config: TrainStage, rows: list[SourceRows], seed: int) -> tuple[list[SourceRows], list[SourceRows]]:
    """The rows to train on, and those held out for validation, by source."""
    if not config.validation:
        return rows, []
    pairs = [hold_out(source, config.validation.rows, seed) for source in rows]
    return [train for train, _ in pairs], [held for _, held in pairs]


def make_sampler(config: TrainStage, rows: list[SourceRows], seed: int, template: str = TEMPLATE) -> Sampler:
    return Sampler(
        rows,
        seed=seed,
        steps=config.steps,
        epochs=config.epochs,
        batch_size=config.batch_size,
        hard_negatives=config.hard_negatives.model_dump(),
        instructions=config.instructions,
        document_instruction_rate=config.document_instruction_rate,
        source_weights=config.source_weights,
        cap=config.cap,
        cap_by=config.cap_by,
        language_temperature=config.language_temperature,
        template=template,
    )


def open_base(
    config: TrainStage, base: str | Path | None, tokenizer: Path | None, seed: int, ranks: Ranks
) -> Model:
    """The model to start from: an earlier one, looked over for what would spoil the run, or random weights."""
    if base is None:
        return _random_model(config, tokenizer, seed)
    model = load_base(base)
    for sentence in check_base(model) if ranks.is_main else ():
        say(f"warning: {sentence}")
    return model


def _teacher(config: TrainStage, teacher: str | Path) -> Base | Endpoint:
    if not is_url(str(teacher)):
        return read_base(teacher)
    asked = config.distillation
    assert asked.model is not None  # the recipe sees to it
    return Endpoint(str(teacher), asked.model, api_key(asked.api_key_env))


def check_instructions(model: Model, sources: list[Source], max_length: int) -> None:
    """Refuse an instruction that leaves no token for the query: all queries of its source would be one text."""
    for source in sources:
        (prompt,) = token_ids(model, [query_prefix(source.instruction, model.facts.template)], max_length + 1)
        if len(prompt) >= max_length:
            raise UsageError(
                f"the instruction of {source.name} takes all {max_length} tokens of max_length, so that nothing is "
                f"left of a query; shorten {source.instruction!r:.60} or raise max_length."
            )


def check_tokenizer(store: TokenStore, model: Model | Base, folder: str | Path | None, whose: str) -> None:
    """Refuse token ids that the model's tokenizer would not have given."""
    path = Path(str(folder)) / "tokenizer.json"
    hashes = {hashlib.sha256(model.tokenizer.to_str(pretty=False).encode()).hexdigest()}
    hashes |= {sha256_file(path)} if path.is_file() else set()
    if store.header.tokenizer not in hashes:
        raise UsageError(
            f"{store.folder} has token ids of another tokenizer (SHA-256 {store.header.tokenizer[:16]}...) than the "
            f"{whose} (expected {' or '.join(sorted(each[:16] + '...' for each in hashes))}), and no texts; tokenise "
            f"the rows with that of the {whose}, or give the folder of rows itself as 'data'."
        )


def check_prompts(store: TokenStore, sources: list[Source], instructions: bool, template: str) -> None:
    """Refuse a store whose queries do not stand behind the prompts that training puts before them."""
    for source in sources:
        wanted = prompt_of(source, instructions, template)
        stored = store.header.prefixes.get(source.name, "")
        if wanted and wanted != stored:
            raise UsageError(
                f"{store.folder} has the queries of {source.name} behind the prompt {stored!r:.60}, expected "
                f"{wanted!r:.60}; tokenise the rows with 'instructions' and the model's template, or train without."
            )


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


def _default_instruction(sources: list[Source]) -> str:
    """The instruction of the largest retrieval source: what a query without an instruction of its own gets."""
    retrieval = [s for s in sources if s.format == "retrieval"] or sources
    return max(retrieval, key=lambda source: source.rows).instruction
