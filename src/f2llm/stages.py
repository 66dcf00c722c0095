"""What the pipeline calls for each kind of stage: its settings and folders, handed to the room that does the work.

Each adapter imports its stage when it is run, so that a finished torch stage costs no import.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm.progress import say
from f2llm.recipe import EvaluateStage, IndexStage, PruneStage, TokenizerStage
from f2llm.recipe_corpus import (
    CleanStage,
    DecontaminateStage,
    MineStage,
    SourcesStage,
    SyntheticStage,
    TokeniseStage,
)
from f2llm.recipe_data import FilesStage, NamesStage
from f2llm.recipe_models import ExportStage, MergeStage, SliceStage, TrimStage
from f2llm.recipe_train import TrainStage

if TYPE_CHECKING:
    from f2llm.train.ranks import Ranks


@dataclass(frozen=True)
class Context:
    """What a stage may know of the run beside its own config and inputs."""

    seed: int
    recipe_hash: str
    hashes: dict[str, str]  # of the contents of its inputs, by name
    force: bool
    ranks: "Ranks | None"  # those of a run under torchrun


Inputs = dict[str, Path]
Facts = dict[str, Any]


def _names(config: NamesStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.names import names_stage

    return names_stage(config, out, context.seed)


def _files(config: FilesStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.user_files import files_stage

    return files_stage(config, out.name, out)


def _sources(config: SourcesStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.importing import sources_stage

    return sources_stage(config, out, context.seed)


def _synthetic(config: SyntheticStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.embed.embedder import Embedder
    from f2llm.synthetic.stage import synthetic_stage

    # Answers are money: they lie where no change of the recipe empties them.
    answers = config.answers or str(out.with_name(f"{out.name}-answers"))
    embedder = given[config.embedder] if config.embedder else None
    load = (lambda: Embedder(embedder)) if embedder else None
    return synthetic_stage(config.model_copy(update={"answers": answers}), out, load_encoder=load)


def _clean(config: CleanStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.clean_stage import clean_stage

    return clean_stage(config, _folders(config.data, given), out, context.seed)


def _decontaminate(config: DecontaminateStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.decontaminate import decontaminate_stage

    return decontaminate_stage(config, _folders(config.data, given), out)


def _mine(config: MineStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.mine.mining import mine_stage

    return mine_stage(config, _folders(config.data, given), given[config.model], out, context.seed)


def _tokenise(config: TokeniseStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.token_store_build import tokenise_stage
    from f2llm.model.prompts import query_prefix

    tokenizer = given[config.tokenizer]
    return tokenise_stage(
        config,
        folders=_folders(config.data, given),
        tokenizer=tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer,
        out=out,
        prompt=query_prefix,
    )


def files_beside(config: Any) -> list[Path]:
    """Files that a stage reads and that its settings do not name themselves."""
    if not isinstance(config, SourcesStage):
        return []
    from f2llm.data.importing import source_files

    return source_files(config)


def _folders(names: Sequence[str], given: Inputs) -> list[Path]:
    return [given[name] for name in names]


def _tokenizer(config: TokenizerStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.model.tokenizer import tokenizer_stage

    return tokenizer_stage(config, data=given[config.data], out=out)


def _train(config: TrainStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.train.ranks import collect, join
    from f2llm.train.stage import train_stage

    arguments: dict[str, Any] = {
        "config": config,
        "data": given[config.data],
        "base": given[config.base] if config.base else None,
        "tokenizer": given[config.tokenizer] if config.tokenizer else None,
        "teacher": given.get(config.teacher, config.teacher)
        if config.teacher
        else None,  # a URL is not given
        "out": out,
        "seed": context.seed,
        "recipe_hash": context.recipe_hash,
        "inputs": context.hashes,
        "force": context.force,
    }
    if context.ranks:
        collect(arguments, context.ranks)
        return train_stage(**arguments, ranks=context.ranks)
    with join() as ranks:
        return train_stage(**arguments, ranks=ranks)


def _prune(config: PruneStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.compress.prune import prune_stage

    return prune_stage(
        config,
        model=given[config.model],
        data=given[config.data],
        out=out,
        seed=context.seed,
        recipe_hash=context.recipe_hash,
    )


def _slice(config: SliceStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.compress.slicing import slice_into
    from f2llm.model.base import read_base

    base = read_base(given[config.model])
    facts = slice_into(out, base, layers=config.layers, rank=config.rank, dim=config.dim)
    return {"identity": facts.identity}


def _trim(config: TrimStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.compress.trimming import trim_model
    from f2llm.languages import tag

    languages = {tag(one) for one in config.languages} if config.languages else None
    corpus = _folders(config.data, given)
    trimmed = trim_model(given[config.model], out, corpus, languages=languages, keep=config.keep)
    return {
        "identity": trimmed.facts.identity,
        "tokens": trimmed.tokens,
        "parameters": trimmed.parameters,
        "languages": {language: asdict(found) for language, found in trimmed.languages.items()},
    }


def _merge(config: MergeStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.compress.merge import merge_models

    base = given[config.base] if config.base else None
    facts = merge_models(
        _folders(config.models, given), out, method=config.method, weights=config.weights, base=base
    )
    return {"identity": facts.identity}


def _export(config: ExportStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.data.user_files import iterate_texts
    from f2llm.export.export import export_model

    texts = list(iterate_texts(given[config.texts])) if config.texts else None
    # A folder of its own, for nothing else may lie where another runtime looks.
    parity = export_model(
        given[config.model], out / config.to, config.to, dim=config.dim, quantize=config.quantize, texts=texts
    )
    say(parity.render())
    return {"parity": asdict(parity)}


def _evaluate(config: EvaluateStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.evaluate.names import evaluate_stage

    models = {name: given[name] for name in config.models}
    return evaluate_stage(config, data=given[config.data], models=models, out=out)


def _index(config: IndexStage, given: Inputs, out: Path, context: Context) -> Facts:
    from f2llm.search.store import index_stage

    return index_stage(config, data=given[config.data], model=given[config.model], out=out)


StageFunction = Callable[[Any, Inputs, Path, Context], Facts]
STAGES: dict[str, StageFunction] = {
    "names": _names,
    "files": _files,
    "sources": _sources,
    "synthetic": _synthetic,
    "clean": _clean,
    "decontaminate": _decontaminate,
    "mine": _mine,
    "tokenise": _tokenise,
    "tokenizer": _tokenizer,
    "train": _train,
    "prune": _prune,
    "slice": _slice,
    "trim": _trim,
    "merge": _merge,
    "export": _export,
    "evaluate": _evaluate,
    "index": _index,
}
