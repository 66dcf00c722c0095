"""What cleaning does to every text: white space at its ends and characters that nobody means to write go, nothing else.

Removed: control characters but tab and line feed; the byte order mark, word joiner and soft hyphen; embeddings,
overrides and isolates of text direction, which show text in another order than it has; deprecated format characters,
annotation marks, noncharacters, and tags outside the emoji of a flag, which hide text. Kept: joiners and non-joiners
(Persian, scripts of India, emoji), the zero-width space (words of Khmer, Thai, Burmese), variation selectors, the
direction marks LRM, RLM and ALM, and characters for private use. Line ends of every kind become a line feed. The
controls U+0080 to U+009F are characters of Windows-1252, as browsers take them. The result is well-formed and in NFC
(`f2llm.text`).

Most texts need nothing of this, so Arrow finds the few that do and only these become strings of Python.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from f2llm.text import clean

LINE_ENDS = r"\r\n|[\r\v\f\x1c-\x1e\x{2028}\x{2029}]"
FLAG = r"\x{1F3F4}[\x{E0020}-\x{E007E}]+\x{E007F}"
CONTROLS = r"\x00-\x08\x0e-\x1b\x1f\x7f-\x9f"
FORMATS = r"\x{AD}\x{FEFF}\x{2060}\x{202A}-\x{202E}\x{2066}-\x{206F}\x{FFF9}-\x{FFFB}\x{FDD0}-\x{FDEF}\x{FFFE}\x{FFFF}"
TAGS = r"\x{E0000}-\x{E007F}"
REMOVED = f"[{CONTROLS}{FORMATS}{TAGS}]"
INDENTED = (
    r"\A[\s\p{Z}][\s\S]*\n"  # the first of several lines may begin with white space that says something
)
SUSPECT = f"{REMOVED}|{LINE_ENDS}|{INDENTED}"  # RE2; only a suspect may need more than NFC and trimming


def _python(pattern: str) -> str:
    """An RE2 pattern for `re`, which writes code points in another way."""
    return re.sub(r"\\x\{([0-9A-F]+)\}", lambda found: f"\\U{int(found[1], 16):08x}", pattern)


_LINE_ENDS = re.compile(_python(LINE_ENDS))
_REMOVED = re.compile(_python(f"({FLAG})|{REMOVED}"))
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
# WHATWG, HTML, "numeric character reference end state"; 5 of the 32 have no character and are removed.
_WINDOWS_1252 = {
    code: text for code in range(0x80, 0xA0) if (text := bytes([code]).decode("cp1252", "ignore"))
}


def tidy(text: str) -> str:
    """The text as it goes on; see the module for what changes.

    White space before a text goes, but of several lines the first keeps its indentation: the others have theirs.
    """
    text = _LINE_ENDS.sub("\n", text.translate(_WINDOWS_1252))
    text = _BLANK_LINES.sub("", _REMOVED.sub(r"\1", text)).rstrip()
    return clean(text if "\n" in text else text.lstrip())


def tidy_all(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """`tidy` of each text; a missing one stays missing."""
    trimmed = pc.utf8_trim_whitespace(texts)
    suspect = pc.match_substring_regex(texts, SUSPECT)
    not_composed = pc.not_equal(pc.utf8_normalize(trimmed, "NFC"), trimmed)
    needs = pc.fill_null(pc.or_(suspect, not_composed), False)
    if not pc.any(needs).as_py():
        return trimmed
    mended = [tidy(text) for text in texts.filter(needs).to_pylist()]
    return pc.replace_with_mask(trimmed, needs, pa.array(mended, pa.large_string()))
