"""Pruning: what is always zero can go without a trace, and what is kept is what mattered most."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from f2llm.compress.calibration import Row
from f2llm.compress.cutting import (
    Kept,
    as_ranges,
    cut_config,
    cut_shapes,
    cut_tensor,
    from_ranges,
    kept_of_the_uncut,
    strongest,
)
from f2llm.compress.layerwise import Scores
from f2llm.compress.prune import _layers, contrastive_loss, prune_model, prune_stage
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.model.base import load_base
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.model.folder import Model, load_model, save_model
from f2llm.model.tensor_files import TensorFiles
from f2llm.recipe import PruneStage
from f2llm.train.terms import token_ids

MakeModel = Callable[..., Model]
TEXTS = ["lion", "Ujerumani", "éléphant éléphant", "सफ़ेद कुत्ता", "", "德国 印度"]


def vectors(decoder: Decoder, model: Model) -> Tensor:
    with torch.no_grad():
        return forward(decoder, token_ids(model, TEXTS, 96))


def silence_hidden_units(decoder: Decoder, units: Sequence[int]) -> None:
    """Make the residual stream zero at `units`, whatever the text: nothing writes there."""
    for name, weight in decoder.state_dict().items():  # which shares its memory with the decoder
        if "embed_tokens" in name:
            weight[:, units] = 0
        elif "o_proj" in name or "down_proj" in name:
            weight[units] = 0


def silence_mlp_units(decoder: Decoder, units: Sequence[int]) -> None:
    for name, weight in decoder.state_dict().items():
        if "up_proj" in name:
            weight[units] = 0


def silence_group(decoder: Decoder, layer: int, group: int) -> None:
    """Make what a key/value head gives to its query heads zero."""
    width = decoder.config.head_dim
    decoder.state_dict()[f"layers.{layer}.self_attn.v_proj.weight"][group * width : (group + 1) * width] = 0


def silence_layer(decoder: Decoder, layer: int) -> None:
    for name, weight in decoder.state_dict().items():
        if name.startswith(f"layers.{layer}.") and ("o_proj" in name or "down_proj" in name):
            weight.zero_()


def everything(decoder: Decoder) -> Kept:
    config = decoder.config
    layers = list(range(config.num_hidden_layers))
    return Kept(
        hidden_E=torch.arange(config.hidden_size),
        layers=layers,
        mlp=[torch.arange(config.intermediate_size) for _ in layers],
        groups=[torch.arange(config.num_key_value_heads) for _ in layers],
    )


class InMemory(TensorFiles):
    """A decoder's tensors in its own dtype."""

    def __init__(self, decoder: Decoder) -> None:
        self._tensors = decoder.state_dict()

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_rows(self, name: str, rows_R: Sequence[int]) -> Tensor:
        return self._tensors[name][list(rows_R)]


def cut(decoder: Decoder, kept: Kept) -> Decoder:
    """The decoder of what is kept."""
    config = cut_config(decoder.config, kept)
    state = {}
    for name in cut_shapes(config):
        tensor = cut_tensor(InMemory(decoder), decoder.config, kept, name)
        state[name] = tensor if isinstance(tensor, Tensor) else torch.cat(list(tensor))
    small = Decoder(config)
    small.load_state_dict(state, assign=True)
    return small.eval()


def but(count: int, *gone: int) -> Tensor:
    return torch.tensor([i for i in range(count) if i not in gone])


# --- Cutting


def test_keeping_everything_changes_nothing(make_model: MakeModel) -> None:
    decoder = make_model().decoder
    whole = cut(decoder, everything(decoder))
    assert whole.config == decoder.config
    expected = decoder.state_dict()
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
    zero = [0, 3, 7, 8, 15, 23]
    silence_hidden_units(decoder, zero)
    before = vectors(decoder, model)
    assert torch.equal(before[:, zero], torch.zeros(len(TEXTS), len(zero), dtype=torch.float64))
    kept_E = but(24, *zero)
    after = vectors(cut(decoder, replace(everything(decoder), hidden_E=kept_E)), model)
    torch.testing.assert_close(after, before[:, kept_E], rtol=1e-6, atol=1e-6)


