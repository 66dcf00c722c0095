"""The ragged decoder against transformers' Qwen3Model on the same weights, and what it refuses to compute."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from f2llm.errors import F2Error
from f2llm.family import FAMILY
from f2llm.model import attention, fused
from f2llm.model.decoder import (
    Decoder,
    DecoderConfig,
    config_from_json,
    config_to_json,
    initialise,
)
from f2llm.model.folder import model_size
from f2llm.model.layout import make_layout

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
SHAPES = {
    "grouped-query": CONFIG,
    "one key head": replace(CONFIG, num_key_value_heads=1),
    "as many key heads as heads": replace(CONFIG, num_key_value_heads=4),
    "odd sizes": replace(
        CONFIG, vocab_size=101, hidden_size=27, intermediate_size=13, num_attention_heads=6, head_dim=10
    ),
    "one layer": replace(CONFIG, num_hidden_layers=1),
    "other theta": replace(CONFIG, rope_theta=123.0),
    "other eps": replace(CONFIG, rms_norm_eps=0.3),
}
LENGTHS = [5, 1, 17, 5, 2, 1, 30, 17, 3]  # unsorted, some equal, some of one token


@pytest.fixture(params=["as small inputs run", "as large inputs run"])
def _both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs go in chunks and in blocks; the second time, so do these."""
    if request.param == "as large inputs run":
        monkeypatch.setattr(fused, "CHUNK", 100)
        monkeypatch.setattr(attention, "BLOCKED_FROM", 4)
        monkeypatch.setattr(attention, "BLOCK", 8)


def random_decoder(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise
    return decoder.to(dtype)


def random_ids(config: DecoderConfig, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]


def peer(decoder: Decoder) -> nn.Module:
    """A model of transformers with the configuration that we write and the weights of `decoder`."""
    from transformers import Qwen3Config, Qwen3Model

    written = json.loads(json.dumps(config_to_json(decoder.config)))
    theirs = Qwen3Model(Qwen3Config.from_dict(written)).to(next(decoder.parameters()).dtype)
    theirs.load_state_dict(decoder.state_dict(), strict=True)
    return theirs.eval()


def one_by_one(theirs: nn.Module, sequences: list[Tensor]) -> Tensor:
    return torch.stack([theirs(input_ids=ids[None]).last_hidden_state[0, -1] for ids in sequences])


@pytest.mark.usefixtures("_both_paths")
@pytest.mark.parametrize("name", SHAPES)
def test_vectors_equal_those_of_transformers(name: str) -> None:
    decoder = random_decoder(SHAPES[name])
    sequences = random_ids(decoder.config, LENGTHS)
    with torch.no_grad():
        ours = decoder(torch.cat(sequences), LENGTHS)
        theirs = one_by_one(peer(decoder), sequences)
    assert ours.shape == (len(LENGTHS), decoder.config.hidden_size)
    assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < 1e-5


@pytest.mark.usefixtures("_both_paths")
@pytest.mark.parametrize("name", ["grouped-query", "as many key heads as heads"])
def test_gradients_equal_those_of_transformers(name: str) -> None:
    decoder = random_decoder(SHAPES[name], torch.float64)
    sequences = random_ids(decoder.config, LENGTHS)
    direction = torch.randn(
        len(LENGTHS),
        decoder.config.hidden_size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(3),
    )
    theirs = peer(decoder)
    (decoder(torch.cat(sequences), LENGTHS) * direction).sum().backward()
    (one_by_one(theirs, sequences) * direction).sum().backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in decoder.named_parameters():
        gradient = expected[parameter_name].grad
        assert parameter.grad is not None and gradient is not None
        assert float(gradient.norm()) > 0
        # Their norms compute in float32 whatever the model's dtype, hence no tighter bound.
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-5, parameter_name


@pytest.mark.usefixtures("_both_paths")
def test_the_batch_around_a_sequence_does_not_change_it() -> None:
    decoder = random_decoder(CONFIG, torch.float64)
    sequences = random_ids(CONFIG, LENGTHS)
    with torch.no_grad():
        together = decoder(torch.cat(sequences), LENGTHS)
        alone = torch.cat([decoder(ids, [len(ids)]) for ids in sequences])
        order = [6, 0, 3, 1]
        some = decoder(torch.cat([sequences[i] for i in order]), [LENGTHS[i] for i in order])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some, together[order], rtol=1e-12, atol=1e-12)


