"""The decoder as a GGUF file for llama.cpp: settings, tokenizer and weights in one.

What llama.cpp must not guess stands in the file: that the last token is pooled, that EOS is appended, and which token
EOS is. Names and settings are those of its own converter for Qwen3. Weights are written one at a time.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from f2llm.embed.embedder import truncate
from f2llm.export.gguf_tokenizer import tokenizer_settings
from f2llm.export.runtimes import Encode, Vectors, require
from f2llm.files import read_object
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.model.folder import ModelFacts, weight_files
from f2llm.model.tensor_files import open_tensors
from f2llm.model.tokenizer import encode
from f2llm.tokenizer_file import load_tokenizer

ARCHITECTURE = "qwen3"
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(source: Path, path: Path, config: DecoderConfig, facts: ModelFacts, precision: str) -> None:
    """Write one file.

    Args:
        source: a model folder.
        precision: "f32", "f16" or "q8_0", of the matrices. Norms stay in float32; a matrix whose rows are no multiple
            of 32 long is written in f16 where q8_0 was asked for, as llama.cpp's own converter does.

    Raises:
        UsageError: llama.cpp has no way to tokenise as the model's tokenizer.json does.
    """
    gguf = require("gguf")
    tokenizer, description = load_tokenizer(source / "tokenizer.json"), read_object(source / "tokenizer.json")
    settings = tokenizer_settings(tokenizer, description, config.vocab_size, facts.eos_id)
    settings |= _model_settings(gguf, config, facts, precision)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    # What GGUF has no name for.
    writer.add_string("f2llm.identity", facts.identity)
    writer.add_array("f2llm.matryoshka_sizes", facts.matryoshka_sizes)
    writer.add_string("f2llm.instruction", facts.instruction)
    writer.add_string("f2llm.template", facts.template)
    written = _written_names(gguf, config)
    with open_tensors(weight_files(source)) as tensors:
        kinds = {name: _kind(gguf, shape, precision) for name, shape in tensors.shapes.items()}
        for name, kind in kinds.items():
            shape = tensors.shapes[name]
            size = prod(gguf.quant_shape_to_byte_shape(shape, kind))
            writer.add_tensor_info(written[name], shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            writer.write_tensor_data(gguf.quants.quantize(tensors.read(name).numpy(), kind))
    writer.close()


def encode_read_back(path: Path, source: Path, config: DecoderConfig, facts: ModelFacts) -> Encode:
    """From texts to unit vectors by our decoder with a GGUF file's weights, and the model's own tokenizer.

    It tells what the precision costs, not whether llama.cpp reads the file.
    """
    tokenizer, decoder = load_tokenizer(source / "tokenizer.json"), read_gguf_decoder(path, config)

    @torch.inference_mode()
    def encode_texts(texts: Sequence[str]) -> Vectors:
        ids = encode(tokenizer, texts, eos_id=facts.eos_id, max_length=facts.max_length, too_long="truncate")
        return np.concatenate([truncate(forward(decoder, [one]).numpy(), config.hidden_size) for one in ids])

    return encode_texts


def read_gguf_decoder(path: Path, config: DecoderConfig) -> Decoder:
    """Our decoder with the weights of a GGUF file, as float32."""
    gguf = require("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with torch.device("meta"):
        decoder = Decoder(config)
    state = {}
    for name, written in _written_names(gguf, config).items():
        weights = gguf.quants.dequantize(tensors[written].data, tensors[written].tensor_type)
        state[name] = torch.from_numpy(np.array(weights, np.float32))
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()


def _model_settings(gguf: Any, config: DecoderConfig, facts: ModelFacts, precision: str) -> dict[str, Any]:
    """Values by the names of gguf's writer."""
    return {
        "type": gguf.GGUFType.MODEL,
        "file_type": getattr(gguf.LlamaFileType, FILE_TYPES[precision]),
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "block_count": config.num_hidden_layers,
        "context_length": facts.max_length,  # longer texts it was not trained on
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
        "pooling_type": gguf.PoolingType.LAST,
    }


def _written_names(gguf: Any, config: DecoderConfig) -> dict[str, str]:
    """Our names of all tensors -> GGUF's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    with torch.device("meta"):
        return {name: names.get_name(f"model.{name}", (".weight",)) for name in Decoder(config).state_dict()}


def _kind(gguf: Any, shape: tuple[int, ...], precision: str) -> Any:
    """The precision in which a tensor is written."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or precision == "f32":
        return kinds.F32
    block, _ = gguf.GGML_QUANT_SIZES[kinds.Q8_0]
    return kinds.Q8_0 if precision == "q8_0" and shape[-1] % block == 0 else kinds.F16
