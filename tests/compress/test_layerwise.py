"""Scores layer by layer equal those that hooks take of transformers' whole model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from f2llm.compress import layerwise
from f2llm.compress.layerwise import Scores, activation_scores, taylor_scores
from f2llm.errors import F2Error
from f2llm.model.folder import Model, open_weights, read_config, save_model
from f2llm.train.terms import token_ids

MakeModel = Callable[..., Model]
TEXTS = ["lion", "Ujerumani", "éléphant éléphant", "सफ़ेद कुत्ता", "", "德国 印度", "lion", "Egypt Misri"]
LAYERS, GROUPS = 3, 3


class Seen(NamedTuple):
    """What the whole model shows of one text."""

    norms: list[Tensor]  # outputs of the norms in front of attention and MLP, in their order
    mlp: list[Tensor]  # inputs of the down projections
    heads: list[Tensor]  # inputs of the output projections
    layers: list[tuple[Tensor, Tensor]]  # input and output
    last: list[Tensor]  # output of the final norm


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    model = make_model(num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=GROUPS)
    save_model(tmp_path / "model", model)
    return tmp_path / "model"


@pytest.fixture
def ids(make_model: MakeModel) -> list[list[int]]:
    return token_ids(make_model(), TEXTS, 64)


@pytest.fixture
def peer(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, attn_implementation="eager")


@contextmanager
def watched(peer: Any) -> Iterator[Seen]:
    """Fills what it gives when the model is called."""
    seen = Seen([], [], [], [], [])

    def before(_module: Any, given: tuple[Tensor, ...], out: Any, to: list[Tensor]) -> None:
        to.append(given[0])

    def after(_module: Any, given: tuple[Tensor, ...], out: Tensor, to: list[Tensor]) -> None:
        to.append(out)

    def hook(module: Any, function: Callable[..., None], to: list[Tensor]) -> Any:
        return module.register_forward_hook(lambda m, given, out: function(m, given, out, to))

    handles = [hook(peer.norm, after, seen.last)]
    for layer in peer.layers:
        handles += [
            hook(layer.input_layernorm, after, seen.norms),
            hook(layer.post_attention_layernorm, after, seen.norms),
            hook(layer.mlp.down_proj, before, seen.mlp),
            hook(layer.self_attn.o_proj, before, seen.heads),
            layer.register_forward_hook(lambda _, given, out: seen.layers.append((given[0], out))),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def by_group(values_A: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in values_A.chunk(GROUPS)])


def activations_of_all(peer: Any, ids: Sequence[Sequence[int]]) -> Scores:
    """The same by hooks: of the last layer only what the final token needs."""
    hidden: Any = 0.0
    mlp: dict[int, Any] = defaultdict(float)
    groups: dict[int, Any] = defaultdict(float)
    cosines: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for sequence in ids:
        with watched(peer) as seen, torch.no_grad():
            peer(torch.tensor([sequence]))
        for place, norm in enumerate(seen.norms):
            used = norm[0, -1:] if place == 2 * LAYERS - 1 else norm[0]
            hidden = hidden + used.double().square().sum(0)
        for number in range(LAYERS):
            used = slice(-1, None) if number == LAYERS - 1 else slice(None)  # type: ignore[assignment]
            mlp[number] += seen.mlp[number][0, used].double().square().sum(0)
            groups[number] += by_group(seen.heads[number][0, used].double().square().sum(0))
            x, out = (t[0, used].double() for t in seen.layers[number])
            cosines[number] += [F.cosine_similarity(a, b, dim=0) for a, b in zip(x, out, strict=True)]
    change = torch.stack([1 - torch.stack(some).mean() for some in cosines])
    return Scores(
        hidden.sqrt(),
        [mlp[n].sqrt() for n in range(LAYERS)],
        [groups[n].sqrt() for n in range(LAYERS)],
        change,
    )


def a_loss(vectors_NE: Tensor) -> Tensor:
    """Texts are to be like their neighbours, so that the gradient of each depends on others."""
    unit = F.normalize(vectors_NE, dim=-1)
    return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(unit)).roll(1))


def gradients_of_all(peer: Any, ids: Sequence[Sequence[int]]) -> Scores:
    """Taylor scores by autograd through all texts and layers at once."""
    all_seen, vectors = [], []
    for sequence in ids:
        with watched(peer) as seen:
            vectors.append(peer(torch.tensor([sequence])).last_hidden_state[0, -1])
        for value in (*seen.norms, *seen.mlp, *seen.heads, *seen.last):
            value.retain_grad()
        all_seen.append(seen)
    a_loss(torch.stack(vectors)).backward()

    def score(value: Tensor) -> Tensor:
        assert value.grad is not None
        return (value * value.grad).detach().double().abs().sum((0, 1))

    def total(values: list[Tensor]) -> Tensor:
        return torch.stack([score(value) for value in values]).sum(0)

    return Scores(
        total([value for seen in all_seen for value in (*seen.norms, *seen.last)]),
        [total([seen.mlp[n] for seen in all_seen]) for n in range(LAYERS)],
        [by_group(total([seen.heads[n] for seen in all_seen])) for n in range(LAYERS)],
        torch.zeros(0),
    )


def close(got: Scores, expected: Scores) -> None:
    torch.testing.assert_close(got.hidden_E, expected.hidden_E, rtol=1e-4, atol=1e-6)
    for one, other in ((got.mlp, expected.mlp), (got.groups, expected.groups)):
        assert len(one) == len(other) == LAYERS
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(params=[1, 12, 2048])
def _any_cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are computed at once."""
    monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", request.param)


@pytest.mark.usefixtures("_any_cut")
def test_activation_scores_equal_those_of_the_whole_model(
    folder: Path, ids: list[list[int]], peer: Any, tmp_path: Path
) -> None:
    config = read_config(folder)
    with open_weights(folder, config) as weights:
        got = activation_scores(weights, config, ids, tmp_path)
    expected = activations_of_all(peer, ids)
    close(got, expected)
    torch.testing.assert_close(got.change, expected.change, rtol=1e-4, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "hidden states were left"


@pytest.mark.usefixtures("_any_cut")
def test_taylor_scores_equal_autograd_through_the_whole_model(
    folder: Path, ids: list[list[int]], peer: Any, tmp_path: Path
) -> None:
    config = read_config(folder)
    with open_weights(folder, config) as weights:
        got = taylor_scores(weights, config, ids, a_loss, tmp_path)
        by_activation = activation_scores(weights, config, ids, tmp_path)
    close(got, gradients_of_all(peer, ids))
    assert torch.equal(got.change, by_activation.change)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "hidden states were left"


def test_too_little_room_for_hidden_states_is_told_before_any_work(
    folder: Path, ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = sum(map(len, ids))
    room = SimpleNamespace(free=tokens * 24 * 4)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    config = read_config(folder)
    with open_weights(folder, config) as weights:
        activation_scores(weights, config, ids, tmp_path)
        with pytest.raises(F2Error, match=f"of {tokens} tokens take .* fewer calibration texts"):
            taylor_scores(weights, config, ids, a_loss, tmp_path)
