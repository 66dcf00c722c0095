"""Smaller models: a vocabulary trimmed to some languages, memory of pruning a large model, a teacher from its cache.

What is measured, and how, is told in trimmed_vocabulary.py, prune_memory.py and teacher_step.py.
"""

from pathlib import Path

from harness import Part, benchmark
from prune_memory import prune_memory
from teacher_step import teacher_step
from trimmed_vocabulary import trimmed_vocabulary


def parts(folder: Path, small: bool) -> list[Part]:
    return [
        trimmed_vocabulary(folder / "trimmed_vocabulary", small),
        prune_memory(folder / "prune_memory", small),
        teacher_step(folder / "teacher_step", small),
    ]


def main() -> None:
    benchmark(__doc__, parts)


if __name__ == "__main__":
    main()
