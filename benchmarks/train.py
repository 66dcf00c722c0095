"""A training step, ours and ragged, against the same work through transformers and sentence-transformers.

Same weights, same texts (queries, their positives and seven hard negatives each, drawn from the length mix of the
development data), same objective; forward, objective and backward, no optimizer step on either side. Tokens are real
ones. Ours takes the batch as a whole. transformers takes it as one batch padded to the longest, as the reference code
does, and in length-sorted micro-batches whose graphs are kept, at the best of several budgets. sentence-transformers'
trainer takes it with cached gradients, at its best mini-batch, ours then with the joint objective, which is the
trainer's. Each peer runs as it is and with our memory policy.

Then our own figures: multiply-adds per second of the step, beside the best of `torch.mm` alone (counted are those that
it cannot do without: masked scores are not, for example), and a batch of 8,192 pairs of short texts beside batches of
512, all in micro-batches of 512 tokens. Where there is a GPU, the 0.6B shape in bf16 as well.
"""

from pathlib import Path

from harness import Part, benchmark
from inputs import FULL, SMALL
from train_gpu import step_on_gpu
from train_pairs import PAIRS, large_batch
from train_step import step_on_cpu


def parts(folder: Path, small: bool) -> list[Part]:
    return [
        step_on_cpu(folder / "step", SMALL if small else FULL, queries=3 if small else 6),
        large_batch(
            folder / "pairs",
            SMALL if small else PAIRS,
            pairs=64 if small else 8192,
            tokens_per_microbatch=32 if small else 512,
        ),
        step_on_gpu(folder / "gpu"),
    ]


def main() -> None:
    benchmark(__doc__, parts)


if __name__ == "__main__":
    main()
