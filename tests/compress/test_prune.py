"""Pruning: what is always zero can go without a trace, and what is kept is what mattered most."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from f2llm.compress.prune import cut, importance, prune_stage, strongest
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.model.folder import Model, load_model, save_model
from f2llm.model.tokenizer import encode
from f2llm.recipe import PruneStage
from f2llm.train.terms import token_ids

MakeModel = Callable[..., Model]
TEXTS = ["lion", "Ujerumani", "éléphant éléphant", "सफ़ेद कुत्ता", "", "德国 印度"]


def vectors(decoder: Decoder, model: Model) -> Tensor:
    with torch.no_grad():
        return forward(decoder, token_ids(model, TEXTS, 96))


def silence_hidden_units(decoder: Decoder, units: Tensor) -> None:
    """Make the residual stream zero at `units`, whatever the text: nothing writes there."""
    for name, weight in decoder.state_dict().items():  # which shares its memory with the decoder
        if "embed_tokens" in name:
            weight[:, units] = 0
        elif "o_proj" in name or "down_proj" in name:
            weight[units] = 0


def silence_mlp_units(decoder: Decoder, units: Tensor) -> None:
    for name, weight in decoder.state_dict().items():
        if "up_proj" in name:
            weight[units] = 0


def all_units(decoder: Decoder) -> tuple[Tensor, list[Tensor]]:
    config = decoder.config
    mlp = [torch.arange(config.intermediate_size) for _ in range(config.num_hidden_layers)]
    return torch.arange(config.hidden_size), mlp


# --- Cutting


def test_keeping_everything_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    whole = cut(model.decoder, *all_units(model.decoder))
    assert whole.config == model.decoder.config
    expected = model.decoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_hidden_units_that_are_always_zero_can_go(make_model: MakeModel, eps: float) -> None:
    """Norms divide by the width, so their weights and eps must make up for it; here an eps of 0.1 weighs in.

    config.json has one eps for all norms, so heads are given queries and keys so long that theirs does not.
    """
    model = make_model(rms_norm_eps=eps)
    decoder = model.decoder.double()
    for name, weight in decoder.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight *= 1e6
    zero = torch.tensor([0, 3, 7, 8, 15, 23])
    kept = torch.tensor([i for i in range(24) if i not in zero.tolist()])
    silence_hidden_units(decoder, zero)
    before = vectors(decoder, model)
    assert torch.equal(before[:, zero], torch.zeros(len(TEXTS), len(zero), dtype=torch.float64))
    after = vectors(cut(decoder, kept, all_units(decoder)[1]), model)
    torch.testing.assert_close(after, before[:, kept], rtol=1e-6, atol=1e-6)


def test_mlp_units_that_are_always_zero_can_go(make_model: MakeModel) -> None:
    model = make_model()
    decoder = model.decoder.double()
    zero = torch.tensor([1, 2, 20, 39])
    silence_mlp_units(decoder, zero)
    units = torch.tensor([i for i in range(40) if i not in zero.tolist()])
    before = vectors(decoder, model)
    small = cut(decoder, all_units(decoder)[0], [units, units])
    assert small.config.intermediate_size == 36
    torch.testing.assert_close(vectors(small, model), before, rtol=1e-6, atol=1e-6)


def test_layers_are_the_first(make_model: MakeModel) -> None:
    decoder = make_model(num_hidden_layers=3).decoder
    kept_E, kept_I = all_units(decoder)
    shallow = cut(decoder, kept_E, kept_I[:2])
    assert shallow.config.num_hidden_layers == 2
    expected = decoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in shallow.state_dict().items())
    assert {name.split(".")[1] for name in shallow.state_dict() if name.startswith("layers")} == {"0", "1"}


def test_each_layer_keeps_its_own_units(make_model: MakeModel) -> None:
    decoder = make_model().decoder
    kept_I = [torch.tensor([0, 5]), torch.tensor([7, 39])]
    small = cut(decoder, torch.tensor([2, 3, 11]), kept_I).state_dict()
    source = decoder.state_dict()
    for layer, units in enumerate(kept_I):
        name = f"layers.{layer}.mlp"
        assert torch.equal(
            small[f"{name}.up_proj.weight"], source[f"{name}.up_proj.weight"][units][:, [2, 3, 11]]
        )
        assert torch.equal(
            small[f"{name}.down_proj.weight"], source[f"{name}.down_proj.weight"][[2, 3, 11]][:, units]
        )
    assert torch.equal(small["embed_tokens.weight"], source["embed_tokens.weight"][:, [2, 3, 11]])
    torch.testing.assert_close(small["norm.weight"], source["norm.weight"][[2, 3, 11]] * (24 / 3) ** 0.5)
    assert torch.equal(small["layers.0.self_attn.q_norm.weight"], source["layers.0.self_attn.q_norm.weight"])


def test_cutting_leaves_the_parent_alone(make_model: MakeModel) -> None:
    decoder, untouched = make_model().decoder, make_model().decoder.state_dict()
    small = cut(decoder, torch.arange(8), [torch.arange(4)] * 2)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in decoder.state_dict().items())


# --- Choosing


def test_strongest_units_in_ascending_order() -> None:
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 7.0, 0.0])
    assert strongest(scores, 3).tolist() == [1, 3, 4]
    assert strongest(scores, 2).tolist() == [1, 3]  # the first of equals
    assert strongest(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]
    for count in (0, 7):
        with pytest.raises(UsageError, match=rf"width of {count} .* 6 units"):
            strongest(scores, count)


def naive_activations(decoder: Decoder, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all norms and inputs of all down projections of one text, with the attention written out."""
    config = decoder.config
    weights = decoder.state_dict()
    x = weights["embed_tokens.weight"][ids]
    norms, mlps = [], []

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turned(x: Tensor) -> Tensor:
        half = config.head_dim // 2
        out = x.clone()
        for position in range(len(ids)):
            for i in range(half):
                angle = torch.tensor(position / config.rope_theta ** (2 * i / config.head_dim))
                a, b = x[position, i], x[position, i + half]
                out[position, i] = a * angle.cos() - b * angle.sin()
                out[position, i + half] = b * angle.cos() + a * angle.sin()
        return out

    for number in range(config.num_hidden_layers):
        w = {name.split(".")[-2]: t for name, t in weights.items() if name.startswith(f"layers.{number}.")}
        y = normed(x, w["input_layernorm"])
        norms.append(y)
        heads = []
        for head in range(config.num_attention_heads):
            mine = slice(head * config.head_dim, (head + 1) * config.head_dim)
            group = head // (config.num_attention_heads // config.num_key_value_heads)
            shared = slice(group * config.head_dim, (group + 1) * config.head_dim)
            q = turned(normed(y @ w["q_proj"][mine].T, w["q_norm"]))
            k = turned(normed(y @ w["k_proj"][shared].T, w["k_norm"]))
            v = y @ w["v_proj"][shared].T
            scores = (q @ k.T / config.head_dim**0.5).masked_fill(
                torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1), -torch.inf
            )
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w["o_proj"].T
        if number == config.num_hidden_layers - 1:
            x = x[-1:]  # no other token's output is used
        z = normed(x, w["post_attention_layernorm"])
        norms.append(z)
        gate = z @ w["gate_proj"].T
        inner = gate * gate.sigmoid() * (z @ w["up_proj"].T)
        mlps.append(inner)
        x = x + inner @ w["down_proj"].T
    return norms, mlps


