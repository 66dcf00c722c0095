"""F2LLM-v2 as data: the eight sizes, how each was trained, and the two stages of training (arXiv 2603.19223, Table 1).

The paper leaves open whether Table 1's learning rate and epochs hold for both stages; recipes/family/ has them in both.
"""

import re
from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True)
class FamilyMember:
    """One size: a Qwen3 decoder without an output head, the embedding being the last layer's output at EOS."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    total_parameters: int
    embedding_parameters: int
    learning_rate: float
    epochs: int
    teacher: str | None = None  # the size it was distilled from
    pruned_from: str | None = None  # the size it was cut from; else it began as a Qwen3 language model
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151_936
    batch_size: int = 512

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained: a size that was cut from another begins with what that one learned in stage 1."""
        return ("stage2",) if self.pruned_from else ("stage1", "stage2")


@dataclass(frozen=True)
class TrainingStage:
    """One of the two stages of training, for every size alike (sections 3.1 and 3.3)."""

    rows: int  # in an epoch
    formats: tuple[str, ...]
    instructions: bool
    document_instruction_rate: float | None  # of symmetric sources; None without instructions
    cap: (
        int | None
    )  # most rows of a source; whether "source" means one of its languages, the paper leaves open


STAGES = {
    # The samples of its seven sources in Tables 8 and 9, added up; the text says about 27 million.
    "stage1": TrainingStage(26_693_280, ("retrieval",), False, None, None),
    # The authors' 18 million: more than 80,000 a source would give (9,128,938), less than 80,000 a source and language.
    "stage2": TrainingStage(18_000_000, ("retrieval", "clustering", "classification"), True, 0.3, 80_000),
}

FAMILY = {
    "80M": FamilyMember(
        320, 2048, 8, 16, 80_084_288, 48_619_520, 4e-5, 4, teacher="0.6B", pruned_from="0.6B"
    ),
    "160M": FamilyMember(
        640, 1536, 9, 16, 159_185_024, 97_239_040, 3e-5, 3, teacher="0.6B", pruned_from="0.6B"
    ),
    "330M": FamilyMember(
        896, 2560, 16, 16, 334_349_184, 136_134_656, 2e-5, 3, teacher="0.6B", pruned_from="0.6B"
    ),
    "0.6B": FamilyMember(1024, 3072, 28, 16, 596_049_920, 155_582_464, 1e-5, 2, teacher="1.7B"),
    "1.7B": FamilyMember(2048, 6144, 28, 16, 1_720_574_976, 311_164_928, 9e-6, 2, teacher="4B"),
    "4B": FamilyMember(2560, 9728, 36, 32, 4_022_468_096, 388_956_160, 7e-6, 2),
    "8B": FamilyMember(4096, 12_288, 36, 32, 7_568_405_504, 622_329_856, 6e-6, 2),
    "14B": FamilyMember(5120, 17_408, 40, 40, 13_990_394_880, 777_912_320, 5e-6, 2),
}


def parameter_count(
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab_size: int,
) -> int:
    """Parameters of a Qwen3 decoder with q/k norms, an input embedding and no output head (or a tied one)."""
    attention = 2 * hidden_size * head_dim * (heads + kv_heads)  # q and o, k and v
    mlp = 3 * hidden_size * intermediate_size  # gate, up, down
    norms = 2 * hidden_size + 2 * head_dim  # before attention and MLP; of queries and keys
    return vocab_size * hidden_size + layers * (attention + mlp + norms) + hidden_size  # the last norm


def size_in(path: str) -> str | None:
    """The size that a path speaks of: "0.6B" for models/Qwen3-0.6B/ and for runs/family/0.6B/stage1/."""
    for part in reversed(PurePath(path).parts):
        for size in FAMILY:
            if re.search(rf"(^|[-_]){re.escape(size)}(@|$)", part):  # @: a revision on the hub
                return size
    return None