def test_mlp_units_that_are_always_zero_can_go(make_model: MakeModel) -> None:
    model = make_model()
    decoder = model.decoder.double()
    silence_mlp_units(decoder, [1, 2, 20, 39])
    before = vectors(decoder, model)
    small = cut(decoder, replace(everything(decoder), mlp=[but(40, 1, 2, 20, 39)] * 2))
    assert small.config.intermediate_size == 36
    torch.testing.assert_close(vectors(small, model), before, rtol=1e-6, atol=1e-6)


def test_groups_of_heads_that_are_always_zero_can_go(make_model: MakeModel) -> None:
    """A key/value head goes with the two query heads that share it, another one in each layer."""
    model = make_model(num_attention_heads=6, num_key_value_heads=3)
    decoder = model.decoder.double()
    silence_group(decoder, 0, 1)
    silence_group(decoder, 1, 0)
    before = vectors(decoder, model)
    small = cut(decoder, replace(everything(decoder), groups=[but(3, 1), but(3, 0)]))
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    torch.testing.assert_close(vectors(small, model), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_layers_that_add_nothing_can_go(make_model: MakeModel, silent: int) -> None:
    model = make_model(num_hidden_layers=3)
    decoder = model.decoder.double()
    silence_layer(decoder, silent)
    before = vectors(decoder, model)
    whole, left = everything(decoder), but(3, silent).tolist()
    small = cut(decoder, replace(whole, layers=left, mlp=whole.mlp[:2], groups=whole.groups[:2]))
    assert small.config.num_hidden_layers == 2
    torch.testing.assert_close(vectors(small, model), before, rtol=1e-6, atol=1e-6)


def test_each_layer_keeps_its_own_units(make_model: MakeModel) -> None:
    decoder = make_model(num_hidden_layers=3).decoder
    kept = Kept(
        torch.tensor([2, 3, 11]),
        [0, 2],
        [torch.tensor([0, 5]), torch.tensor([7, 39])],
        [torch.tensor([1]), torch.tensor([0])],
    )
    small, source = cut(decoder, kept).state_dict(), decoder.state_dict()
    for new, (old, units, group) in enumerate(((0, [0, 5], 1), (2, [7, 39], 0))):
        after, before = f"layers.{new}.", f"layers.{old}."
        up = source[before + "mlp.up_proj.weight"][units][:, [2, 3, 11]]
        assert torch.equal(small[after + "mlp.up_proj.weight"], up)
        down = source[before + "mlp.down_proj.weight"][[2, 3, 11]][:, units]
        assert torch.equal(small[after + "mlp.down_proj.weight"], down)
        queries = slice(16 * group, 16 * group + 16)  # two heads of width 8 to a group
        out = source[before + "self_attn.o_proj.weight"][[2, 3, 11]][:, queries]
        assert torch.equal(small[after + "self_attn.o_proj.weight"], out)
        keys = source[before + "self_attn.k_proj.weight"][8 * group : 8 * group + 8][:, [2, 3, 11]]
        assert torch.equal(small[after + "self_attn.k_proj.weight"], keys)
        name = "self_attn.q_norm.weight"
        assert torch.equal(small[after + name], source[before + name])
    assert torch.equal(small["embed_tokens.weight"], source["embed_tokens.weight"][:, [2, 3, 11]])
    torch.testing.assert_close(small["norm.weight"], source["norm.weight"][[2, 3, 11]] * (24 / 3) ** 0.5)


# --- Choosing


def test_strongest_units_in_ascending_order() -> None:
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 7.0, 0.0])
    assert strongest(scores, 3).tolist() == [1, 3, 4]
    assert strongest(scores, 2).tolist() == [1, 3]  # the first of equals
    assert strongest(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_loss_is_the_in_batch_softmax_without_what_is_known_to_be_right() -> None:
    rows = [
        Row("a", ["x", "y"], "one"),
        Row("b", ["y"], None),  # an answer to a as well
        Row("c", ["z"], "one"),  # of the same thing as a
        Row("d", ["w"], None),
    ]
    vectors_NE = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.tensor(0.0, dtype=torch.float64)
    not_a_negative = {(0, 1), (0, 2), (2, 0)}
    for size, weight in ((16, 1.0), (8, 1 / (2 * 2**0.5))):  # Matryoshka weights of the reference code
        unit = F.normalize(vectors_NE[:, :size], dim=-1)
        for i in range(4):
            against = [j for j in range(4) if (i, j) not in not_a_negative]
            scores = torch.stack([unit[i] @ unit[4 + j] for j in against]) / 0.05
            expected -= weight * scores.log_softmax(0)[against.index(i)] / 4
    torch.testing.assert_close(contrastive_loss(rows, [8, 16])(vectors_NE), expected)
    with pytest.raises(UsageError, match="two or more rows"):
        contrastive_loss(rows[:1], [16])


# --- What is said of it


@pytest.mark.parametrize("numbers", [[0], [3, 4], [0, 1, 2, 5, 7, 8], [1, 3, 5], list(range(100))])
def test_ranges_are_read_back_as_they_were(numbers: list[int]) -> None:
    assert from_ranges(as_ranges(numbers)) == numbers
    assert len(as_ranges(numbers)) <= len(json.dumps(numbers))


def test_ranges_look_like_this() -> None:
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_what_an_early_version_cut_says_only_its_hidden_units(make_model: MakeModel) -> None:
    model = make_model()
    facts = replace(model.facts, kept={"of": "uncut", "hidden": list(range(0, 48, 2))})
    kept = replace(everything(model.decoder), hidden_E=torch.tensor([0, 3, 5]))
    assert kept_of_the_uncut(facts, model.decoder.config, kept) == {"of": "uncut", "hidden": [0, 6, 10]}


# --- The stage


@pytest.fixture
def parent(make_model: MakeModel, tmp_path: Path) -> Path:
    """A model of which much is never anything but zero.

    Two thirds of the hidden units, half of the MLP units, a group of heads (another one in each layer), and layer 1.
    """
    model = make_model(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3)
    silence_hidden_units(model.decoder, [*range(0, 48, 3), *range(1, 48, 3)])
    silence_mlp_units(model.decoder, range(0, 40, 2))
    for layer, group in ((0, 2), (2, 0), (3, 1)):
        silence_group(model.decoder, layer, group)
    silence_layer(model.decoder, 1)
    save_model(tmp_path / "parent", model)
    return tmp_path / "parent"


def prune(parent: Path, rows: Path, out: Path, **changes: Any) -> dict[str, object]:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "layers": 3,
        "heads": 4,
        "depth": "change",
        "calibration_texts": 30,
        **changes,
    }
    config = PruneStage(stage="prune", model="parent", data="rows", **settings)
    return prune_stage(config, model=parent, data=rows, out=out, seed=0, recipe_hash="r")


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_stage_finds_what_matters(
    parent: Path, rows_folder: Path, names: list[str], score: str, tmp_path: Path
) -> None:
    facts = prune(parent, rows_folder, tmp_path / "small", score=score)
    large, small = Embedder(parent), Embedder(tmp_path / "small")
    kept = small.facts.kept
    assert kept == {
        "of": large.identity,
        "hidden": list(range(2, 48, 3)),
        "layers": [0, 2, 3],
        "mlp": [as_ranges(range(1, 40, 2))] * 3,
        "kv_groups": ["0-1", "1-2", "0,2"],
    }
    before = large.encode(names, normalize=False)[:, kept["hidden"]]
    after = small.encode(names, normalize=False)
    assert abs(after - before).max() < 1e-4 * abs(before).max()
    assert (small.dim, small.sizes) == (16, [8, 16])
    assert facts["identity"] == small.identity and facts["parameters"] == small.parameters
    assert (small.facts.parent, small.facts.recipe) == (large.identity, "r")
    assert small.facts.instruction == large.facts.instruction
    assert (small.facts.max_length, small.facts.eos_id) == (large.facts.max_length, large.facts.eos_id)


