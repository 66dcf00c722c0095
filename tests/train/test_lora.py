"""LoRA adapters in our decoder: what changes, what does not, and the same vectors as peft's own model."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from f2llm.errors import UsageError
from f2llm.model.decoder import Decoder, config_to_json
from f2llm.model.folder import Model, load_model, save_model
from f2llm.train.lora import PROJECTIONS, add_lora, merge_lora

pytest.importorskip("peft")

MakeModel = Callable[..., Model]
RANK, ALPHA = 3, 5.0
LENGTHS = [5, 1, 17, 5, 2, 1, 30]  # unsorted, some equal, some of one token


@pytest.fixture
def model(make_model: MakeModel) -> Model:
    return make_model()


@pytest.fixture
def decoder(model: Model) -> Decoder:
    return model.decoder


@pytest.fixture
def ids(decoder: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(decoder.config.vocab_size, (sum(LENGTHS),), generator=generator)


def vectors(decoder: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder(ids, LENGTHS)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest distance of two vectors of the same text, relative to the length of one."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def copied(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


def train(decoder: Decoder, ids: Tensor, steps: int = 3) -> None:
    """Steps that move the vectors far: away from where they were."""
    start_NE = vectors(decoder, ids)
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        # At the start itself the distance has no slope.
        (decoder(ids, LENGTHS) - 1.1 * start_NE).square().sum().neg().backward()
        optimizer.step()


def adapted_name(name: str) -> str:
    """Name of a weight while adapters are there."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.base_layer.{last}" if stem.endswith("_proj") else name


def test_adapters_are_on_every_projection_and_change_nothing_yet(decoder: Decoder, ids: Tensor) -> None:
    before, weights = vectors(decoder, ids), copied(decoder)
    add_lora(decoder, RANK, ALPHA, seed=0)
    assert torch.equal(vectors(decoder, ids), before)
    state = decoder.state_dict()
    assert all(torch.equal(state[adapted_name(name)], weight) for name, weight in weights.items())
    adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    assert len(state) == len(weights) + len(adapters)
    assert {name.split(".")[3] for name in adapters} == set(PROJECTIONS)
    assert len(adapters) == 2 * len(PROJECTIONS) * decoder.config.num_hidden_layers
    for name, tensor in adapters.items():
        assert RANK in tensor.shape and bool(tensor.any()) == ("lora_A" in name)
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trained == adapters.keys()


def test_the_seed_alone_decides_the_initial_values(make_model: MakeModel) -> None:
    def initial(seed: int, draws_before: int) -> dict[str, Tensor]:
        decoder = make_model().decoder
        torch.manual_seed(7)
        torch.rand(draws_before)
        state = torch.get_rng_state()
        add_lora(decoder, RANK, ALPHA, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: tensor for name, tensor in decoder.state_dict().items() if "lora_A" in name}

    first, again, other = initial(3, 0), initial(3, 5), initial(4, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    # No two layers start alike either.
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in first.values()}) == len(first)


def test_training_moves_adapters_only(decoder: Decoder, ids: Tensor) -> None:
    before = vectors(decoder, ids)
    add_lora(decoder, RANK, ALPHA, seed=0)
    weights = copied(decoder)
    train(decoder, ids)
    changed = {name for name, now in decoder.state_dict().items() if not torch.equal(now, weights[name])}
    assert changed == {name for name in weights if ".lora_" in name}  # each of them
    assert apart(vectors(decoder, ids), before) > 0.1


def test_merging_keeps_vectors_and_restores_names(decoder: Decoder, ids: Tensor) -> None:
    original = copied(decoder)
    classes = {name: type(module) for name, module in decoder.named_modules()}
    attributes = set(vars(decoder))
    add_lora(decoder, RANK, ALPHA, seed=0)
    train(decoder, ids)
    adapted = vectors(decoder, ids)
    deltas = {
        name.replace(".lora_A.default", ""): decoder.state_dict()[name.replace("lora_A", "lora_B")] @ a
        for name, a in copied(decoder).items()
        if ".lora_A." in name
    }
    merge_lora(decoder)
    assert apart(vectors(decoder, ids), adapted) < 1e-5
    merged = decoder.state_dict()
    assert list(merged) == list(original)
    for name, tensor in merged.items():
        expected = original[name] + (ALPHA / RANK) * deltas[name] if name in deltas else original[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert len(deltas) == 2 * len(PROJECTIONS)
    assert {name: type(module) for name, module in decoder.named_modules()} == classes
    assert set(vars(decoder)) == attributes
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_a_merged_decoder_is_saved_and_read(
    model: Model, ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    add_lora(model.decoder, RANK, ALPHA, seed=0)
    train(model.decoder, ids)
    merge_lora(model.decoder)
    folder = tmp_path_factory.mktemp("merged")
    save_model(folder, model)
    assert torch.equal(vectors(load_model(folder).decoder, ids), vectors(model.decoder, ids))


def test_adapters_can_be_added_again_after_merging(decoder: Decoder, ids: Tensor) -> None:
    add_lora(decoder, RANK, ALPHA, seed=0)
    train(decoder, ids)
    merge_lora(decoder)
    before = vectors(decoder, ids)
    add_lora(decoder, RANK + 1, ALPHA, seed=1)
    assert torch.equal(vectors(decoder, ids), before)


def test_a_run_goes_on_from_a_state_dict(make_model: MakeModel, ids: Tensor) -> None:
    trained, resumed = make_model().decoder, make_model().decoder
    add_lora(trained, RANK, ALPHA, seed=0)
    train(trained, ids)
    add_lora(resumed, RANK, ALPHA, seed=1)
    resumed.load_state_dict(copied(trained))
    assert torch.equal(vectors(resumed, ids), vectors(trained, ids))
    train(trained, ids)
    train(resumed, ids)
    assert torch.equal(vectors(resumed, ids), vectors(trained, ids))


@pytest.mark.parametrize("alpha", [ALPHA, 0.5])
def test_the_same_adapters_give_the_same_vectors_in_transformers_with_peft(
    decoder: Decoder, ids: Tensor, alpha: float
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3Model

    theirs: nn.Module = Qwen3Model(Qwen3Config.from_dict(config_to_json(decoder.config)))
    theirs.load_state_dict(decoder.state_dict(), strict=True)
    theirs = get_peft_model(
        theirs,
        LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(PROJECTIONS)),  # type: ignore[arg-type]
    ).eval()
    before = vectors(decoder, ids)
    add_lora(decoder, RANK, alpha, seed=0)
    train(decoder, ids)
    missing, unexpected = theirs.load_state_dict(
        {f"base_model.model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    )
    assert not missing and not unexpected
    with torch.no_grad():
        expected = torch.stack(
            [theirs(input_ids=one[None]).last_hidden_state[0, -1] for one in ids.split(LENGTHS)]
        )
    ours = vectors(decoder, ids)
    assert apart(ours, expected) < 1e-5 < 1e-2 < apart(ours, before)


def test_adapters_count_in_mixed_precision_too(decoder: Decoder, ids: Tensor) -> None:
    before = vectors(decoder, ids)
    add_lora(decoder, RANK, ALPHA, seed=0)
    train(decoder, ids)
    exact = vectors(decoder, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vectors(decoder, ids).float()
    assert 1e-5 < apart(mixed, exact) < 0.1 < apart(exact, before)


def test_a_missing_library_is_one_sentence(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"install f2llm\[lora\]"):
        add_lora(decoder, RANK, ALPHA, seed=0)
