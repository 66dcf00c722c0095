"""Mining on the CPU: `mine_stage` against sentence-transformers' `mine_hard_negatives`, same model, same settings.

20,000 queries look for 24 negatives each among 200,000 documents, with a model of less than 2 million parameters. A
query is the first two thirds of its positive, so that a model with random weights finds it. Encoding and all else
(search, choice, rows read and written) are timed apart. The peer has its best batch size of 32, 128 and 512 (found
first, on a few documents) and searches for 2,048 queries at a time. Both take minutes, so after a trial of a fiftieth
each has one turn.
"""

from pathlib import Path
from typing import Any

from f2llm.files import read_json, write_json
from f2llm.model.decoder import DecoderConfig
from harness import Figure, Part, PeerMissing, Row, Worker, measured, skipped, worker
from inputs import DOCUMENTS, SMALL, Size, describe, draw_texts, make_model, token_ids

MINER = Size("1.5M", DecoderConfig(2000, 256, 512, 2, 4, 2, 32), real=False)
MAX_LENGTH = 64  # tokens
SETTINGS = {"candidates": 24, "last_rank": 100, "relative_margin": 0.05}
BATCH_SIZES = (32, 128, 512)
DOCUMENTS_A_QUERY = 10
TRIAL = 50  # times less than the whole

ALL = Row("queries/s of mining, from rows to rows with negatives", bar=2)
ENCODE = Row("texts/s of mining, encoding alone")
REST = Row("queries/s of mining, all but encoding")
SAME = Row("share of the peer's negatives that are ours too", bar=0.999)
MEMORY = Row("peak memory in GB of mining", better="lower")
ROWS = (ALL, ENCODE, REST, SAME, MEMORY)


def make_texts(size: Size, queries: int) -> tuple[dict[str, list[str]], str]:
    """Queries with a positive each, and other documents.

    No query is a document: the peer would take it for a negative of its own, ours does not.
    """
    drawn, origin = draw_texts(size, DOCUMENTS, queries * DOCUMENTS_A_QUERY)
    asked: dict[str, str] = {}
    known = {" ".join(text.casefold().split()) for text in drawn}
    for text in drawn:
        query = text[: 1 + 2 * len(text) // 3]
        if " ".join(query.casefold().split()) not in known:
            asked.setdefault(query, text)
    chosen = dict(list(asked.items())[:queries])
    positives = set(chosen.values())
    others = [text for text in drawn if text not in positives]
    return {"queries": list(chosen), "positives": list(chosen.values()), "documents": others}, origin


def compare(ours: Worker, peer: Worker, folder: Path, texts: int, queries: int) -> tuple[list[Figure], int]:
    """All figures, and the peer's best batch size."""
    peer.call("encode", batch_size=BATCH_SIZES[0], texts=texts // TRIAL)
    tried = {size: peer.call("encode", batch_size=size, texts=texts // TRIAL) for size in BATCH_SIZES}
    best = min(tried, key=lambda size: tried[size])
    print(f"seconds of the peer by batch size: {tried}", flush=True)
    our_time = ours.call("mine", **SETTINGS)
    peer_time = peer.call("mine", batch_size=best, **SETTINGS)
    print(f"seconds: ours {our_time}, peer {peer_time}", flush=True)
    both = our_time, peer_time
    figures = [
        measured(ALL, *(queries / sum(seconds.values()) for seconds in both)),
        measured(ENCODE, *(texts / seconds["encode"] for seconds in both)),
        measured(REST, *(queries / seconds["rest"] for seconds in both)),
        measured(SAME, in_common(ours, peer, folder)),
        measured(MEMORY, *(contender.call("peak_memory") / 2**30 for contender in (ours, peer))),
    ]
    return figures, best


def in_common(ours: Worker, peer: Worker, folder: Path) -> float:
    mined = []
    for contender in (ours, peer):
        path = folder / f"{contender.name}.json"
        contender.call("save", path=str(path))
        mined.append(read_json(path))
    common = sum(len(set(mined[0][query]) & set(texts)) for query, texts in mined[1].items())
    # Of what either mined, so that too many of ours count as well as too few.
    return common / max(sum(len(texts) for texts in one.values()) for one in mined)


def mining(folder: Path, small: bool) -> Part:
    """The comparison, in `folder`, which must not be there yet."""
    size, queries = (SMALL, 200) if small else (MINER, 20_000)
    texts, origin = make_texts(size, queries)
    written = [text for column in texts.values() for text in column]
    sample = written[:: max(1, len(written) // 10_000)]
    folder.mkdir()
    model = make_model(folder / "model", size, sample, MAX_LENGTH)
    inputs: dict[str, Any] = {
        **describe(size, model, token_ids(model, written), origin),
        "queries": queries,
        "documents": len(written) - queries,
        **SETTINGS,
    }
    print(f"texts: {inputs}", flush=True)
    write_json(folder / "texts.json", texts)
    given = (folder / "model", folder / "texts.json")
    with worker("mine_ours", *given, folder, keep_memory=True) as ours:
        workers = {"ours, mining": ours.facts}
        try:
            with worker("mine_sentence_transformers", *given, peer=True) as peer:
                figures, best = compare(ours, peer, folder, len(written), queries)
                workers["peer, mining"] = {**peer.facts, "batch_size": best}
        except PeerMissing as missing:
            figures = [skipped(row, str(missing)) for row in ROWS]
    return Part(figures, {"mining": inputs}, workers)