def test_by_default_the_first_layers_and_all_heads_stay(
    model_folder: Path, rows_folder: Path, tmp_path: Path
) -> None:
    prune(model_folder, rows_folder, tmp_path / "x", hidden_size=13, layers=1, heads=None, depth="first")
    kept = load_model(tmp_path / "x").facts.kept
    assert kept is not None
    assert kept["layers"] == [0] and kept["kv_groups"] == ["0-1"]
    assert len(kept["hidden"]) == 13 and len(from_ranges(kept["mlp"][0])) == 20
    assert all(a < b for a, b in pairwise(kept["hidden"]))


def test_what_is_kept_of_a_cut_model_is_numbered_as_in_the_uncut_one(
    parent: Path, rows_folder: Path, tmp_path: Path
) -> None:
    prune(parent, rows_folder, tmp_path / "small")
    sizes = {"hidden_size": 8, "intermediate_size": 6, "layers": 2, "heads": 2}
    prune(tmp_path / "small", rows_folder, tmp_path / "smaller", **sizes)
    uncut, smaller = load_model(parent).decoder, load_model(tmp_path / "smaller")
    kept = smaller.facts.kept
    assert kept and kept["of"] == Embedder(parent).identity
    again = Kept(
        torch.tensor(kept["hidden"]),
        kept["layers"],
        *([torch.tensor(from_ranges(one)) for one in kept[name]] for name in ("mlp", "kv_groups")),
    )
    expected = cut(uncut, again).state_dict()
    for name, tensor in smaller.decoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])  # norms are multiplied twice