def test_importance_equals_a_naive_sum_over_texts(make_model: MakeModel) -> None:
    model = make_model()
    hidden, mlp = importance(model, TEXTS)
    squares_E = torch.zeros(24)
    squares_I = [torch.zeros(40) for _ in range(2)]
    with torch.no_grad():
        for ids in encode(
            model.tokenizer, TEXTS, eos_id=model.facts.eos_id, max_length=96, too_long="truncate"
        ):
            norms, mlps = naive_activations(model.decoder, ids)
            for activation in norms:
                squares_E += activation.square().sum(0)
            for total, activation in zip(squares_I, mlps, strict=True):
                total += activation.square().sum(0)
    torch.testing.assert_close(hidden, squares_E.sqrt(), rtol=1e-4, atol=1e-4)
    assert len(mlp) == 2
    for got, total in zip(mlp, squares_I, strict=True):
        torch.testing.assert_close(got, total.sqrt(), rtol=1e-4, atol=1e-4)


def test_importance_leaves_no_hooks_and_no_gradients(make_model: MakeModel) -> None:
    model = make_model()
    before = vectors(model.decoder, model)
    importance(model, TEXTS)
    assert torch.equal(vectors(model.decoder, model), before)
    hooks = [m._forward_hooks | m._forward_pre_hooks for m in model.decoder.modules()]
    assert not any(hooks)
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


