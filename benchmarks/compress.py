"""Smaller models: quality kept, int8, a trimmed vocabulary, memory of pruning a large model, a teacher from its cache.

What is measured, and how, is told in family_quality.py, int8.py, trimmed_vocabulary.py,
prune_memory.py and teacher_step.py.
"""

from pathlib import Path

from family_quality import family_quality
from harness import Part, benchmark
from int8 import int8
from prune_memory import prune_memory
from teacher_step import teacher_step
from trimmed_vocabulary import trimmed_vocabulary


def parts(folder: Path, small: bool) -> list[Part]:
    return [
        family_quality(folder / "family_quality", small),
        int8(folder / "int8", small),
        trimmed_vocabulary(folder / "trimmed_vocabulary", small),
        prune_memory(folder / "prune_memory", small),
        teacher_step(folder / "teacher_step", small),
    ]


def main() -> None:
    benchmark(__doc__, parts)


if __name__ == "__main__":
    main()
