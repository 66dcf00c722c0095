"""The step of benchmarks/train.py on a GPU: the 0.6B shape in bf16, against one padded batch through transformers.

Ours computes in bf16 with weights in float32; the peer's weights are bf16 too, which is faster. The peer runs at the
fastest of the attentions that it has here, with a mask and without.
"""

from pathlib import Path

import torch

from f2llm.plan.cost import GPUS, Load, training_flops
from harness import Figure, Part, PeerMissing, Row, measured, skipped, take_turns, worker
from inputs import family_size
from train_step import compare, make_batch

QUERIES = 8

ARITHMETIC = Row("TFLOP/s of the step on a GPU, peer its peak in bf16", bar=0.45)
SPEED = Row("tokens/s on a GPU, peer padded to the longest", bar=2)


def step_on_gpu(folder: Path) -> Part:
    """The figures of one batch, or `skipped: no GPU`."""
    if not torch.cuda.is_available():
        return Part([skipped(row, "no GPU") for row in (ARITHMETIC, SPEED)], {}, {})
    size = family_size("0.6B")
    inputs, lengths = make_batch(folder, size, QUERIES)
    arguments = (folder / "model", folder / "ids.json", QUERIES, "cuda")
    with worker("train_ours", *arguments) as ours:
        workers = {"ours, GPU": ours.facts}
        seconds = take_turns({"ours": lambda: ours.call("step")["seconds"]})["ours"]
        figures = [share_of_peak(training_flops(size.decoder, Load.of(lengths)) / seconds)]
        try:
            with worker("train_transformers", *arguments, peer=True) as peer:
                attentions = peer.call("attentions")
                options = [{"attention": name, "mask": mask} for name in attentions for mask in (True, False)]
                comparison = compare(ours, peer, options, {})
                workers["transformers, GPU"] = {**peer.facts, **comparison.options}
            figures.append(measured(SPEED, *comparison.tokens_per_second(sum(lengths))))
        except PeerMissing as missing:
            figures.append(skipped(SPEED, str(missing)))
    return Part(figures, {"gpu": {"name": torch.cuda.get_device_name(), **inputs}}, workers)


def share_of_peak(flops_per_second: float) -> Figure:
    """Beside the peak of the GPU model whose name is in that of the device."""
    name = torch.cuda.get_device_name()
    known = [gpu for kind, gpu in GPUS.items() if kind.split("-")[0] in name.lower().replace(" ", "")]
    if not known:
        return skipped(ARITHMETIC, f"no peak known for {name}")
    return measured(ARITHMETIC, flops_per_second / 1e12, known[0].tflops_bf16)
