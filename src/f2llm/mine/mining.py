"""Mining: hard negatives for the retrieval rows of a corpus, by any model of ours and, if wanted, a cross-encoder.

rows -> distinct texts with numbers and vectors (texts.py) -> pools: who is searched for whom (pools.py)
-> block of rows -> nearest documents, exactly (search.py) -> limits on their scores (choice.py) -> candidates
-> part of rows -> the same rows with their candidates behind the negatives they had (rows_out.py)
-> counts by source and language, and a sheet of rows to read (report.py)

Every file is complete or not there and depends on the settings and rows alone, so work that was killed goes on, and
ends in what it would have come to. Rows of other formats pass unchanged: their partners are drawn by label.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from f2llm.data.parts import Part, carry_decontamination, parts, write_sources
from f2llm.data.rows import read_sources
from f2llm.engine import Engine, current_engine, map_items, using
from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, write_json, write_text
from f2llm.mine.block import ROWS_AT_ONCE, Block, Rerank, Rules, mine_block
from f2llm.mine.choice import Limits
from f2llm.mine.cross_encoder import cross_encoder_scores
from f2llm.mine.pools import Pool, make_pools
from f2llm.mine.report import add_up, report_page, sample_sheet
from f2llm.mine.rows_out import draw_samples, write_rows_out
from f2llm.mine.texts import Corpus, embedder, encode, plan_vectors, read_corpus
from f2llm.model.base import load_base
from f2llm.model.folder import FACTS, save_model
from f2llm.recipe_corpus import MineStage

WORK, REPORT, PAGE, SHEET = "work", "report.json", "report.md", "samples.md"
ONE_PROCESS = Engine(workers=1)


def mine_stage(
    config: MineStage,
    folders: Sequence[Path],
    model: str | Path,
    out: Path,
    seed: int,
    rerank: Rerank | None = None,
    miners: Engine | None = None,
) -> dict[str, Any]:
    """Write the rows of `folders` with mined negatives to the folder of rows `out`, and what came of it.

    Args:
        model: the miner's folder, or its name on the hub.
        seed: decides which rows are on the sheet to read.
        rerank: scores pairs in the place of `config.cross_encoder`; one that can be sent to other processes, if
            `miners` has any.
        miners: who computes vectors and searches: by default the Ray that the run works on, or one process, which
            takes all cores, or the GPU.

    Returns:
        Rows, candidates, and distinct texts. `report.json` has counts by source and language.

    Raises F2Error where there are no retrieval rows, or `out` was begun with other rows or settings.
    """
    if (out / REPORT).exists():  # all but the clearing away was done
        shutil.rmtree(out / WORK, ignore_errors=True)
        return dict(read_json(out / REPORT)["facts"])
    found = [part for folder in folders for part in parts(folder)]
    sources = {source.name: source for folder in folders for source in read_sources(folder)}
    retrieval = [source for source in sources.values() if source.format == "retrieval"]
    if not retrieval:
        raise F2Error(
            f"none of {', '.join(map(str, folders))} has a source of retrieval rows, and only these are mined for; "
            "leave the stage out."
        )
    miners = miners or (ONE_PROCESS if current_engine().kind == "local" else None)
    work = out / WORK
    miner = _our_folder(model, work)
    reader = embedder(miner)
    _claim(work, config, found, reader.identity)
    if config.dim is not None and config.dim > reader.dim:
        raise UsageError(f"dim is {config.dim}; {model} gives 1 to {reader.dim}.")
    prefixes = {
        source.name: reader.prefix("query", source.instruction) if config.instructions else ""
        for source in retrieval
    }
    if config.cross_encoder and not rerank:
        rerank = partial(cross_encoder_scores, config.cross_encoder)
    corpus = read_corpus(found, prefixes, work)
    with using(miners):
        for _ in map_items(encode, plan_vectors(corpus, miner, config.dim), what="embed texts", unit="batch"):
            pass
    languages = corpus.languages()
    pools = make_pools(corpus, len(found), config.pool, list(prefixes), languages)
    blocks = _blocks(config, corpus, pools, prefixes, languages, rerank)
    with using(miners):
        counts = add_up(
            one for counted in map_items(mine_block, blocks, what="mine", unit="block") for one in counted
        )
    tally = write_rows_out(found, corpus, pools, config.given_negatives == "keep", out)
    write_sources(out, sources.values(), tally)
    carry_decontamination(folders, out)
    write_text(out / PAGE, report_page(counts))
    sheet = draw_samples(config.samples, seed, corpus, pools, prefixes, languages)
    write_text(out / SHEET, sample_sheet(sheet))
    facts = {
        "rows": sum(
            count for source in tally.values() for fates in source.values() for count in fates.values()
        ),
        **_totals(counts),
        "texts": len(corpus),
        "pools": len(pools),
        "miner": reader.identity,
    }
    write_json(out / REPORT, {"facts": facts, "counts": counts})
    shutil.rmtree(work)
    return facts


def _blocks(
    config: MineStage,
    corpus: Corpus,
    pools: Sequence[Path],
    prefixes: Mapping[str, str],
    languages: Sequence[str],
    rerank: Rerank | None,
) -> list[Block]:
    """The rows of all pools, so many at a time."""
    block = partial(
        Block,
        corpus=corpus,
        rules=_rules(config),
        sources=tuple(prefixes),
        languages=tuple(languages),
        prefixes=tuple(prefixes.values()),
        rerank=rerank,
    )
    return [
        block(pool=pool, first=first, last=min(first + ROWS_AT_ONCE, rows))
        for pool in pools
        for rows in [len(Pool.load(pool))]
        for first in range(0, rows, ROWS_AT_ONCE)
    ]


def _totals(counts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "rows_mined_for": sum(one["rows"] for one in counts),
        "rows_without_candidates": sum(one["candidates"].get("0", 0) for one in counts),
        "candidates": sum(one["ranked"]["kept"] for one in counts),
    }


def _rules(config: MineStage) -> Rules:
    return Rules(
        candidates=config.candidates,
        skip_ranks=config.skip_ranks,
        last_rank=config.last_rank,
        limits=Limits(config.absolute_margin, config.relative_margin, config.max_score),
        keep_given=config.given_negatives == "keep",
    )


def _our_folder(model: str | Path, work: Path) -> Path:
    """A model folder of ours as it is; another model is written as one."""
    if (Path(model) / FACTS).is_file():
        return Path(model)
    if not (work / "model" / FACTS).is_file():
        save_model(work / "model", load_base(model))
    return work / "model"


def _claim(work: Path, config: MineStage, found: Sequence[Part], miner: str) -> None:
    made_of = {
        "config": config.model_dump(mode="json"),
        "parts": [list(part) for part in found],
        "miner": miner,
    }
    path = work / "made_of.json"
    if path.exists() and read_json(path) != made_of:
        raise F2Error(f"{work} was begun with other rows, settings or another model; give an empty folder.")
    write_json(path, made_of)
