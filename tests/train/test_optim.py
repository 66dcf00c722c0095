"""What moves weights: schedule, clipping, dense and row-wise AdamW, averages, each against a naive reference.

Gradients are drawn at random and do not depend on the weights, so that two optimizers see the same ones.

Shape suffixes: V rows of the embedding table, E their width, T tokens.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import pytest
import torch
from tests.train.gloo import on_ranks
from torch import Tensor, nn

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.recipe_train import TrainStage
from f2llm.train.optim import Average, Optimizer, learning_rate_at, make_optimizer, steps_that_move
from f2llm.train.ranks import Ranks, shard

Settings = Callable[..., TrainStage]
Rows = Literal["dense", "exact", "lazy"]
ROWS: tuple[Rows, ...] = get_args(Rows)
V, E = 50, 16
TABLE = "embed_tokens.weight"
ONCE, OFTEN, NEVER = range(10), range(10, 40), range(40, 50)  # how often rows of the table are touched


def make_decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(DecoderConfig(V, E, 24, 2, 4, 2, 8)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return decoder


def ids_of(step: int) -> Tensor:
    """Token ids of a step: some rows come often, some in step 2 and never again, some never."""
    often_T = torch.randint(OFTEN.start, OFTEN.stop, (12,), generator=torch.Generator().manual_seed(step))
    return torch.cat((often_T, torch.tensor(ONCE))) if step == 2 else often_T


def noise_like(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def backward_table(decoder: Decoder, step: int, ids_T: Tensor, size: float = 1.0) -> None:
    """Add random gradients to rows of the table, from two passes that have ids in common."""
    for seed, part_T in enumerate((ids_T[:7], ids_T[4:]), start=10 * step):
        x_TE = decoder.embed_tokens(part_T)
        x_TE.backward(size * noise_like(x_TE, seed))


def backward(decoder: Decoder, step: int, ids_T: Tensor) -> None:
    """Add random gradients to all parameters."""
    backward_table(decoder, step, ids_T)
    for name, parameter in decoder.named_parameters():
        if name != TABLE:
            parameter.backward(noise_like(parameter, step))


def rate_of(step: int) -> float:
    """Learning rates that go up and down."""
    return 1e-3 * (0.2 + 0.8 * math.sin(0.3 * step) ** 2)


def run(decoder: Decoder, optimizer: Optimizer, steps: range, prepare: bool = True) -> None:
    for step in steps:
        ids_T = ids_of(step)
        optimizer.set_learning_rate(rate_of(step))
        optimizer.zero_grad()
        if prepare:
            optimizer.prepare(ids_T)
        backward(decoder, step, ids_T)
        optimizer.clip(1.0)
        optimizer.step()


def weights(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((tensor - b[name]).abs().max().item() for name, tensor in a.items())


class Reference:
    """Dense AdamW as torch has it, in its plainest form."""

    def __init__(self, decoder: Decoder, weight_decay: float) -> None:
        self.decoder = copy.deepcopy(decoder)
        self.decoder.embed_tokens.sparse = False
        norms = [p for name, p in self.decoder.named_parameters() if p.dim() == 1]
        others = [p for name, p in self.decoder.named_parameters() if p.dim() == 2]
        self.adamw = torch.optim.AdamW(
            [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            foreach=False,
        )

    def step(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad()


# --- Learning rate


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_and_falls_to_its_floor(
    settings: Settings, schedule: str, floor: float
) -> None:
    config = settings(steps=12, warmup_steps=4, learning_rate=0.2, schedule=schedule, floor=floor)
    rates = [learning_rate_at(config, step) for step in range(12)]
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    eighths = {
        "constant": [1.0] * 8,
        "linear": [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
        "cosine": [1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060],
    }
    span = 0.2 * (1 - floor)
    assert rates[4:] == pytest.approx([0.2 * floor + span * share for share in eighths[schedule]], abs=1e-6)


def test_the_learning_rate_without_warmup_and_with_nothing_else(settings: Settings) -> None:
    assert learning_rate_at(settings(warmup_steps=0, learning_rate=0.2), 0) == pytest.approx(0.2)
    only_warmup = settings(steps=4, warmup_steps=4, learning_rate=0.2, floor=0.5)
    assert [learning_rate_at(only_warmup, step) for step in range(4)] == pytest.approx([0.05, 0.1, 0.15, 0.2])


# --- Which weights move, and how


@pytest.mark.parametrize("rows", ROWS)
def test_weights_decay_but_norms_and_extra_ones_do_not_and_frozen_ones_stay(
    settings: Settings, rows: Rows
) -> None:
    decoder = make_decoder()
    frozen = "layers.0.mlp.up_proj.weight"
    decoder.get_parameter(frozen).requires_grad_(False)
    extra = nn.Parameter(torch.tensor(-3.0))
    config = settings(learning_rate=0.5, weight_decay=0.3, embedding_rows=rows)
    optimizer = make_optimizer(decoder, config, {"log_temperature": extra})
    before = weights(decoder)
    loss = decoder.embed_tokens(torch.arange(V)).sum() + extra
    loss = loss + sum(p.sum() for name, p in decoder.named_parameters() if name not in (TABLE, frozen))
    (0 * loss).backward()
    optimizer.step()
    optimizer.flush()
    for name, weight in weights(decoder).items():
        factor = 1.0 if weight.dim() == 1 or name == frozen else 1 - 0.5 * 0.3
        torch.testing.assert_close(weight, factor * before[name], rtol=1e-6, atol=0)
    assert extra.item() == -3


def test_a_dense_tables_gradient_is_that_of_this_step_alone(settings: Settings) -> None:
    decoder, plain = make_decoder(), make_decoder()
    plain.load_state_dict(decoder.state_dict())
    optimizer = make_optimizer(decoder, settings(embedding_rows="dense"))
    kept_VE = decoder.embed_tokens.weight.grad
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        for ids_T in ids_of(step).split(4):  # micro-batches
            backward_table(decoder, step, ids_T)
            backward_table(plain, step, ids_T)
        assert decoder.embed_tokens.weight.grad is kept_VE and kept_VE is not None
        assert plain.embed_tokens.weight.grad is not None and not plain.embed_tokens.weight.grad.is_sparse
        torch.testing.assert_close(kept_VE, plain.embed_tokens.weight.grad, rtol=1e-6, atol=1e-7)


def test_extra_parameters_learn(settings: Settings) -> None:
    extra = nn.Parameter(torch.tensor(1.0))
    optimizer = make_optimizer(make_decoder(), settings(learning_rate=0.25), {"log_temperature": extra})
    (7 * extra).backward()
    optimizer.step()
    assert extra.item() == pytest.approx(
        0.75
    )  # AdamW's first step is the learning rate, whatever the gradient
    optimizer.zero_grad()
    assert extra.grad is None


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(settings: Settings, rows: Rows, max_norm: float) -> None:
    decoder, reference = make_decoder(), make_decoder()
    optimizer = make_optimizer(decoder, settings(embedding_rows=rows))
    for each in (decoder, reference):
        backward(each, 0, ids_of(0))
    norm = optimizer.clip(max_norm)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in decoder.named_parameters():
        gradient, wanted = parameter.grad, reference.get_parameter(name).grad
        assert gradient is not None and gradient.is_sparse == (rows != "dense" and name == TABLE)
        torch.testing.assert_close(gradient.to_dense(), wanted, rtol=1e-6, atol=0)


# --- Rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_exact_rows_are_dense_adamw(settings: Settings, dtype: torch.dtype, tolerance: float) -> None:
    decoder = make_decoder(dtype)
    reference = Reference(decoder, weight_decay=0.1)
    before = weights(decoder)[TABLE]
    optimizer = make_optimizer(
        decoder, settings(embedding_rows="exact", learning_rate=1e-3, weight_decay=0.1)
    )
    table_VE, dense_VE = decoder.embed_tokens.weight, reference.decoder.embed_tokens.weight
    lagged = 0.0
    for step in range(30):
        ids_T = ids_of(step)
        lagged = max(lagged, (table_VE - dense_VE).abs().max().item())
        optimizer.prepare(ids_T)
        assert (table_VE - dense_VE)[ids_T].abs().max() <= tolerance
        run(decoder, optimizer, range(step, step + 1))
        backward(reference.decoder, step, ids_T)
        reference.step(rate_of(step))
    assert lagged > 100 * tolerance  # rows that nobody reads are left behind
    optimizer.flush()
    assert distance(weights(decoder), weights(reference.decoder)) <= tolerance
    moved_V = (table_VE - before).abs().amax(1)
    assert moved_V[list(NEVER)].min() > 100 * tolerance  # by decay alone


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 3e-10), (torch.float32, 1e-6)])
def test_exact_rows_are_dense_adamw_over_long_gaps(
    settings: Settings, dtype: torch.dtype, tolerance: float
) -> None:
    """Row n is touched every 12n + 1 steps; those that come seldom lose the end of their momentum three times."""
    decoder = make_decoder(dtype)
    reference = Reference(decoder, weight_decay=0.1)
    config = settings(embedding_rows="exact", learning_rate=1e-3, weight_decay=0.1)
    optimizer = make_optimizer(decoder, config)
    for step in range(1000):
        ids_T = torch.tensor([row for row in range(NEVER.start) if step % (12 * row + 1) == 0])
        rate = 1e-3 if step < 500 else 5e-4
        size = 0.01 ** (step % 5)  # down to where AdamW's eps is felt
        optimizer.set_learning_rate(rate)
        optimizer.zero_grad()
        optimizer.prepare(ids_T)
        backward_table(decoder, step, ids_T, size)
        optimizer.clip(1.0)
        optimizer.step()
        backward_table(reference.decoder, step, ids_T, size)
        reference.step(rate)
    optimizer.flush()
    assert distance(weights(decoder), weights(reference.decoder)) <= tolerance


def test_momentum_ends_when_it_moves_no_weight_by_more_than_the_tail() -> None:
    """Gradients that grow by beta2 / beta1 each step make the most of the Cauchy-Schwarz inequality."""
    rate, longest = 1e-3, 0
    moves = steps_that_move(rate)
    for past in (1, 2, 3, 10, 100, 300):
        for ratio in (0.98 / 0.9, 1.0, 0.5, 0.0):
            m = v = 0.0
            for k in range(past):
                gradient = ratio ** (past - 1 - k)
                m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
            ways = []
            for k in range(past + 1, past + 1001):
                m, v = 0.9 * m, 0.98 * v
                ways.append(rate * m / (1 - 0.9**k) / (math.sqrt(v / (1 - 0.98**k)) + 1e-8))
            assert sum(ways[moves:]) <= 1e-10
            longest = max(longest, sum(sum(ways[n:]) > 1e-10 for n in range(1000)))
    assert longest >= moves - 20  # and not much earlier


def test_it_does_not_matter_when_exact_rows_are_caught_up(settings: Settings) -> None:
    config = settings(embedding_rows="exact", learning_rate=1e-3, weight_decay=0.1)
    decoders = [make_decoder(), make_decoder()]
    optimizers = [make_optimizer(decoder, config) for decoder in decoders]
    for step in range(0, 600, 10):
        run(decoders[0], optimizers[0], range(step, step + 10))
        optimizers[0].prepare(torch.arange(step % 7, V, 3))
        if step % 70 == 0:
            optimizers[0].flush()
        run(decoders[1], optimizers[1], range(step, step + 10), prepare=False)
    for optimizer in optimizers:
        optimizer.flush()
    assert same(weights(decoders[0]), weights(decoders[1]))
    assert same(optimizers[0].state(), optimizers[1].state())


def test_lazy_rows_stay_until_they_have_a_gradient(settings: Settings) -> None:
    """Against a loop over rows; bias correction knows all steps, moments only those of the row."""
    decoder = make_decoder(torch.float64)
    optimizer = make_optimizer(decoder, settings(embedding_rows="lazy", learning_rate=1e-3, weight_decay=0.1))
    expected = {row: decoder.embed_tokens.weight[row].detach().clone() for row in range(V)}
    m = {row: torch.zeros(E, dtype=torch.float64) for row in range(V)}
    v = {row: torch.zeros(E, dtype=torch.float64) for row in range(V)}
    for step in range(30):
        dense = copy.deepcopy(decoder)
        dense.embed_tokens.sparse = False
        dense.zero_grad()
        backward(dense, step, ids_of(step))
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in dense.parameters() if p.grad is not None))
        run(decoder, optimizer, range(step, step + 1))
        assert dense.embed_tokens.weight.grad is not None
        for row in set(ids_of(step).tolist()):
            gradient = dense.embed_tokens.weight.grad[row] * min(1.0, 1.0 / (norm + 1e-6))
            m[row] = 0.9 * m[row] + 0.1 * gradient
            v[row] = 0.98 * v[row] + 0.02 * gradient**2
            way = (m[row] / (1 - 0.9 ** (step + 1))) / ((v[row] / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            expected[row] = expected[row] * (1 - 0.1 * rate_of(step)) - rate_of(step) * way
        optimizer.flush()
        found_VE = decoder.embed_tokens.weight.detach()
        torch.testing.assert_close(found_VE, torch.stack(list(expected.values())), rtol=0, atol=1e-12)


# --- State


@pytest.mark.parametrize("rows", ROWS)
def test_a_run_that_is_continued_ends_in_the_same_bits(settings: Settings, rows: Rows) -> None:
    config = settings(embedding_rows=rows, learning_rate=1e-3, weight_decay=0.1)
    straight, first = make_decoder(), make_decoder()
    optimizers = [make_optimizer(decoder, config) for decoder in (straight, first)]
    run(straight, optimizers[0], range(200))
    run(first, optimizers[1], range(133))
    saved = {name: tensor.clone() for name, tensor in optimizers[1].state().items()}

    second = make_decoder()
    continued = make_optimizer(second, config)
    assert {name: tensor.shape for name, tensor in continued.state().items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    second.load_state_dict(first.state_dict())
    continued.load(saved)
    run(second, continued, range(133, 200))
    assert same(continued.state(), optimizers[0].state())
    for optimizer in (optimizers[0], continued):
        optimizer.flush()
    assert same(weights(straight), weights(second))


def test_state_has_the_names_of_parameters(settings: Settings) -> None:
    decoder = make_decoder()
    moments = {f"{name}/{key}" for name in weights(decoder) for key in ("step", "exp_avg", "exp_avg_sq")}
    for rows in ROWS:
        state = make_optimizer(decoder, settings(embedding_rows=rows)).state()
        assert state.keys() >= moments
        assert {name.split("/")[0] for name in state.keys() - moments} <= {TABLE}


def test_the_state_of_other_settings_is_refused(settings: Settings) -> None:
    lazy, exact = (
        make_optimizer(make_decoder(), settings(embedding_rows=rows)) for rows in ("lazy", "exact")
    )
    with pytest.raises(F2Error, match="lacks 'embed_tokens.weight/learning_rates'"):
        exact.load(lazy.state())
    with pytest.raises(F2Error, match="has an unknown 'embed_tokens.weight/learning_rates'"):
        lazy.load(exact.state())


# --- Averages


def test_averages_are_those_of_a_loop() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = Average(module, decay=0.7)
    expected = module.weight.detach().double()
    for step in range(40):
        with torch.no_grad():
            module.weight.add_(noise_like(module.weight, step))
            module.bias.add_(1)
        average.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.double()
        assert list(average.state()) == ["weight"]
        torch.testing.assert_close(average.state()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_averages_are_put_in_and_taken_out() -> None:
    module = nn.Linear(3, 2)
    average = Average(module, decay=0.99)
    with torch.no_grad():
        module.weight.mul_(2)
    average.update(0)
    own = weights(module)
    averages = {name: tensor.clone() for name, tensor in average.state().items()}
    assert not same(own, averages)

    def fail_with_the_averages() -> None:
        with average.applied():
            assert same(weights(module), averages)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_with_the_averages()
    assert same(weights(module), own) and same(average.state(), averages)
    average.swap()
    assert same(weights(module), averages)

    other = Average(nn.Linear(3, 2), decay=0.99)
    other.load(averages)
    assert same(other.state(), averages)


def test_averages_do_not_go_with_rows_that_lag(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"'ema' .* take 'dense' or 'lazy'"):
        make_optimizer(make_decoder(), settings(ema=0.99, embedding_rows="exact"))
    for rows in ("dense", "lazy"):
        make_optimizer(make_decoder(), settings(ema=0.99, embedding_rows=rows))


# --- Several ranks


def on_shards(ranks: Ranks, config: TrainStage) -> dict[str, Any]:
    """Three steps of a decoder that ranks share; what each rank gives is a part of the gradient."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    decoder, whole = make_decoder(), make_decoder()
    shard(decoder, ranks, "fp32", False)
    extra = nn.Parameter(torch.tensor(1.0))
    optimizer = make_optimizer(decoder, config, {"log_temperature": extra})
    average = Average(decoder, 0.9)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        whole.zero_grad()
        backward(whole, step, ids_of(step))
        for name, parameter in decoder.named_parameters():
            gradient = whole.get_parameter(name).grad
            assert isinstance(parameter, DTensor) and gradient is not None
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        extra.grad = torch.tensor(5.0)
        norms.append(optimizer.clip(1.0).item())
        optimizer.step()
        average.update(step)
    moved: dict[str, Any] = {"weights": weights(decoder), "averages": average.state()}
    moved = {what: {name: x.full_tensor() for name, x in tensors.items()} for what, tensors in moved.items()}
    try:
        make_optimizer(decoder, config.model_copy(update={"embedding_rows": "lazy"}))
        refused = ""
    except UsageError as error:
        refused = str(error)
    return moved | {"norms": norms, "extra": extra.detach(), "refused": refused}


@pytest.mark.slow
def test_sharded_weights_move_as_whole_ones(settings: Settings) -> None:
    config = settings(learning_rate=1e-3)
    decoder, extra = make_decoder(), nn.Parameter(torch.tensor(1.0))
    optimizer, average = make_optimizer(decoder, config, {"log_temperature": extra}), Average(decoder, 0.9)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        backward(decoder, step, ids_of(step))
        extra.grad = torch.tensor(5.0)
        norms.append(optimizer.clip(1.0).item())
        optimizer.step()
        average.update(step)
    for result in on_ranks(2, on_shards, config):
        assert result["norms"] == pytest.approx(norms, rel=1e-6)
        assert distance(result["weights"], weights(decoder)) < 1e-6
        assert distance(result["averages"], average.state()) < 1e-6
        assert result["extra"].item() == pytest.approx(extra.item(), abs=1e-6)
        assert "embedding table in one place" in result["refused"]