# --- The stage


@pytest.fixture
def parent(make_model: MakeModel, tmp_path: Path) -> Path:
    """A model two thirds of whose hidden units and half of whose MLP units are never anything but zero."""
    model = make_model(hidden_size=48)
    silence_hidden_units(model.decoder, torch.arange(0, 48, 3))
    silence_hidden_units(model.decoder, torch.arange(1, 48, 3))
    silence_mlp_units(model.decoder, torch.arange(0, 40, 2))
    save_model(tmp_path / "parent", model)
    return tmp_path / "parent"


def prune(parent: Path, rows: Path, out: Path, **changes: int) -> dict[str, object]:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "layers": 2, "calibration_texts": 30, **changes}
    config = PruneStage(stage="prune", model="parent", data="rows", **sizes)
    return prune_stage(config, model=parent, data=rows, out=out, seed=0, recipe_hash="r")


def test_stage_finds_the_units_that_matter(
    parent: Path, rows_folder: Path, names: list[str], tmp_path: Path
) -> None:
    facts = prune(parent, rows_folder, tmp_path / "small")
    large, small = Embedder(parent), Embedder(tmp_path / "small")
    kept = small.facts.kept
    assert kept == {"of": large.identity, "hidden": list(range(2, 48, 3))}
    before = large.encode(names, normalize=False)[:, kept["hidden"]]
    after = small.encode(names, normalize=False)
    assert abs(after - before).max() < 1e-4 * abs(before).max()
    assert (small.dim, small.sizes) == (16, [8, 16])
    assert facts["identity"] == small.identity and facts["parameters"] == small.parameters
    assert (small.facts.parent, small.facts.recipe) == (large.identity, "r")
    assert small.facts.instruction == large.facts.instruction
    assert (small.facts.max_length, small.facts.eos_id) == (large.facts.max_length, large.facts.eos_id)


def test_what_is_kept_of_a_cut_model_is_numbered_as_in_the_uncut_one(
    parent: Path, rows_folder: Path, tmp_path: Path
) -> None:
    prune(parent, rows_folder, tmp_path / "small")
    prune(tmp_path / "small", rows_folder, tmp_path / "smaller", hidden_size=8)
    small, smaller = Embedder(tmp_path / "small").facts, Embedder(tmp_path / "smaller").facts
    assert small.kept and smaller.kept
    assert smaller.kept["of"] == small.kept["of"] == Embedder(parent).identity
    assert len(smaller.kept["hidden"]) == 8
    assert set(smaller.kept["hidden"]) < set(small.kept["hidden"])


def test_stage_keeps_indices_in_ascending_order(
    model_folder: Path, rows_folder: Path, tmp_path: Path
) -> None:
    prune(model_folder, rows_folder, tmp_path, hidden_size=13, layers=1)
    facts = load_model(tmp_path).facts
    assert facts.kept is not None
    assert len(facts.kept["hidden"]) == 13
    assert all(a < b for a, b in pairwise(facts.kept["hidden"]))


def test_a_pruned_folder_loads_in_transformers(parent: Path, rows_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    prune(parent, rows_folder, tmp_path / "small", layers=1)
    ours = Embedder(tmp_path / "small")
    model, tokenizer = (kind.from_pretrained(tmp_path / "small") for kind in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        theirs = model(**tokenizer(["Ujerumani"], return_tensors="pt")).last_hidden_state[0, -1]
    assert model.config.hidden_size == 16 and model.config.num_hidden_layers == 1
    torch.testing.assert_close(
        torch.from_numpy(ours.encode("Ujerumani", normalize=False)), theirs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "got", "has"), [("hidden_size", 49, 48), ("intermediate_size", 41, 40), ("layers", 3, 2)]
)
def test_sizes_beyond_the_parents_are_refused(
    parent: Path, rows_folder: Path, tmp_path: Path, size: str, got: int, has: int
) -> None:
    with pytest.raises(UsageError, match=rf"\b{got}\b.*\b{has}\b"):
        prune(parent, rows_folder, tmp_path / "small", **{size: got})
    assert not (tmp_path / "small").exists()
