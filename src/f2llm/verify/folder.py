"""A model folder, or a model of the hub, verified: what its files say, then what is computed from it.

Our own engine computes; with `peer`, sentence-transformers does as well, and both have to agree. A folder that others
load wrongly is the point of the command.

Shape suffixes: N texts, D dims.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.model.base import model_folder
from f2llm.verify.computed import COMPUTED_CHECKS, RefusedError, Target, Vectors
from f2llm.verify.file_checks import FILE_CHECKS
from f2llm.verify.findings import MALFORMED, Check, Report, failed_by, passed, run_checks, skipped
from f2llm.verify.folder_files import Files
from f2llm.verify.golden import GOLDEN, golden_check, write_golden
from f2llm.verify.peer import agrees_with_peer


class FolderTarget:
    """What our engine computes from a folder, under the prompt that its files name."""

    def __init__(self, files: Files, query_prompt: str | None = None) -> None:
        """`query_prompt` instead of the one that the files name. Raises F2Error where the folder is refused."""
        self.embedder = Embedder(files.folder)
        self.width = self.embedder.dim
        self.sizes = self.embedder.sizes
        self.identity = self.embedder.identity
        self.query_prompt = files.prompts.get("query", "") if query_prompt is None else query_prompt

    def embed(self, texts: Sequence[str], *, query: bool = False, dim: int | None = None) -> Vectors:
        try:
            return self.embedder.encode(texts, prompt="query" if query else None, dim=dim)
        except UsageError as error:
            raise RefusedError(str(error)) from None


def verify_folder(
    source: str,
    *,
    peer: bool = False,
    golden: Path | None = None,
    query_prompt: str | None = None,
    make_golden: bool = False,
) -> Report:
    """All checks of a folder or a model of the hub.

    Args:
        source: a folder, or `owner/name` or `owner/name@revision` of the hub.
        peer: compute with sentence-transformers as well.
        golden: a file of golden vectors; the folder's own by default.
        query_prompt: what should stand in front of queries, if not what the folder names.
        make_golden: write golden.json into the folder, if no check failed.

    Raises UsageError if there is no such model, or no such peer here.
    """
    if peer and importlib.util.find_spec("sentence_transformers") is None:
        raise UsageError("--peer computes with sentence-transformers, which is not installed; install it.")
    if make_golden and not Path(source).is_dir():
        raise UsageError(f"--write-golden writes into a folder, {source} is none; give the folder of a copy.")
    files = Files(model_folder(source))
    findings = run_checks(FILE_CHECKS, files)
    computed: list[Check[Target]] = list(COMPUTED_CHECKS)
    shipped = golden or files.folder / GOLDEN
    if not make_golden and (golden or shipped.is_file()):
        computed.append(("golden", golden_check(shipped, empty_texts=True)))
    if peer:
        computed.append(("peer", lambda target: agrees_with_peer(files, target)))
    try:
        target = FolderTarget(files, query_prompt)
    except (F2Error, *MALFORMED) as error:
        findings["loads"] = failed_by(error)
        findings |= {name: skipped("not computed, since the folder does not load") for name, _ in computed}
    else:
        findings["loads"] = passed(f"f2llm loads it; {target.width} dimensions")
        findings |= run_checks(computed, target)
        if make_golden and not Report(source, findings).failed:
            texts = write_golden(files.folder / GOLDEN, target.embedder)
            findings["golden"] = passed(f"{GOLDEN} was written, with {texts} texts")
    if make_golden:
        findings.setdefault("golden", skipped(f"{GOLDEN} is not written while a check fails"))
    findings.setdefault("golden", skipped(f"the folder ships no {GOLDEN}; --write-golden makes it"))
    return Report(source, findings)
