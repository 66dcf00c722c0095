"""A `tokenizer.json` as it is read everywhere: whole texts to tokens, whatever the file asks for beside that."""

from pathlib import Path

from tokenizers import Tokenizer

from f2llm.errors import F2Error


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, without any padding or truncation it may ask for.

    Raises F2Error where it is missing or broken.
    """
    if not path.is_file():
        raise F2Error(
            f"{path} is missing; a model folder needs a tokenizer.json, so point to a complete one."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise F2Error(
            f"{path} is not a tokenizer file ({error}); restore it from the model's source."
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
