"""From rows to batches: near duplicates, mining and the token store, each against the library that does it best.

Near duplicates against datasketch, mining against sentence-transformers, the token store against bare `tokenizers`
(building it) and `datasets` (reading from it). What is compared, and how, is told in near_duplicates.py, mining.py and
token_store.py.
"""

from pathlib import Path

from harness import Part, benchmark
from mining import mining
from near_duplicates import near_duplicates
from token_store import token_store


def parts(folder: Path, small: bool) -> list[Part]:
    return [
        *token_store(folder / "token_store", small),
        mining(folder / "mining", small),
        *near_duplicates(folder / "near_duplicates", small),
    ]


def main() -> None:
    benchmark(__doc__, parts)


if __name__ == "__main__":
    main()
