"""Model folders as others make them: written by transformers, around a tokenizer like Qwen3's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Qwen3's own names: PAD, what begins a message of a chat, what ends it.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="package")
def chat_tokenizer(names: list[str]) -> Tokenizer:
    """Made as Qwen3's: NFC, byte-level, nothing appended, special tokens behind the vocabulary (400 to 402)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(names, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="package")
def random_peer() -> Callable[..., Any]:
    """Makes a tiny model of transformers, of the named class; keywords are those of its `Qwen3Config`.

    Its weights are so large that nothing that a mistake would change is hidden by being small.
    """

    def make(kind: str = "Qwen3ForCausalLM", **changes: Any) -> Any:
        import transformers

        shape = {
            "vocab_size": 410,  # some rows without a token, as in Qwen3
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 640,
        }
        peer = getattr(transformers, kind)(transformers.Qwen3Config(**{**shape, **changes})).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise
        return peer

    return make


@pytest.fixture
def make_folder(
    chat_tokenizer: Tokenizer, random_peer: Callable[..., Any], tmp_path: Path
) -> Callable[..., Path]:
    """Makes the folder of a language model such as Qwen3-0.6B, anew at each call.

    Keywords: `peer` and `tokenizer` in place of random ones, `shard` as the size of weight files, and `changes`, what
    JSON files have besides, by name.
    """

    def make(
        peer: Any = None,
        tokenizer: Tokenizer = chat_tokenizer,
        shard: str = "1GB",
        changes: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        (peer or random_peer()).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save(str(folder / "tokenizer.json"))
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 131_072,
        }
        changes = {**(changes or {})}
        changes["tokenizer_config.json"] = {**said, **changes.get("tokenizer_config.json", {})}
        for name, values in changes.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**before, **values}))
        return folder

    return make
