"""GGUF files read back by gguf's own reader, and by llama.cpp where it is installed, against the model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.conftest import LIMIT, cosines
from tokenizers import Tokenizer

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.export.export import export_model
from f2llm.export.gguf_file import encode_read_back
from f2llm.export.runtimes import llama_cpp_encode
from f2llm.files import read_object
from f2llm.model.folder import load_model, save_model
from f2llm.model.tokenizer import EOS, PAD, append_eos

gguf = pytest.importorskip("gguf", reason="the export needs gguf")

PRECISIONS = ("f16", "f32", "q8_0")


@pytest.fixture(scope="module")
def files(
    qwen_like_folder: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The model in each precision."""
    made = {}
    for precision in PRECISIONS:
        out = tmp_path_factory.mktemp("gguf") / "out"
        export_model(qwen_like_folder, out, "gguf", quantize=precision, texts=names[:5])
        made[precision] = out / f"model-{precision}.gguf"
    return made


@pytest.fixture(scope="module")
def settings(files: dict[str, Path]) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(files["f32"]).fields.items()}


def test_nothing_is_left_for_llama_cpp_to_guess(settings: dict[str, Any], qwen_like_folder: Path) -> None:
    model = load_model(qwen_like_folder)
    config, keys = model.decoder.config, gguf.Keys
    expected = {
        keys.General.ARCHITECTURE: "qwen3",
        keys.LLM.POOLING_TYPE: gguf.PoolingType.LAST,
        keys.LLM.CONTEXT_LENGTH: LIMIT,
        keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        keys.Attention.HEAD_COUNT: config.num_attention_heads,
        keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        keys.Attention.KEY_LENGTH: config.head_dim,
        keys.Attention.VALUE_LENGTH: config.head_dim,
        keys.Tokenizer.ADD_EOS: True,
        keys.Tokenizer.ADD_BOS: False,
        keys.Tokenizer.EOS_ID: model.tokenizer.token_to_id(EOS),
        keys.Tokenizer.PAD_ID: model.tokenizer.token_to_id(PAD),
        keys.Tokenizer.PRE: "qwen2",
        keys.Tokenizer.MODEL: "gpt2",
        "f2llm.matryoshka_sizes": [8, 16, 32, 64],
        "f2llm.identity": model.facts.identity,
    }
    found = {key: settings[key.format(arch="qwen3")] for key in expected}
    assert found == expected
    assert settings[keys.Rope.FREQ_BASE.format(arch="qwen3")] == pytest.approx(config.rope_theta)
    assert settings[keys.Attention.LAYERNORM_RMS_EPS.format(arch="qwen3")] == pytest.approx(
        config.rms_norm_eps
    )


def test_the_vocabulary_is_the_tokenizers(settings: dict[str, Any], qwen_like: Tokenizer) -> None:
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    size = qwen_like.get_vocab_size()
    assert tokens[:size] == [qwen_like.id_to_token(number) for number in range(size)]
    assert len(tokens) == len(kinds) == size + 4
    assert kinds[size:] == [gguf.TokenType.UNUSED] * 4
    special = [number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert special == sorted(qwen_like.get_added_tokens_decoder())
    joined = {merge.replace(" ", "") for merge in settings["tokenizer.ggml.merges"]}
    made = {token for token in tokens[:size] if len(token) > 1} - {EOS, PAD}
    assert joined == made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_the_models(files: dict[str, Path], qwen_like_folder: Path, precision: str) -> None:
    state = load_model(qwen_like_folder).decoder.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files[precision]).tensors}
    assert len(tensors) == len(state)
    # One of each kind, by the names of llama.cpp's sources; rows of 48 are no whole number of blocks.
    for ours, theirs, stored in (
        ("embed_tokens.weight", "token_embd.weight", precision),
        ("norm.weight", "output_norm.weight", "f32"),
        ("layers.1.self_attn.k_norm.weight", "blk.1.attn_k_norm.weight", "f32"),
        ("layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight", precision),
        ("layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", precision),
        (
            "layers.0.mlp.down_proj.weight",
            "blk.0.ffn_down.weight",
            "f16" if precision == "q8_0" else precision,
        ),
    ):
        tensor = tensors[theirs]
        assert tensor.tensor_type.name.lower() == stored
        weights, expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type), state[ours].numpy()
        largest = np.abs(expected).max()
        step = {"f32": 0.0, "f16": largest / 1024, "q8_0": largest / 127}[stored]
        np.testing.assert_allclose(weights, expected, atol=step, rtol=0)


@pytest.mark.parametrize(("precision", "least"), [("f32", 0.9999), ("f16", 0.9999), ("q8_0", 0.98)])
def test_our_decoder_computes_the_same_with_the_files_weights(
    files: dict[str, Path], qwen_like_folder: Path, texts: list[str], precision: str, least: float
) -> None:
    model = load_model(qwen_like_folder)
    encode = encode_read_back(files[precision], qwen_like_folder, model.decoder.config, model.facts)
    assert cosines(encode(texts), Embedder(qwen_like_folder).encode(texts)).min() > least


@pytest.mark.parametrize(("precision", "least"), [("f32", 0.999), ("f16", 0.999), ("q8_0", 0.98)])
def test_llama_cpp_gives_the_models_vectors(
    files: dict[str, Path], qwen_like_folder: Path, texts: list[str], precision: str, least: float
) -> None:
    some = [text for text in texts if text.strip()] + ["  two  spaces\nand a line, it's 1234!"]
    try:
        with llama_cpp_encode(files[precision], LIMIT) as encode:
            found_ND = encode(some)
    except F2Error as error:
        pytest.skip(str(error))
    assert cosines(found_ND, Embedder(qwen_like_folder).encode(some)).min() > least


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the library")
def test_where_llama_cpp_dies_we_live_and_say_so(
    qwen_like_folder: Path, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parity = export_model(qwen_like_folder, tmp_path / "out", "gguf", texts=names[:5])
    assert "exit code -11" in parity.note and parity.note in parity.render()
    assert parity.exported.runtime == "f2llm, weights read back"


def test_a_tokenizer_that_llama_cpp_has_no_equal_for_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no equal in llama.cpp: it changes texts by NFC, Prepend"):
        export_model(model_folder, tmp_path / "out", "gguf")
    assert not any(tmp_path.iterdir())


def test_another_way_of_splitting_is_refused(
    qwen_like_folder: Path, qwen_like: Tokenizer, tmp_path: Path
) -> None:
    changed = qwen_like.to_str().replace(r"|\\p{N}|", r"|\\p{N}{1,3}|")
    assert changed != qwen_like.to_str()
    model = load_model(qwen_like_folder)
    save_model(tmp_path / "model", replace(model, tokenizer=Tokenizer.from_str(changed)))
    with pytest.raises(UsageError, match="splits texts into words in another way"):
        export_model(tmp_path / "model", tmp_path / "out", "gguf")


def test_qwen3s_tokenizer_is_known(shared: Path, qwen_like_folder: Path) -> None:
    from f2llm.export.gguf_tokenizer import tokenizer_settings

    path = shared / "tokenizers" / "qwen3" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    append_eos(tokenizer, "<|im_end|>")
    found = tokenizer_settings(tokenizer, read_object(path), 151_936, 151_645)
    assert found["tokenizer_pre"] == "qwen2"
    assert found["token_list"][151_643:151_646] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert found["token_list"][-1] == "[PAD151935]"
    assert len(found["token_merges"]) == 151_387
