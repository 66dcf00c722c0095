"""Model folders: what goes in comes out, and whatever is not what it should be is refused in one sentence."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from f2llm.errors import F2Error
from f2llm.model.folder import Model, load_decoder, load_model, model_size, save_model
from f2llm.model.tokenizer import train_bpe

MakeModel = Callable[..., Model]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in {**values, **changes}.items() if v is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path) -> str:
    """The sentence with which the folder is refused."""
    with pytest.raises(F2Error) as refusal:
        load_model(folder)
    sentence = str(refusal.value)
    assert str(folder) in sentence and "\n" not in sentence
    return sentence


# --- A round trip


def test_what_is_saved_is_loaded(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_key_value_heads=4, rope_theta=1234.5, rms_norm_eps=3e-5)
    facts = replace(model.facts, parent="p", recipe="r", kept={"hidden": [1, 2]}, template="{instruction}: ")
    written = save_model(tmp_path, replace(model, facts=facts))
    loaded = load_model(tmp_path)
    assert loaded.decoder.config == model.decoder.config
    assert loaded.facts == written == replace(facts, identity=written.identity)
    assert loaded.tokenizer.to_str() == model.tokenizer.to_str()
    expected = model.decoder.state_dict()
    assert {name: t.shape for name, t in loaded.decoder.state_dict().items()} == {
        name: t.shape for name, t in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.decoder.state_dict().items())
    assert not loaded.decoder.training


def test_the_files_are_those_of_the_legacy_layout(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "f2llm.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / "2_Normalize").is_dir()


def test_what_other_readers_need_is_there(folder: Path) -> None:
    """TEI, vLLM and llama.cpp require these keys; they are not run here."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"] and config["model_type"] == "qwen3"
    assert config["is_matryoshka"] is True and config["matryoshka_dimensions"] == [8, 16, 24]
    assert config["max_position_embeddings"] >= 64
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [name for name, value in pooling.items() if value is True] == [
        "pooling_mode_lasttoken",
        "include_prompt",
    ]
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= pooling.keys()
    assert pooling["word_embedding_dimension"] == 24
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[1] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Normalize"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["padding_side"] == "left" and tokenizer["pad_token"] != tokenizer["eos_token"]


def test_a_decoder_is_read_from_a_causal_language_model_of_half_precision(folder: Path) -> None:
    """Such folders prefix their tensors and may hold an output head; weights become float32."""
    expected = load_decoder(folder).state_dict()

    def as_language_model(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name).to(torch.bfloat16)
        tensors["lm_head.weight"] = torch.zeros(2, 2)

    change_tensors(folder, as_language_model)
    got = load_decoder(folder).state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(torch.bfloat16).float())


def test_model_size_counts_every_parameter(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert model_size(load_decoder(folder)) == sum(tensor.numel() for tensor in tensors.values())


# --- Identity


def test_identity_is_of_weights_tokenizer_and_template(
    make_model: MakeModel, names: list[str], tmp_path: Path
) -> None:
    model = make_model()
    other_tokenizer: Tokenizer = train_bpe(names, 400)
    variants = {
        "the same": model,
        "other notes": replace(model, facts=replace(model.facts, recipe="r", parent="p", instruction="i")),
        "weights": make_model(seed=1),
        "tokenizer": replace(model, tokenizer=other_tokenizer),
        "template": replace(model, facts=replace(model.facts, template="{instruction} ")),
    }
    identity = {name: save_model(tmp_path / name, variant).identity for name, variant in variants.items()}
    assert identity["the same"] == identity["other notes"]
    assert len(set(identity.values())) == 4
    assert all(len(value) == 64 for value in identity.values())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_other_byte_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    if name == "tokenizer.json":
        changed = content.replace(b'"version":"1.0"', b'"version": "1.0"', 1)
    else:
        changed = content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]
    assert changed != content
    (folder / name).write_bytes(changed)
    assert "changed after it was written" in refused(folder)


def test_a_changed_template_is_refused(folder: Path) -> None:
    change_json(folder / "f2llm.json", template="Query ")
    assert "changed after it was written" in refused(folder)


# --- Bad folders


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "not a model folder" in refused(tmp_path)
    assert "not a model folder" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["f2llm.json", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["f2llm.json", "config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_file_cut_short_is_named(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["f2llm.json", "config.json"])
def test_json_that_is_no_object_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("[1, 2]")
    assert name in refused(folder)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_schema_version_is_refused(folder: Path, version: object) -> None:
    change_json(folder / "f2llm.json", schema_version=version)
    sentence = refused(folder)
    assert f"schema_version {version!r}, expected 1" in sentence


def test_a_missing_or_unknown_fact_is_named(folder: Path) -> None:
    change_json(folder / "f2llm.json", eos_id=None)
    assert "eos_id" in refused(folder)
    change_json(folder / "f2llm.json", eos_id=0, surprise=1)
    assert "surprise" in refused(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("layers.1.mlp.up_proj.weight"))
    sentence = refused(folder)
    assert "lacks 1 tensors" in sentence and "layers.1.mlp.up_proj.weight" in sentence


def test_surplus_tensors_are_named(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors.update({"layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    )
    assert "layers.0.self_attn.q_proj.bias" in refused(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(23)}))
    sentence = refused(folder)
    assert "norm.weight" in sentence and "[23]" in sentence and "[24]" in sentence


def test_a_config_of_another_shape_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=3)
    assert "layers.2" in refused(folder)


class Trap:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_folder_with_only_a_pickle_is_refused_and_the_pickle_not_opened(
    folder: Path, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    assert "model.safetensors" in refused(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    assert "model.safetensors" in refused(folder)
    assert not sprung.exists()
    pickle.loads((folder / "model.safetensors").read_bytes())
    assert sprung.exists()  # the trap works