@pytest.mark.parametrize(
    ("size", "got", "has"),
    [("hidden_size", 49, 48), ("intermediate_size", 41, 40), ("layers", 5, 4), ("heads", 8, 6)],
)
def test_sizes_beyond_the_parents_are_refused(
    parent: Path, rows_folder: Path, tmp_path: Path, size: str, got: int, has: int
) -> None:
    with pytest.raises(UsageError, match=rf"\b{got}\b.*\b{has}\b"):
        prune(parent, rows_folder, tmp_path / "small", **{size: got})
    assert not (tmp_path / "small").exists()


# --- The command


@pytest.fixture
def foreign(make_model: MakeModel, tmp_path: Path) -> Path:
    """A language model in bf16 and several files, as transformers writes it, with an output head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = make_model(num_hidden_layers=3)
    shape = {name: getattr(model.decoder.config, name) for name in model.decoder.config.__dict__}
    peer = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False))
    peer.model.load_state_dict(model.decoder.state_dict())
    folder = tmp_path / "foreign"
    peer.bfloat16().save_pretrained(folder, max_shard_size="20KB")
    model.tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_even_depth_keeps_the_first_layer_the_last_and_some_between(layers: int, kept: list[int]) -> None:
    one = torch.ones(4, 8)
    scores = Scores(hidden_E=one[0], mlp=list(one), groups=list(one), change=torch.arange(4.0))
    assert _layers(scores, layers, "even") == kept
    assert _layers(scores, layers, "change") == list(range(4 - layers, 4))


@pytest.fixture
def texts(names: list[str], tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(names))
    return tmp_path / "texts.txt"


def test_a_foreign_model_is_cut_as_its_decoder_in_memory_would_be(
    foreign: Path, texts: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 17, "intermediate_size": 30, "layers": 2, "heads": 2}
    pruned = prune_model(foreign, tmp_path / "small", calibration=[texts], depth="change", **sizes)  # type: ignore[arg-type]
    base = load_base(foreign)
    kept = pruned.facts.kept
    assert kept is not None and kept["of"] == base.facts.identity
    expected = cut(
        base.decoder,
        Kept(
            torch.tensor(kept["hidden"]),
            kept["layers"],
            *([torch.tensor(from_ranges(one)) for one in kept[name]] for name in ("mlp", "kv_groups")),
        ),
    )
    small = load_model(tmp_path / "small")
    assert small.decoder.config == expected.config
    assert pruned.shape.parameters == sum(p.numel() for p in small.decoder.parameters())
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.decoder.state_dict().items())


def test_a_pruned_folder_gives_our_vectors_elsewhere(foreign: Path, texts: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    out = tmp_path / "small"
    prune_model(foreign, out, calibration=[texts], hidden_size=16, intermediate_size=30, layers=2, heads=2)
    ours = Embedder(out).encode(TEXTS)
    theirs = SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    assert abs(ours - theirs).max() < 1e-5
    model, tokenizer = (kind.from_pretrained(out) for kind in (AutoModel, AutoTokenizer))
    assert model.config.hidden_size == 16 and model.config.num_hidden_layers == 2
    for text, own in zip(TEXTS, ours, strict=True):
        with torch.no_grad():
            last = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0, -1]
        torch.testing.assert_close(F.normalize(last, dim=0), torch.from_numpy(own), rtol=1e-4, atol=1e-5)


def test_a_budget_gives_the_best_shape_and_names_others(
    make_model: MakeModel, texts: Path, tmp_path: Path
) -> None:
    model = make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    save_model(tmp_path / "large", model)
    whole = sum(p.numel() for p in model.decoder.parameters())
    pruned = prune_model(tmp_path / "large", tmp_path / "small", calibration=[texts], parameters=whole // 3)
    small = load_model(tmp_path / "small").decoder
    assert sum(p.numel() for p in small.parameters()) == pruned.shape.parameters
    assert abs(pruned.shape.parameters - whole / 3) <= 0.02 * whole / 3
    assert all(other.spread >= pruned.shape.spread for other in pruned.others)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"score": "magnitude"}, "score is 'magnitude'; expected 'activation' or 'taylor'"),
        ({"depth": "last"}, "depth is 'last'; expected 'first' or 'change'"),
        ({"calibration_texts": 0}, "calibration_texts is 0"),
    ],
)
def test_unknown_choices_are_refused(
    parent: Path, texts: Path, tmp_path: Path, choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prune_model(parent, tmp_path / "small", calibration=[texts], hidden_size=8, **choice)


KILLED = """
import os, sys
from pathlib import Path
from f2llm.compress import cutting, prune
cut = cutting.cut_tensor
def die(weights, config, kept, name):
    if name == "layers.1.mlp.up_proj.weight":
        os._exit(9)
    return cut(weights, config, kept, name)
