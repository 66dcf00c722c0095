"""What units, heads and layers of a model matter on calibration texts, with one layer's weights in memory at a time.

Batches of texts go through a layer together before the next one is read; between layers their hidden states lie in a
file without a name, which is gone when the process is, however it ends. Two scores:

- activation (arXiv 2603.19223, section 3.3): the L2 norm of a unit's activations over all tokens;
- Taylor (Molchanov et al. 2017, 2019): the sum over tokens of |activation * gradient|, which is how much a loss would
  change, to first order, if the unit were zero. The backward pass goes layer by layer as well, and each layer's forward
  pass is done again for it.

Both are taken where a unit is read: hidden units behind the norms in front of attention and MLP, MLP units in front
of the down projection, heads in front of the output projection. In the last layer only final tokens go on, so MLP and
heads see these alone.

Shape suffixes: T tokens of a batch, N sequences (of a batch, or all), U distinct tokens, E hidden width, I MLP width,
A query heads times their width, G key/value heads.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from f2llm.errors import F2Error
from f2llm.model.batches import token_batches
from f2llm.model.decoder import DecoderConfig, Layer, rope_tables
from f2llm.model.fused import rms_norm
from f2llm.model.layout import Layout, make_layout
from f2llm.model.tensor_files import TensorFiles
from f2llm.progress import Bar, progress

Score = Literal["activation", "taylor"]
Loss = Callable[[Tensor], Tensor]

TOKENS_AT_ONCE = 2048  # of a batch, whose activations in a layer then take less memory than its weights
NORMS = ("input_layernorm", "post_attention_layernorm")
MLP_UNITS, HEADS = "mlp.down_proj", "self_attn.o_proj"
BYTES = 4  # of a float32


@dataclass(frozen=True)
class Scores:
    """How much each part of a model matters, in float64; only numbers of one kind can be compared."""

    hidden_E: Tensor
    mlp: list[Tensor]  # [I] of each layer
    groups: list[Tensor]  # [G] of each layer: a key/value head with its query heads
    change: Tensor  # of each layer: 1 - mean cosine between a token before and after it


def activation_scores(
    weights: TensorFiles, config: DecoderConfig, sequences: Sequence[Sequence[int]], folder: Path
) -> Scores:
    """Scores by activation norm over all tokens of `sequences`.

    Args:
        sequences: token ids of each text, EOS last; a batch has TOKENS_AT_ONCE, or one longer text.
        folder: where there is room for the hidden states: 4 bytes times tokens times width.
    """
    batches = _batches(sequences)
    total = _Total(config)

    def note(number: int, seen: dict[str, Tensor]) -> None:
        total.add(number, {name: value.square() for name, value in seen.items()})

    with (
        torch.no_grad(),
        _states(folder, batches, config, kept=1) as states,
        progress(total=config.num_hidden_layers, what="measure activations", unit="layer") as bar,
    ):
        change = _forward(_OneLayer(weights, config), batches, states, note, bar)
    return Scores(
        total.hidden_E.sqrt(), [t.sqrt() for t in total.mlp], [t.sqrt() for t in total.groups], change
    )


def taylor_scores(
    weights: TensorFiles,
    config: DecoderConfig,
    sequences: Sequence[Sequence[int]],
    loss_of: Loss,
    folder: Path,
) -> Scores:
    """Scores by what the loss would change; of hidden units, behind the final norm too.

    Args:
        sequences: token ids of each text, EOS last.
        loss_of: a loss of the raw vectors [N, E] of all sequences, in their order.
        folder: where there is room for the hidden states of all layers: 4 bytes times tokens times width times
            layers + 1.
    """
    batches = _batches(sequences)
    total = _Total(config)
    layers = config.num_hidden_layers
    one = _OneLayer(weights, config)
    with (
        _states(folder, batches, config, kept=layers + 1) as states,
        progress(total=2 * layers, what="measure gradients", unit="layer") as bar,
    ):
        with torch.no_grad():
            change = _forward(one, batches, states, lambda _number, _seen: None, bar)
        _backward_head(weights, config, batches, states, loss_of, total)
        for number in reversed(range(layers)):
            one.load(number)
            for place, batch in enumerate(batches):
                x_TE = states.read(number, place).requires_grad_()
                out, seen = one.run(x_TE, batch)
                for value in seen.values():
                    value.retain_grad()
                out.backward(states.read(number + 1, place))
                total.add(number, {name: (value * _grad(value)).abs() for name, value in seen.items()})
                states.write(number, place, _grad(x_TE))
                bar.advance(1 / len(batches))
    return Scores(total.hidden_E, total.mlp, total.groups, change)


# --- A layer


@dataclass(frozen=True)
class _Batch:
    ids_T: Tensor  # in the layout's order, as all states
    layout: Layout
    number_N: Tensor  # of each sequence among all, in the layout's order


def _batches(sequences: Sequence[Sequence[int]]) -> list[_Batch]:
    found = []
    for numbers in token_batches([len(ids) for ids in sequences], TOKENS_AT_ONCE):
        layout = make_layout([len(sequences[i]) for i in numbers], torch.device("cpu"))
        ids_T = torch.tensor(list(chain.from_iterable(sequences[i] for i in numbers)))
        order_N = torch.argsort(layout.restore_N)
        found.append(_Batch(ids_T[layout.token_order_T], layout, torch.tensor(numbers)[order_N]))
    return found


class _OneLayer:
    """Room for the weights of one layer, into which any of a model's layers is read."""

    def __init__(self, weights: TensorFiles, config: DecoderConfig) -> None:
        self.weights, self.config = weights, config
        with torch.device("meta"):
            layer = Layer(config)
        self._layer = layer.to_empty(device="cpu").requires_grad_(False)
        self._seen: dict[str, Tensor] = {}
        self._is_last = False
        for name in (*NORMS, MLP_UNITS, HEADS):
            self._layer.get_submodule(name).register_forward_hook(self._note(name))

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def note(_module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            self._seen[name] = out if name in NORMS else given[0]

        return note

    def load(self, number: int) -> None:
        for name, parameter in self._layer.named_parameters():
            parameter.copy_(self.weights.read(f"layers.{number}.{name}"))
        self._is_last = number == self.config.num_hidden_layers - 1

    def run(self, x_TE: Tensor, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output ([N, E] of the last layer), and what was seen at NORMS, MLP_UNITS and HEADS."""
        rope = rope_tables(self.config, batch.layout.positions_T, x_TE.dtype)
        out: Tensor = self._layer(x_TE, batch.layout, rope, self._is_last)
        seen, self._seen = self._seen, {}
        return out, seen


def _forward(
    one: _OneLayer,
    batches: Sequence[_Batch],
    states: "_States",
    note: Callable[[int, dict[str, Tensor]], None],
    bar: Bar,
) -> Tensor:
    """All batches through all layers; what layer n reads is left in states n, if so many are kept.

    Returns:
        The change of each layer, float64.
    """
    for place, batch in enumerate(batches):
        ids_U, which_T = batch.ids_T.unique(return_inverse=True)
        table_UE = one.weights.read_rows("embed_tokens.weight", ids_U.tolist())
        states.write(0, place, table_UE[which_T])
    layers = one.config.num_hidden_layers
    cosine = torch.zeros(layers, dtype=torch.float64)
    tokens = torch.zeros(layers, dtype=torch.float64)
    for number in range(layers):
        one.load(number)
        for place, batch in enumerate(batches):
            x_TE = states.read(number, place)
            out, seen = one.run(x_TE, batch)
            before = x_TE[batch.layout.last_N] if len(out) < len(x_TE) else x_TE
            cosine[number] += F.cosine_similarity(before, out, dim=-1).double().sum()
            tokens[number] += len(out)
            note(number, seen)
            states.write(number + 1, place, out)
            bar.advance(1 / len(batches))
    return 1 - cosine / tokens


def _backward_head(
    weights: TensorFiles,
    config: DecoderConfig,
    batches: Sequence[_Batch],
    states: "_States",
    loss_of: Loss,
    total: "_Total",
) -> None:
    """The loss of all vectors, and its gradient at the last layer's output in place of that output."""
    layers = config.num_hidden_layers
    number_N = torch.cat([batch.number_N for batch in batches])
    x_NE = torch.cat([states.read(layers, place) for place in range(len(batches))])
    x_NE.requires_grad_()
    vectors_NE = rms_norm(x_NE, weights.read("norm.weight"), config.rms_norm_eps)
    vectors_NE.retain_grad()
    loss_of(vectors_NE[torch.argsort(number_N)]).backward()
    total.hidden_E += (vectors_NE * _grad(vectors_NE)).detach().abs().sum(0)
    for place, grad in enumerate(_grad(x_NE).split([len(batch.number_N) for batch in batches])):
        states.write(layers, place, grad)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None  # a backward pass has just gone through it
    return tensor.grad


@dataclass
class _Total:
    """Sums over tokens, in float64."""

    config: DecoderConfig
    hidden_E: Tensor = field(init=False)
    mlp: list[Tensor] = field(init=False)
    groups: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def zeros(width: int) -> Tensor:
            return torch.zeros(width, dtype=torch.float64)

        layers = range(self.config.num_hidden_layers)
        self.hidden_E = zeros(self.config.hidden_size)
        self.mlp = [zeros(self.config.intermediate_size) for _ in layers]
        self.groups = [zeros(self.config.num_key_value_heads) for _ in layers]

    def add(self, number: int, values: dict[str, Tensor]) -> None:
        """Add what a batch showed in layer `number`: [T, E] or [N, E] behind norms, [.., I] and [.., A]."""
        with torch.no_grad():
            for name in NORMS:
                self.hidden_E += values[name].sum(0)
            self.mlp[number] += values[MLP_UNITS].sum(0)
            self.groups[number] += values[HEADS].sum(0).unflatten(0, (len(self.groups[number]), -1)).sum(1)


# --- States on disk


class _States:
    """Hidden states of batches between layers, in a file: `kept` layers' inputs, which later layers' write over."""

    def __init__(self, file: IO[bytes], rows: Sequence[int], width: int, kept: int) -> None:
        self._file, self._width, self._kept = file, width, kept
        *self._first, self._all = accumulate(rows, initial=0)
        self._rows: dict[tuple[int, int], int] = {}

    def _seek(self, layer: int, place: int) -> None:
        row = (layer % self._kept) * self._all + self._first[place]
        self._file.seek(row * self._width * BYTES)

    def write(self, layer: int, place: int, x: Tensor) -> None:
        """Keep the rows [.., E] of a batch."""
        self._seek(layer, place)
        self._file.write(x.detach().contiguous().numpy().data)
        self._rows[layer % self._kept, place] = len(x)

    def read(self, layer: int, place: int) -> Tensor:
        x = torch.empty(self._rows[layer % self._kept, place], self._width)
        self._seek(layer, place)
        view: Any = x.numpy().data.cast("B")
        if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise F2Error("a temporary file of hidden states became shorter; start again.")
        return x


@contextmanager
def _states(folder: Path, batches: Sequence[_Batch], config: DecoderConfig, kept: int) -> Iterator[_States]:
    rows = [len(batch.ids_T) for batch in batches]
    needed = sum(rows) * config.hidden_size * BYTES * kept
    if needed > (free := shutil.disk_usage(folder).free):
        raise F2Error(
            f"hidden states of {sum(rows):,} tokens take {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} GB "
            "are free; free some space, or take fewer calibration texts."
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        yield _States(file, rows, config.hidden_size, kept)
