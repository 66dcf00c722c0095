"""What training a decoder costs, by formulas of its shape: floating-point operations, and bytes on each GPU.

Work is counted in products of matrices and attention; norms, rotary embedding, SwiGLU, the objective and the optimizer
are far below a percent of that. Bytes are what the trainer keeps, item by item: what FSDP2 puts on each rank
(train/ranks.py), what autograd saves of the decoder on a GPU, and what the vectors of a batch need.

Names of widths in formulas: E hidden, I intermediate, H query heads, G key/value heads, D head, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from f2llm.model.decoder import DecoderConfig
from f2llm.recipe_train import Lora, TrainStage
from f2llm.train.memory import FP32, sums_each
from f2llm.train.objective import SCORES_AT_ONCE, matryoshka_sizes

GIB = 1 << 30

# --- GPUs


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    memory_gib: float  # what the driver reports, somewhat less than the name says
    tflops_bf16: float  # peak of dense matrix products with float32 accumulation (vendors' data sheets)
    tflops_fp32: float
    dollars_per_hour: float  # assumed, see PRICES_OF


# Renting one GPU on demand costs about this; offers differ by more than a factor of two, so state your own.
PRICES_OF = "2026-11-23"
GPUS = {
    "h100": Gpu(79.6, 989, 67, 2.50),  # SXM
    "h200": Gpu(140.4, 989, 67, 3.50),
    "b200": Gpu(179.1, 2250, 75, 5.00),
    "a100-80gb": Gpu(80.0, 312, 19.5, 1.60),
    "a100-40gb": Gpu(40.0, 312, 19.5, 1.20),
    "l40s": Gpu(45.0, 362, 91.6, 0.90),
    "rtx4090": Gpu(24.0, 165, 82.6, 0.40),
}


# --- Work


@dataclass(frozen=True)
class Load:
    """What a decoder is given: texts, their tokens, and the pairs of a token and one that it attends to.

    A sum of loads is that of the texts together; a multiple may be a fraction, as for a mean.
    """

    texts: float
    tokens: float
    pairs: float

    @staticmethod
    def of(lengths: Sequence[int]) -> "Load":
        """Texts of these numbers of tokens. A token attends to itself and to those before it: L (L + 1) / 2 pairs."""
        return Load(len(lengths), sum(lengths), sum(length * (length + 1) // 2 for length in lengths))

    def __add__(self, other: "Load") -> "Load":
        return Load(self.texts + other.texts, self.tokens + other.tokens, self.pairs + other.pairs)

    def __mul__(self, factor: float) -> "Load":
        return Load(self.texts * factor, self.tokens * factor, self.pairs * factor)


def forward_flops(config: DecoderConfig, load: Load) -> tuple[float, float]:
    """Operations of a forward pass, two for each multiply-add: of the linear layers, and of attention.

    In the last layer all tokens go through the key and value projections, but only the final token of each text
    through the rest, and it attends to the text's every token. Tools that ignore the causal mask count L² pairs of a
    text where a GPU's kernel computes about L (L + 1) / 2: give them as `load.pairs` to compare.
    """
    q_or_o = config.hidden_size * config.num_attention_heads * config.head_dim
    k_and_v = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    mlp = 3 * config.hidden_size * config.intermediate_size
    whole_layers = config.num_hidden_layers - 1
    linear = load.tokens * (whole_layers * (2 * q_or_o + k_and_v + mlp) + k_and_v)
    linear += load.texts * (2 * q_or_o + mlp)
    # A score and a share of a value for each pair.
    attention = 2 * config.num_attention_heads * config.head_dim * (whole_layers * load.pairs + load.tokens)
    return 2 * linear, 2 * attention


def training_flops(
    config: DecoderConfig,
    load: Load,
    *,
    again: float = 0.0,
    recompute: bool = False,
    lora: Lora | None = None,
) -> float:
    """Operations of a forward and a backward pass, and of what is computed a second time.

    The backward pass of a linear layer has two products of the forward's size: the gradients of its input and of its
    weight. That of attention has five where the forward has two, since scores are computed again and not kept (Dao et
    al. 2022, arXiv 2205.14135, algorithm 4). With LoRA the weights have no gradient, but adapters have all three
    products (counted for every token of every layer).

    Args:
        again: share of the load that goes through the decoder once more, before its pass with a graph.
        recompute: activation checkpointing, which computes each layer again up to its down projection, whose result
            nothing needs.
    """
    linear, attention = forward_flops(config, load)
    whole_layers = config.num_hidden_layers - 1
    down = 2 * config.hidden_size * config.intermediate_size * (whole_layers * load.tokens + load.texts)
    forwards = 1 + again + recompute
    flops = linear * (forwards + 2) + attention * (forwards + 2.5) - down * recompute
    if lora is None:
        return flops
    return flops - linear + 2 * lora_parameters(config, lora.rank) * load.tokens * (forwards + 2)


def lora_parameters(config: DecoderConfig, rank: int) -> int:
    """Parameters of adapters on all linear layers, each with two matrices, rank x inputs and outputs x rank."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    return rank * config.num_hidden_layers * (2 * (hidden + q) + 2 * (hidden + k) + 3 * (hidden + mlp))


# --- Memory


@dataclass(frozen=True)
class Sharded:
    """A decoder's parameters as FSDP2 spreads them over ranks; numbers of elements."""

    total: int
    local: int  # on rank 0, which has the most where they do not divide evenly
    trained: int
    trained_local: int
    largest_layer: int
    table: int  # the rest: embedding table and last norm, which travel together