prune.cut_tensor = die
prune.prune_model(sys.argv[1], Path(sys.argv[2]), calibration=[Path(sys.argv[3])], hidden_size=8)
"""


def test_killed_half_way_leaves_no_folder_and_can_be_started_again(
    parent: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    before = set(tmp_path.iterdir())
    run = subprocess.run([sys.executable, "-c", KILLED, str(parent), str(out), str(texts)])
    assert run.returncode == 9 and not out.exists()
    prune_model(parent, out, calibration=[texts], hidden_size=8)
    assert load_model(out).decoder.config.hidden_size == 8
    assert set(tmp_path.iterdir()) == {*before, out}


def test_a_folder_that_is_there_is_left_alone(parent: Path, texts: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    with pytest.raises(UsageError, match="is there already"):
        prune_model(parent, parent, calibration=[texts], hidden_size=8)
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


def test_a_mistake_leaves_nothing_behind(parent: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError):
        prune_model(parent, tmp_path / "small", calibration=[tmp_path / "absent.txt"], hidden_size=8)
    assert set(tmp_path.iterdir()) == before


PEAK = """
import sys
from pathlib import Path
from f2llm.compress.prune import prune_model
from f2llm.runtime import keep_memory, peak_memory
keep_memory()
source, out, texts, score = sys.argv[1:]
prune_model(source, Path(out), calibration=[Path(texts)], hidden_size=256, intermediate_size=2048, score=score)
print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_peak_memory_does_not_grow_with_the_layers(
    make_model: MakeModel, rows_folder: Path, score: str, tmp_path: Path
) -> None:
    few, many = 6, 24  # with few, how the allocator cuts its memory shows more than the layers do
    peaks = {}
    for layers in (few, many):
        model = make_model(hidden_size=512, intermediate_size=4096, num_hidden_layers=layers)
        folder = tmp_path / "large"
        save_model(folder, model)
        (folder / "f2llm.json").unlink()  # which would not agree with other weights
        state = {name: tensor.bfloat16() for name, tensor in model.decoder.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        out = tmp_path / "small"
        command = [sys.executable, "-c", PEAK, str(folder), str(out), str(rows_folder), score]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        peaks[layers] = int(run.stdout)
        shutil.rmtree(out)
    a_layer = 3 * 512 * 4096 * 4  # bytes in float32
    assert peaks[many] - peaks[few] < (many - few) * a_layer / 5  # in bf16, all of them would take half
