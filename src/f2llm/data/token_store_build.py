"""Building a token store: from folders of rows to parts of token ids, each distinct text tokenised once.

part of rows -> its distinct texts and their hashes      (each part alone, anywhere)
hashes of all parts -> numbers of the texts              (token_store_numbers.py)
part of rows -> token ids of its new texts, its rows     (each part alone, anywhere)
all parts -> labels.json, store.json                     (last: what has a store.json is complete)

Each file is complete or not there, and none depends on who wrote it or when, so a build that was killed goes on with
the files that are missing. A store to which folders are added keeps its parts: numbers go up in the order of the
parts, so they stay, and the larger store is the one that a build from nothing would make.
"""

import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.data.parts import Part, carry_decontamination, parts, read_part
from f2llm.data.rows import Source, read_sources
from f2llm.data.token_store_format import LABELS_FILE, STORE_FILE, VERSION, Header, PartFacts
from f2llm.data.token_store_numbers import NUMBERS_FILE, HashFile, number_texts, text_hashes
from f2llm.data.token_store_part import PartWork, write_part
from f2llm.data.token_store_texts import Prompts, part_texts, slices
from f2llm.engine import map_items
from f2llm.errors import F2Error
from f2llm.files import read_object, sha256_file, write_json
from f2llm.recipe_corpus import TokeniseStage
from f2llm.tokenizer_file import load_tokenizer

PLAN_FILE, DONE, HASHES, NUMBERING = "plan.json", "done", "hashes", "numbering"


def tokenise_stage(
    config: TokeniseStage,
    *,
    folders: Sequence[Path],
    tokenizer: Path,
    out: Path,
    prompt: Callable[[str], str],
) -> dict[str, Any]:
    """Build a token store in `out`; `prompt` makes what stands in front of a query from an instruction."""
    instructions = {source.name: source.instruction for folder in folders for source in read_sources(folder)}
    asked = {name: prompt(text) for name, text in instructions.items() if text and config.instructions}
    return build(folders, tokenizer, out, asked)


