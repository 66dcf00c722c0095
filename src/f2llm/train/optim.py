"""All that moves weights: learning rate, clipping, AdamW with dense or row-wise steps, and averaged weights.

A batch touches a few hundred of the embedding table's rows, and the table is most of a small model. Dense AdamW
nevertheless moves every row in every step: untouched ones by what is left of their momentum, and by weight decay.
`RowAdamW` takes the table's gradient as a sparse tensor and moves the touched rows alone. What the others missed
is either dropped ("lazy") or made up for before a row is read again ("exact").

Exact means: the kernel that dense AdamW uses does the missed steps of a row, each with its learning rate and bias
correction and a gradient of zero, until momentum cannot move a weight by more than TAIL (see `steps_that_move`).
After that the row only decays, which is also done step by step in the table's dtype: rounding adds up, and in
float32 the product of a thousand decays can be 2e-5 away from where dense AdamW arrives.

Shape suffixes: V rows of the embedding table, E their width, R some of the rows, S steps.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder
from f2llm.recipe_train import TrainStage

BETA1, BETA2 = 0.9, 0.98
EPS = 1e-8
TABLE = "embed_tokens.weight"

TAIL = 1e-10  # of a weight's way; a row has to lose it 10,000 times to be off by 1e-6
SWEEP = 128  # steps in which every row is caught up at least once; momentum ends at a multiple of it
BLOCK = 1 << 16  # elements of a table that are replayed at once: four such arrays fit a core's cache


def learning_rate_at(config: TrainStage, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly to `learning_rate` in `warmup_steps`. Then it falls, and would reach `floor` of that one step
    after the last (linear, or half a cosine), or it stays (constant).
    """
    assert config.steps is not None  # whoever counts epochs has turned them into steps
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress_made = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress_made,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress_made)),
    }
    return config.learning_rate * (config.floor + (1.0 - config.floor) * decay[config.schedule])


