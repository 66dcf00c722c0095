"""The one Unicode policy, applied wherever text enters: rows, prompts, queries and texts to embed."""

import unicodedata

from f2llm.errors import UsageError


def clean(text: str) -> str:
    """Well-formed Unicode in NFC, with nothing else changed.

    Halves of a surrogate pair that stand side by side (as broken JSON leaves them) become their character, a half
    that stands alone becomes U+FFFD, and the whole is composed to NFC. White space, emoji, direction marks and empty
    text stay as they are. Raises UsageError for anything but a string.
    """
    if not isinstance(text, str):
        raise UsageError(f"a text must be a string, got {type(text).__name__}: {text!r:.60}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFC", text)
