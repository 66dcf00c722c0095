"""docs/verify.md names every check, and no other, and the figures that are in the code."""

import re
import unicodedata
from pathlib import Path

from f2llm.verify import golden, protocol
from f2llm.verify.computed import COMPUTED_CHECKS, SAME
from f2llm.verify.file_checks import FILE_CHECKS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")


def test_every_check_is_explained() -> None:
    named = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    checks = [name for names in (FILE_CHECKS, COMPUTED_CHECKS, protocol.PROTOCOL_CHECKS) for name, _ in names]
    assert sorted(named) == sorted([*checks, "loads", "answers", "golden", "peer"])


def test_figures_are_those_of_the_code() -> None:
    assert f"cosine > {SAME}" in PAGE and f"text of {protocol.LONG:,} characters" in PAGE
    assert f"above {golden.LARGEST_DISTANCE} the check fails" in PAGE
    letters = {c for text in golden._SENTENCES for c in text if c.isalpha()}
    scripts = {
        unicodedata.name(letter).split()[0].replace("KATAKANA-HIRAGANA", "HIRAGANA") for letter in letters
    }
    assert f"{len(golden._SENTENCES)} languages and {len(scripts)} scripts" in PAGE, scripts