def make_optimizer(
    decoder: Decoder, config: TrainStage, extra: Mapping[str, nn.Parameter] | None = None
) -> "Optimizer":
    """The optimizer of the decoder's trainable parameters, and of `extra` ones such as a temperature.

    Norms and extra parameters do not decay. Also sets whether the decoder's embedding gives sparse gradients.

    Raises:
        UsageError: `embedding_rows` does not go with averaged weights or with a sharded table.
    """
    by_rows = config.embedding_rows != "dense"
    if config.embedding_rows == "exact" and config.ema is not None:
        raise UsageError(
            "'ema' averages all weights after each step, but with 'embedding_rows: exact' most rows are brought up "
            "to date later; take 'dense' or 'lazy'."
        )
    if by_rows and is_sharded(decoder.embed_tokens.weight):
        raise UsageError(
            f"'embedding_rows' is {config.embedding_rows!r}, which needs the whole embedding table in one place, but "
            "on several ranks and in bf16 it is sharded; train in one process and fp32, or take 'dense'."
        )
    # Sparse gradients also save dense steps on a CPU the zeros of a whole table for each backward pass.
    decoder.embed_tokens.sparse = by_rows or _keeps_gradient(decoder.embed_tokens.weight)
    parameters = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    rows = RowAdamW(parameters.pop(TABLE), config) if by_rows else None
    norms = [p for name, p in parameters.items() if name.endswith("norm.weight")]
    others = [p for name, p in parameters.items() if not name.endswith("norm.weight")]
    extra = dict(extra or {})
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
        {"params": list(extra.values()), "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(BETA1, BETA2), eps=EPS, fused=True)
    return Optimizer(parameters | extra, adamw, rows)


class Optimizer:
    """AdamW of named parameters, and of the embedding table's rows if `rows` is given."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], adamw: torch.optim.AdamW, rows: "RowAdamW | None"
    ) -> None:
        self._parameters, self._adamw, self._rows = parameters, adamw, rows
        # As AdamW itself would at its first step: from the start there are tensors to read a checkpoint into.
        for p in parameters.values():
            adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.zero_grad()

    def set_learning_rate(self, learning_rate: float) -> None:
        """The learning rate of the steps from now on, at most the configured one."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate

    def prepare(self, ids: Tensor) -> None:
        """Bring the table's rows of the token ids (int64, any shape) up to date: call it before they are read."""
        if self._rows:
            self._rows.catch_up(ids.unique())

    def flush(self) -> None:
        """Bring all rows up to date: call it before the weights are used for anything but the next step."""
        if self._rows:
            self._rows.catch_up(torch.arange(len(self._rows.table_VE), device=self._rows.table_VE.device))

    def zero_grad(self) -> None:
        clear_gradients(self._parameters)
        if self._rows:
            self._rows.table_VE.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of `max_norm` over all of them together, if it is larger.

        Returns:
            float [], the norm before; a sharded gradient counts as a whole.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self._rows and self._rows.table_VE.grad is not None:
            gradients.insert(0, self._rows.coalesced_gradient().values())
        norm = nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
        if sharded := [g for g in gradients if is_sharded(g)]:
            norm = torch.hypot(nn.utils.get_total_norm(sharded).full_tensor(), norm)  # type: ignore[attr-defined]
        scale = max_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def step(self) -> None:
        """Move the weights that have a gradient."""
        self._adamw.step()
        if self._rows:
            self._rows.step(self._adamw.param_groups[0]["lr"])

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on beside weights and learning rate: live tensors by "parameter/what"."""
        parts = {name: self._adamw.state[p] for name, p in self._parameters.items()}
        if self._rows:
            parts[TABLE] = self._rows.state()
        return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave; an F2Error names the first tensor that is missing or unknown."""
        own = self.state()
        if odd := sorted(own.keys() ^ state.keys()):
            raise F2Error(
                f"the saved state of the optimizer {'lacks' if odd[0] in own else 'has an unknown'} {odd[0]!r}, so "
                "it is of another model or of other settings; go on with those, or start anew."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


def clear_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Forget gradients by parameters' names; what `_keeps_gradient` is zeros, to which a backward pass adds rows."""
    for name, p in parameters.items():
        if name == TABLE and _keeps_gradient(p):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        else:
            p.grad = None


def _keeps_gradient(table_VE: Tensor) -> bool:
    """Whether a dense table's gradient stays in its memory from step to step: fresh pages cost more than zeros."""
    return table_VE.device.type == "cpu" and not is_sharded(table_VE)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def steps_that_move(highest_rate: float) -> int:
    """After how many steps without a gradient all further ones together move a weight by TAIL at most.

    Step k, j steps after the last gradient, moves a weight by no more than

        rate * sqrt(1 - beta2^k) / (1 - beta1^k) * r^j * |m| / sqrt(v)    with r = beta1 / sqrt(beta2) = 0.909

    The second factor is at most 1.05 for k > 1, and |m| / sqrt(v) at most 1.70 whatever the gradients were: by the
    Cauchy-Schwarz inequality its square is at most (1 - beta1)^2 / (1 - beta2) / (1 - beta1^2 / beta2). The rest is
    the sum of a geometric series.
    """
    r = BETA1 / math.sqrt(BETA2)
    bias = math.sqrt(1 - BETA2**2) / (1 - BETA1**2)
    moments = (1 - BETA1) / math.sqrt((1 - BETA2) * (1 - r**2))
    return max(0, math.ceil(math.log(highest_rate * bias * moments / (1 - r) / TAIL) / -math.log(r)))


class RowAdamW:
    """AdamW of a table [V, E] that moves only rows with a gradient; bias correction counts all steps.

    `exact` rows make up for missed steps when `catch_up` asks for them. What becomes of a row does not depend on
    when that is, or on which rows come along. A slice of the table is caught up in each step, round and round, so
    that no row is ever more than SWEEP steps behind.
    """

    def __init__(self, table_VE: nn.Parameter, config: TrainStage) -> None:
        self.table_VE = table_VE
        self._exact = config.embedding_rows == "exact"
        self._weight_decay = config.weight_decay
        self._moves = steps_that_move(config.learning_rate)
        self._exp_avg_VE = torch.zeros_like(table_VE)
        self._exp_avg_sq_VE = torch.zeros_like(table_VE)
        self._done = torch.zeros((), dtype=torch.int64)
        if self._exact:
            self._done_V = torch.zeros(len(table_VE), dtype=torch.int64, device=table_VE.device)
            self._stop_V = torch.zeros_like(self._done_V)  # the last step with momentum
            self._rates_S = torch.zeros(SWEEP, dtype=torch.float64)  # of step k (from 1) at k % SWEEP

    def state(self) -> dict[str, Tensor]:
        state = {"step": self._done, "exp_avg": self._exp_avg_VE, "exp_avg_sq": self._exp_avg_sq_VE}
        if self._exact:
            state |= {"row_step": self._done_V, "row_stop": self._stop_V, "learning_rates": self._rates_S}
        return state

    def coalesced_gradient(self) -> Tensor:
        """The table's gradient, now with each row once: what several backward passes gave is added up."""
        assert self.table_VE.grad is not None
        self.table_VE.grad = self.table_VE.grad.coalesce()
        return self.table_VE.grad

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        if self.table_VE.grad is None:
            return
        gradient = self.coalesced_gradient()
        rows_R = gradient.indices()[0]
        self.catch_up(rows_R)
        w_RE, m_RE, v_RE = self._gather(rows_R)
        if self._exact:
            stopped_R1 = (self._done - self._stop_V[rows_R]).clamp(min=0)[:, None].to(w_RE.dtype)
            m_RE *= BETA1**stopped_R1
            v_RE *= BETA2**stopped_R1
        self._done += 1
        now = int(self._done)
        k = torch.tensor(float(now), device=w_RE.device)
        self._adamw(w_RE, gradient.values(), m_RE, v_RE, k, learning_rate)
        self._scatter(rows_R, w_RE, m_RE, v_RE)
        if self._exact:
            self._done_V[rows_R] = now
            self._stop_V[rows_R] = math.ceil((now + self._moves) / SWEEP) * SWEEP
            self._rates_S[now % SWEEP] = learning_rate
            slices = torch.arange(len(self.table_VE), device=w_RE.device).tensor_split(SWEEP)
            self.catch_up(slices[now % SWEEP])

    @torch.no_grad()
    def catch_up(self, rows_R: Tensor) -> None:
        """Make up for the steps that distinct rows (int64 [R]) have missed; nothing if rows are lazy."""
        if not self._exact:
            return
        now = int(self._done)
        stop_R = self._stop_V[rows_R].clamp(max=now)
        for stop in stop_R.unique().tolist():
            self._replay(rows_R[stop_R == stop], until=stop, momentum=True)
        self._replay(rows_R, until=now, momentum=False)

    def _replay(self, rows_R: Tensor, until: int, momentum: bool) -> None:
        """Make the missed steps of rows up to a step, with momentum and decay or with decay alone."""
        rows_R = rows_R[self._done_V[rows_R] < until]
        if not len(rows_R):
            return
        oldest_first_R = rows_R[self._done_V[rows_R].argsort(stable=True)]
        for rows_R in oldest_first_R.split(max(1, BLOCK // self.table_VE.shape[1])):
            done_R = self._done_V[rows_R]
            k_S = torch.arange(int(done_R[0]) + 1, until + 1, device=done_R.device)
            begun_S = torch.searchsorted(
                done_R, k_S
            ).tolist()  # step k is missing from this many rows, the first
            rates_S = self._rates_S[k_S.cpu() % SWEEP].tolist()
            if momentum:
                w_RE, m_RE, v_RE = self._gather(rows_R)
                zero_RE = torch.zeros_like(w_RE)
                for k, n, rate in zip(k_S.float(), begun_S, rates_S, strict=True):
                    self._adamw(w_RE[:n], zero_RE[:n], m_RE[:n], v_RE[:n], k, rate)
                self._scatter(rows_R, w_RE, m_RE, v_RE)
            else:
                w_RE = self.table_VE.index_select(0, rows_R)
                for n, rate in zip(begun_S, rates_S, strict=True):
                    w_RE[:n].mul_(1 - rate * self._weight_decay)
                self.table_VE.index_copy_(0, rows_R, w_RE)
            self._done_V[rows_R] = until

    def _gather(self, rows_R: Tensor) -> list[Tensor]:
        return [
            t_VE.index_select(0, rows_R) for t_VE in (self.table_VE, self._exp_avg_VE, self._exp_avg_sq_VE)
        ]

    def _scatter(self, rows_R: Tensor, w_RE: Tensor, m_RE: Tensor, v_RE: Tensor) -> None:
        self.table_VE.index_copy_(0, rows_R, w_RE)
        self._exp_avg_VE.index_copy_(0, rows_R, m_RE)
        self._exp_avg_sq_VE.index_copy_(0, rows_R, v_RE)

    def _adamw(
        self, w_RE: Tensor, gradient_RE: Tensor, m_RE: Tensor, v_RE: Tensor, k: Tensor, rate: float
    ) -> None:
        """Step k (float [], from 1) in place: what torch.optim.AdamW calls if fused, less what it does around."""
        torch._fused_adamw_(
            [w_RE], [gradient_RE], [m_RE], [v_RE], [], [k],
            lr=rate, beta1=BETA1, beta2=BETA2, weight_decay=self._weight_decay, eps=EPS,
            amsgrad=False, maximize=False,
        )  # fmt: skip


class Average:
    """Exponential moving average of a module's trainable weights, in their dtype (float32), begun at the first.

    After step t (from 0), average = d * average + (1 - d) * weights, with d = min(decay, (1 + t) / (10 + t)): the
    first weights, which nobody wants, are soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self._averages = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._averages.items():
            average.lerp_(self._weights[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module has the averaged weights; afterwards its own again, to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the averages."""
        for name, average in self._averages.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, live."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave."""
        for name, average in self._averages.items():
            average.copy_(state[name])