def test_autocast_to_bfloat16_computes_the_same_vectors_roughly() -> None:
    decoder = random_decoder(replace(CONFIG, num_hidden_layers=1))
    ids = torch.cat(random_ids(CONFIG, LENGTHS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(ids, LENGTHS)
    exact = decoder(ids, LENGTHS)
    assert 1e-6 < float(((rough - exact).norm() / exact.norm()).detach()) < 3e-2
    gradients = [torch.autograd.grad(v.float().sum(), list(decoder.parameters())) for v in (rough, exact)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32 and float((a - b).norm()) < 0.1 * float(b.norm())


def test_order_of_tokens_matters() -> None:
    decoder = random_decoder(CONFIG)
    with torch.no_grad():
        vectors = decoder(torch.tensor([1, 2, 3, 9, 2, 1, 3, 9]), [4, 4])
    assert float((vectors[0] - vectors[1]).norm() / vectors[0].norm()) > 1e-3


def test_layout_sorts_groups_and_finds_the_way_back() -> None:
    layout = make_layout(LENGTHS, torch.device("cpu"))
    assert layout.groups == [(2, 1), (1, 2), (1, 3), (2, 5), (2, 17), (1, 30)]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    for sequence, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        last = int(layout.last_N[layout.restore_N[sequence]])
        mine = slice(last - length + 1, last + 1)
        assert layout.token_order_T[mine].tolist() == list(range(start, start + length))
        assert layout.positions_T[mine].tolist() == list(range(length))


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(F2Error, match="without tokens"):
        random_decoder(CONFIG)(torch.tensor([1, 2]), [2, 0])


def test_initial_weights_are_those_of_transformers() -> None:
    decoder = Decoder(replace(CONFIG, hidden_size=128, intermediate_size=256))
    initialise(decoder, torch.Generator().manual_seed(0))
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            mean, deviation = float(parameter.mean().detach()), float(parameter.std().detach())
            assert deviation == pytest.approx(0.02, rel=0.1) and abs(mean) < 2e-3, name


# --- config.json


def test_config_survives_a_round_trip() -> None:
    for config in SHAPES.values():
        assert config_from_json(json.loads(json.dumps(config_to_json(config))), "here") == config


def settings(**changes: Any) -> dict[str, Any]:
    return {**config_to_json(CONFIG), **changes}


def unsupported() -> list[Any]:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "rope type": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        "rope type, old key": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        "rope type, new key": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "llama3"),
        "rope type behind a default one": (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "dynamic"}},
            "dynamic",
        ),
        "rope by layer type": (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "full_attention",
        ),
        "rope on a part of a head": (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        "sliding window": ({"use_sliding_window": True}, "use_sliding_window"),
        "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        "attention bias": ({"attention_bias": True}, "attention_bias"),
        "model type": ({"model_type": "qwen2"}, "qwen2"),
        "activation": ({"hidden_act": "gelu"}, "gelu"),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("changes", "named"), unsupported())
def test_what_would_be_computed_differently_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(F2Error, match=named) as refusal:
        config_from_json(settings(**changes), "folder/config.json")
    assert "folder/config.json" in str(refusal.value)


@pytest.mark.parametrize("name", ["model_type", "hidden_size", "head_dim", "num_key_value_heads"])
def test_what_is_missing_is_named(name: str) -> None:
    values = settings()
    del values[name]
    with pytest.raises(F2Error, match=name):
        config_from_json(values, "here")


THETAS: list[dict[str, Any]] = [
    {"rope_theta": 5_000.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7_000.0}},
    {"rope_parameters": {"rope_theta": 7_000.0}, "rope_theta": 5_000.0},
    {},
]


@pytest.mark.parametrize("rope", THETAS)
def test_what_a_config_leaves_out_is_read_as_transformers_reads_it(rope: dict[str, Any]) -> None:
    from transformers import Qwen3Config

    values = settings()
    for name in ("rope_theta", "rope_scaling", "rms_norm_eps"):
        del values[name]
    values.update(rope)
    theirs = Qwen3Config.from_dict(dict(values))
    ours = config_from_json(values, "here")
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps


# --- the family


@pytest.mark.parametrize("size", FAMILY)
def test_family_member_has_the_published_number_of_parameters(size: str) -> None:
    member = FAMILY[size]
    config = DecoderConfig(
        vocab_size=member.vocab_size,
        hidden_size=member.hidden_size,
        intermediate_size=member.intermediate_size,
        num_hidden_layers=member.layers,
        num_attention_heads=member.heads,
        num_key_value_heads=member.kv_heads,
        head_dim=member.head_dim,
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    assert model_size(decoder) == member.total_parameters
