"""The decoder on matrix units against torch's: every length and shape, alone, in teams, behind a prefix."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import cast

import numpy as np
import pytest
import torch

from f2llm.amx.hardware import why_not
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder, DecoderConfig, Layer
from f2llm.model.folder import Model

if reason := why_not():
    pytest.skip(f"no matrix units here: {reason}", allow_module_level=True)

from f2llm.amx.decoder import AmxDecoder, why_not_fitting

FITTING = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32}
SHAPES = [
    FITTING,
    {
        **FITTING,
        "hidden_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    },
    {**FITTING, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3},
    {**FITTING, "hidden_size": 352, "intermediate_size": 128, "head_dim": 128, "num_attention_heads": 4},
]
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 300, 1, 16, 40]

MakeModel = Callable[..., Model]


def sequences(lengths: Sequence[int], seed: int = 0, vocabulary: int = 500) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=length).tolist() for length in lengths]


@torch.inference_mode()
def by_torch(decoder: Decoder, batch: Sequence[Sequence[int]]) -> np.ndarray:
    vectors: np.ndarray = forward(decoder, batch).numpy()
    return vectors


def on_units(decoder: Decoder, threads: int = 2) -> AmxDecoder:
    return AmxDecoder(deepcopy(decoder), threads)


def difference(a_NE: np.ndarray, b_NE: np.ndarray) -> float:
    """The largest, relative to the length of a vector."""
    return float((np.linalg.norm(a_NE - b_NE, axis=1) / np.linalg.norm(b_NE, axis=1)).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_are_those_of_the_decoder(shape: dict[str, int], make_model: MakeModel) -> None:
    decoder = make_model(**shape).decoder
    batch = sequences(LENGTHS)
    expected_NE = by_torch(decoder, batch)
    amx = on_units(decoder)
    assert difference(amx.vectors(batch), expected_NE) < 2e-4
    assert difference(np.concatenate([amx.vectors([one]) for one in batch]), expected_NE) < 2e-4


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_and_company_change_nothing(threads: int, make_model: MakeModel) -> None:
    """Alone in a team of any size, or in one of many batches."""
    decoder = make_model(**FITTING).decoder
    batch = sequences([7, 500, 23, 64, *range(1, 60)])
    expected_NE = on_units(decoder, 1).vectors(batch)
    amx = on_units(decoder, threads)
    assert difference(amx.vectors(batch), expected_NE) < 1e-5
    alone_NE = np.concatenate([amx.vectors([one]) for one in batch])
    assert difference(alone_NE, expected_NE) < 1e-5
    backwards_NE = amx.vectors(batch[::-1])[::-1]
    assert difference(backwards_NE, expected_NE) < 1e-5


def test_long_sequences_after_short_ones(make_model: MakeModel) -> None:
    decoder = make_model(**FITTING).decoder
    amx = on_units(decoder)
    for length in (3, 1100, 40, 2300):
        batch = sequences([length], seed=length)
        assert difference(amx.vectors(batch), by_torch(decoder, batch)) < 5e-4


@pytest.mark.parametrize("length", [1, 25, 32, 33, 70])
def test_behind_a_prefix_they_are_those_of_the_whole(length: int, make_model: MakeModel) -> None:
    decoder = make_model(**FITTING).decoder
    (prefix,) = sequences([length], seed=9)
    behind = sequences([1, 5, 16, 40, 33, 130], seed=10)
    expected_NE = by_torch(decoder, [prefix + one for one in behind])
    amx = on_units(decoder)
    state = amx.prefix(prefix)
    assert difference(amx.vectors(behind, state), expected_NE) < 2e-4
    assert difference(amx.vectors(behind[:1], state), expected_NE[:1]) < 2e-4


def test_damaged_weights_are_not_hidden(make_model: MakeModel) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        decoder = deepcopy(make_model(**FITTING).decoder)
        for part, weight in decoder.layers[0].named_parameters():
            if name in part:
                weight.data[0, 0] = float("nan")
        assert not np.isfinite(on_units(decoder).vectors(sequences([20]))).all(), name


def test_several_threads_may_ask_at_once(make_model: MakeModel) -> None:
    amx = on_units(make_model(**FITTING).decoder)
    batches = [sequences([3, 30, 90], seed=seed) for seed in range(16)]
    one_by_one = [amx.vectors(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(amx.vectors, batches))
    for a_NE, b_NE in zip(one_by_one, at_once, strict=True):
        assert difference(a_NE, b_NE) < 1e-5  # alone in a team, or by one thread


def test_no_sequences_are_no_vectors(make_model: MakeModel) -> None:
    assert on_units(make_model(**FITTING).decoder).vectors([]).shape == (0, 64)


def test_sizes_that_fit_no_tile_are_left_to_torch(make_model: MakeModel) -> None:
    config = make_model(**FITTING).decoder.config
    assert why_not_fitting(config) is None
    for field, value in (("hidden_size", 80), ("head_dim", 16), ("intermediate_size", 160)):
        assert str(value) in str(why_not_fitting(DecoderConfig(**{**vars(config), field: value})))


# --- int8

IN_BYTES = {**FITTING, "intermediate_size": 256}


def simulated(decoder: Decoder, batch: Sequence[Sequence[int]]) -> np.ndarray:
    """Vectors by torch with every linear map's weights and inputs rounded as int8 is: the independent reference."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale.clamp_min(1e-30)).round() * scale

    copy = deepcopy(decoder)
    for layer in cast(list[Layer], list(copy.layers)):
        attention, mlp = layer.self_attn, layer.mlp
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        for map_, norm in (
            *((m, before) for m in (attention.q_proj, attention.k_proj, attention.v_proj)),
            *((m, between) for m in (mlp.gate_proj, mlp.up_proj)),
        ):
            map_.weight.data = rounded(map_.weight.data * norm.data)
            map_.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
        before.data.fill_(1)
        between.data.fill_(1)
        by_parts(attention.o_proj, decoder.config.num_key_value_heads, rounded)
        by_parts(mlp.down_proj, decoder.config.intermediate_size // 128, rounded)
    return by_torch(copy, batch)


def by_parts(map_: torch.nn.Linear, parts: int, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The maps whose inputs come a part at a time round each part by itself."""
    whole = rounded(map_.weight.data.unflatten(1, (parts, -1))).flatten(1)
    map_.weight.data = whole
    map_.register_forward_pre_hook(
        lambda _, given: (rounded(given[0].unflatten(-1, (parts, -1))).flatten(-2),)
    )


@pytest.mark.parametrize("shape", [IN_BYTES, {**IN_BYTES, "hidden_size": 192, "num_hidden_layers": 3}])
def test_int8_rounds_as_it_says(shape: dict[str, int], make_model: MakeModel) -> None:
    decoder = make_model(**shape).decoder
    batch = sequences(LENGTHS)
    found_NE = AmxDecoder(deepcopy(decoder), 2, in_bytes=True).vectors(batch)
    expected_NE, exact_NE = simulated(decoder, batch), by_torch(decoder, batch)
    # A number on the edge between two integers may fall to either side, and layers carry that on.
    assert np.median(np.linalg.norm(found_NE - expected_NE, axis=1)) < 0.3 * np.median(
        np.linalg.norm(found_NE - exact_NE, axis=1)
    )
    cosines = (
        (found_NE * exact_NE).sum(1) / np.linalg.norm(found_NE, axis=1) / np.linalg.norm(exact_NE, axis=1)
    )
    assert 0.98 < cosines.min() < 0.99999  # near, and not float32 by mistake


@pytest.mark.parametrize("threads", [1, 3])
def test_int8_does_not_depend_on_company(threads: int, make_model: MakeModel) -> None:
    """Loud texts in a batch do not change how a quiet one is rounded; threads add up in another order."""
    decoder = make_model(**IN_BYTES).decoder
    batch = sequences([7, 300, 23, 64, *range(1, 40)])
    amx = AmxDecoder(deepcopy(decoder), threads, in_bytes=True)
    together_NE = amx.vectors(batch)
    alone_NE = np.concatenate([amx.vectors([one]) for one in batch])
    if threads == 1:
        np.testing.assert_array_equal(alone_NE, together_NE)
    cosines = (alone_NE * together_NE).sum(1)
    cosines /= np.linalg.norm(alone_NE, axis=1) * np.linalg.norm(together_NE, axis=1)
    assert cosines.min() > 0.999


def test_int8_behind_a_prefix(make_model: MakeModel) -> None:
    decoder = make_model(**IN_BYTES).decoder
    (prefix,) = sequences([25], seed=9)
    behind = sequences([1, 5, 16, 40], seed=10)
    amx = AmxDecoder(deepcopy(decoder), 1, in_bytes=True)
    whole_NE = amx.vectors([prefix + one for one in behind])
    assert difference(amx.vectors(behind, amx.prefix(prefix)), whole_NE) < 1e-3


def test_int8_hides_no_damage(make_model: MakeModel) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        decoder = deepcopy(make_model(**IN_BYTES).decoder)
        for part, weight in decoder.layers[0].named_parameters():
            if name in part:
                weight.data[0, 0] = float("nan")
        vectors_NE = AmxDecoder(decoder, 2, in_bytes=True).vectors(sequences([20]))
        assert not np.isfinite(vectors_NE).all(), name