def build(folders: Sequence[Path], tokenizer: Path, out: Path, prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Build a token store, go on with one, or add folders to one.

    Args:
        folders: folders of rows; those that the store has already come first, in their order.
        tokenizer: a tokenizer.json that appends EOS.
        prefixes: what stands in front of the queries of each source; sources that are left out have no prompt.

    Returns:
        Texts, tokens and rows of the store; and by source and language how many texts its rows name, how many of
        these no part before had, what share that is, and their tokens.

    Raises F2Error where the store in `out` is of another tokenizer or of other rows.
    """
    sources = _sources(folders)
    plan = _plan(tokenizer, out)
    found = [part for folder in folders for part in parts(folder)]
    prompts = tuple(Prompts.of(source, prefixes.get(source.name, "")) for source in sources)
    scanned = _scan_parts([_Scan(number, part, out, prompts) for number, part in enumerate(found)], out)
    languages = tuple(dict.fromkeys(chain.from_iterable(facts["languages"] for facts in scanned)))

    digest = hashlib.sha256("".join(facts["identity"] for facts in scanned).encode()).hexdigest()[:16]
    work = out / f"{NUMBERING}-{digest}"
    _remove_leavings(out, but=work)
    files = [HashFile(_hashes(out, number), facts["texts"]) for number, facts in enumerate(scanned)]
    numbers, starts = number_texts(files, work)
    writes, first = [], 0
    for number, part in enumerate(found):
        place = int(starts[number])
        writes.append(
            PartWork(
                number=number,
                part=part,
                out=out,
                done=out / DONE / f"{number:05}.json",
                prompts=prompts,
                tokenizer=tokenizer,
                vocab_size=plan["vocab_size"],
                eos_id=plan["eos_id"],
                hashes=files[number],
                numbering=work / NUMBERS_FILE,
                place=place,
                first=first,
                languages=languages,
            )
        )
        if files[number].count:
            first = max(first, int(numbers[place : int(starts[number + 1])].max()) + 1)
    written = list(map_items(write_part, writes, what="tokenise"))
    header = Header(
        version=VERSION,
        tokenizer=plan["tokenizer"],
        vocab_size=plan["vocab_size"],
        eos_id=plan["eos_id"],
        prefixes={prompt.source: prompt.query for prompt in prompts},
        sources=sources,
        languages=list(languages),
        parts=[PartFacts(**facts["part"]) for facts in written],
    )
    write_json(out / LABELS_FILE, _labels(written))
    carry_decontamination(folders, out)
    write_json(out / STORE_FILE, header.model_dump())
    _remove_leavings(out, but=None)
    return _facts(header, written)


def _labels(written: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    labels: dict[str, dict[str, int]] = defaultdict(dict)
    for facts in written:
        for source, named in facts["labels"].items():
            labels[source].update(named)
    return {source: dict(sorted(named.items())) for source, named in sorted(labels.items())}


def _facts(header: Header, written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    totals: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for facts in written:
        for source, language, named, distinct, tokens in facts["tally"]:
            totals[source][language].update(named=named, distinct=distinct, tokens=tokens)
    return {
        "texts": sum(part.texts for part in header.parts),
        "tokens": sum(part.tokens for part in header.parts),
        "rows": sum(part.rows for part in header.parts),
        "sources": {
            source: {
                language: {**counts, "distinct_share": round(counts["distinct"] / counts["named"], 4)}
                for language, counts in sorted(languages.items())
            }
            for source, languages in totals.items()
        },
    }


def _sources(folders: Sequence[Path]) -> list[Source]:
    """The sources of all folders; one that is in several is one."""
    sources: dict[str, Source] = {}
    for folder in folders:
        for source in read_sources(folder):
            known = sources.setdefault(source.name, source)
            counted = {"rows": source.rows, "languages": source.languages}
            if known.model_copy(update=counted) != source:
                raise F2Error(
                    f"{folder} has another source {source.name!r} than the folders before it; give one of them "
                    "another name."
                )
            if known is not source:
                sources[source.name] = known.model_copy(
                    update={
                        "rows": known.rows + source.rows,
                        "languages": sorted({*known.languages, *source.languages}),
                    }
                )
    return list(sources.values())


def _plan(tokenizer: Path, out: Path) -> dict[str, Any]:
    """What all parts have in common, as the first build into the folder has left it."""
    loaded = load_tokenizer(tokenizer)
    eos = loaded.encode("").ids
    if not eos:
        raise F2Error(
            f"{tokenizer} appends no EOS to a text, so vectors would be wrong; repair its post-processor."
        )
    plan: dict[str, Any] = {
        "version": VERSION,
        "tokenizer": sha256_file(tokenizer),
        "vocab_size": loaded.get_vocab_size(),
        "eos_id": eos[-1],
    }
    path = out / PLAN_FILE
    if not path.exists():
        write_json(path, plan)
    elif (known := read_object(path)) != plan:
        raise F2Error(
            f"{out} has a token store of another tokenizer (SHA-256 {str(known.get('tokenizer'))[:16]}..., expected "
            f"{plan['tokenizer'][:16]}...); build into another folder."
        )
    return plan


@dataclass(frozen=True)
class _Scan:
    number: int
    part: Part
    out: Path
    prompts: tuple[Prompts, ...]


def _hashes(out: Path, number: int) -> Path:
    return out / HASHES / f"{number:05}.bin"


def _scan_parts(scans: Sequence[_Scan], out: Path) -> list[dict[str, Any]]:
    scanned = list(map_items(_scan_part, scans, what="find distinct texts"))
    if _hashes(out, len(scans)).exists():
        raise F2Error(
            f"{out} has a token store of more rows than the {len(scans)} parts given; give all its folders and "
            "then new ones, or build into another folder."
        )
    if not any(facts["texts"] for facts in scanned):
        raise F2Error("the folders have no rows to tokenise; give folders with at least one row.")
    return scanned


def _scan_part(scan: _Scan) -> dict[str, Any]:
    """Write the hashes of a part's texts; what it is, how many texts it has and in which languages its rows are."""
    facts_path = _hashes(scan.out, scan.number).with_suffix(".json")
    identity = _identity(scan)
    if facts_path.exists():
        facts = read_object(facts_path)
        if facts["identity"] != identity:
            raise F2Error(
                f"{scan.part.path}, row group {scan.part.row_group} is not part {scan.number} of the rows that the "
                f"token store in {scan.out} was built from; give its folders in their order and then new ones, "
                "or build into another folder."
            )
        return facts
    table = read_part(scan.part)
    distinct = part_texts(table, scan.prompts).distinct
    hash_N2 = np.concatenate([np.empty((0, 2), "<u8"), *(text_hashes(texts) for texts in slices(distinct))])
    HashFile.write(_hashes(scan.out, scan.number), hash_N2)
    languages = {*table["query_lang"].unique().to_pylist(), *table["positive_lang"].unique().to_pylist()}
    facts = {"identity": identity, "texts": len(hash_N2), "languages": sorted(languages)}
    write_json(facts_path, facts)
    return facts


def _identity(scan: _Scan) -> str:
    """Hash of a part's rows, and of what stands in front of their texts."""
    table = read_part(scan.part, ["source", "query_lang", "positive_lang", "hash"])
    present = set(table["source"].unique().to_pylist())
    prompts = [
        (number, *vars(prompt).values())
        for number, prompt in enumerate(scan.prompts)
        if prompt.source in present
    ]
    digest = hashlib.sha256(repr(prompts).encode())
    for name in table.column_names:
        digest.update(b"\x1e" + "\x1f".join(table[name].to_pylist()).encode())
    return digest.hexdigest()


def _remove_leavings(out: Path, but: Path | None) -> None:
    """Remove numberings, which are of use until all parts are written, and what a killed build was writing."""
    for folder in out.glob(f"{NUMBERING}-*"):
        if folder != but:
            shutil.rmtree(folder)
    for path in out.rglob(".*.tmp"):
        path.unlink()
