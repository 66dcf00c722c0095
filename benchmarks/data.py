"""From rows to batches: near duplicates, mining and the token store, each against the library that does it best.

Near duplicates against datasketch, mining against sentence-transformers, the token store against bare `tokenizers`
(building it) and `datasets` (reading from it). What is compared, and how, is told in near_duplicates.py, mining.py and
token_store.py.
"""

import argparse
import tempfile
from pathlib import Path

from harness import finish, start
from mining import mining
from near_duplicates import near_duplicates
from token_store import token_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="tiny models and few rows: a trial, no figures")
    small = parser.parse_args().small
    started = start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = [
            *token_store(folder / "token_store", small),
            mining(folder / "mining", small),
            *near_duplicates(folder / "near_duplicates", small),
        ]
    finish(
        [figure for part in parts for figure in part.figures],
        started,
        inputs={name: value for part in parts for name, value in part.inputs.items()},
        workers={name: facts for part in parts for name, facts in part.workers.items()},
    )


if __name__ == "__main__":
    main()