def saved_bytes(config: DecoderConfig, load: Load, width: int, recompute: bool) -> tuple[float, float]:
    """What autograd saves on a GPU for a backward pass, and what that pass then holds at once beside it, in bytes.

    `width` is the bytes of a number in the computation. A token of a whole layer leaves

    - 4 E: the residual stream before each of two norms (with 1 / rms in float32), and what each norm gives;
    - 3 H D: queries before their norm (1 / rms a head), as they enter attention, and its output (with a sum a head);
    - 3 G D: keys before their norm (1 / rms a head), keys and values as they enter attention;
    - 4 I: gate and up projections, silu of the gate, and the product that enters the down projection.

    The last layer has keys and values of all tokens, the rest of final tokens only. With `recompute` (activation
    checkpointing) each layer leaves the stream alone, and one layer at a time is computed again.
    """
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, groups, layers = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.num_hidden_layers,
    )
    q, k = heads * config.head_dim, groups * config.head_dim
    keys_and_values = width * (2 * hidden + 3 * k) + FP32 * (1 + groups)
    others = width * (2 * hidden + 3 * q + 4 * mlp) + FP32 * (1 + 2 * heads)
    last_layer = load.tokens * keys_and_values + load.texts * others
    layer = load.tokens * (keys_and_values + others)
    ids_and_rope = load.tokens * (8 + 2 * width * config.head_dim)
    saved = ids_and_rope + (layers - 1) * layer + last_layer
    backward = load.tokens * width * (4 * mlp + 2 * hidden)  # gradients of one MLP and of the stream
    if recompute:
        saved = ids_and_rope + layers * load.tokens * width * hidden
        backward += layer
    return saved, backward


def memory_per_gpu(
    config: DecoderConfig,
    stage: TrainStage,
    placed: Sharded,
    *,
    ranks: int,
    batch: Load,
    budget: int,
    teacher: Sharded | None,
    gpu: Gpu,
) -> dict[str, float]:
    """Bytes that one GPU must hold at the worst moment of a step, by what they are for.

    Args:
        placed: the decoder as it is sharded.
        batch: the mean batch, of all ranks.
        budget: most tokens of a micro-batch on a rank.
        teacher: the teacher, sharded in the same way, or None.
    """
    width = FP32 if stage.precision == "fp32" else 2
    # A micro-batch has at most `budget` tokens, one of which may be the longest text's.
    micro_batch = batch * (max(budget, stage.max_length) / batch.tokens)
    saved, backward = saved_bytes(config, micro_batch, width, stage.activation_checkpointing)
    items: dict[str, float] = {
        "weights (float32)": FP32 * placed.local,
        "gradients (float32)": FP32 * placed.trained_local,
        "AdamW's two moments (float32)": 2 * FP32 * placed.trained_local,
        "moving average (float32)": FP32 * placed.trained_local if stage.ema else 0,
    }
    if ranks > 1 or stage.precision != "fp32":
        # While a step has more than one micro-batch, a rank keeps weights as gathered, and adds up whole gradients in
        # float32 until the last one, if there is room for that.
        several = budget < most_tokens(stage, batch, ranks)
        whole = several and not sums_each(placed.total, placed.trained, width, gpu.memory_gib * GIB)
        if whole:
            items["gradients (float32)"] = FP32 * placed.trained
        group = max(placed.largest_layer, placed.table) if placed.trained == placed.total else 0
        gathered = placed.total if whole else 2 * placed.largest_layer + placed.table
        items[f"gathered weights ({'all' if whole else 'two layers and the table'})"] = width * gathered
        items["gradients on their way to other ranks"] = (width + FP32) * group
    items["saved activations"] = saved
    items["backward pass of one layer"] = backward
    items["vectors and scores"] = objective_bytes(config.hidden_size, stage, batch.texts)
    if teacher:
        items["teacher (weights and two gathered layers)"] = FP32 * teacher.local + width * (
            2 * teacher.largest_layer + teacher.table
        )
    items["CUDA, NCCL and what fragments (2 GiB and 5%)"] = (2 + 0.05 * gpu.memory_gib) * GIB
    return {name: size for name, size in items.items() if size}


def most_tokens(stage: TrainStage, batch: Load, ranks: int) -> float:
    """Tokens that a rank's share of a batch has if every text is as long as can be."""
    return batch.texts * stage.max_length / ranks


def objective_bytes(hidden_size: int, stage: TrainStage, texts: float) -> float:
    """Vectors of all texts of a batch, which every rank has, and what the objective makes of them.

    The raw vectors and their gradient; for each Matryoshka prefix unit vectors, as the objective picks them and as
    their gradients; blocks of scores; and a mask of which documents leave which query's denominator.
    """
    sizes = matryoshka_sizes(hidden_size) if stage.matryoshka else [hidden_size]
    vectors = texts * FP32 * (2 * hidden_size + 2 * sum(sizes))
    return vectors + 3 * FP32 * SCORES_AT_ONCE + stage.batch_size * texts


def budgets(stage: TrainStage, batch: Load, ranks: int) -> list[int]:
    """Powers of two that a micro-batch's budget of tokens may be, largest first; the recipe's own, if it has one."""
    if stage.tokens_per_microbatch:
        return [stage.tokens_per_microbatch]
    least = math.ceil(math.log2(stage.max_length))
    most = max(least, math.ceil(math.log2(most_tokens(stage, batch, ranks))))
    return [1 << power for power in range(most, least - 1, -1)]
