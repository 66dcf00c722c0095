"""A language model in this process: that of the test knows nothing, so what it writes is counted and left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from f2llm.errors import UsageError
from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.stage import synthetic_stage


@pytest.fixture(scope="module")
def language_model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 language model of random weights with the tests' tokenizer."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def settings(model: str, **changes: Any) -> SyntheticStage:
    base: dict[str, Any] = {
        "stage": "synthetic",
        "model": model,
        "languages": ["eng"],
        "kinds": ["paraphrase"],
        "max_tokens": 8,
        "retries": 1,
        "language_sure": None,
    }
    return SyntheticStage(**base | changes)


def test_what_a_random_model_writes_is_counted(language_model: Path, tmp_path: Path) -> None:
    config = settings(str(language_model))
    facts = synthetic_stage(config, tmp_path / "one")
    assert (facts["tasks"], sum(facts["rows"].values())) == (0, 0)
    assert facts["requests"] == 4 and facts["faults"] == {"cut off": 4}  # two requests in vain, each twice
    assert facts["tokens_out"] == 4 * 8 and facts["tokens_assumed"] == 0

    def texts(out: Path) -> list[str]:
        lines = (out / "answers" / "answers.jsonl").read_text().splitlines()
        return [line for line in lines if "ended" in line]

    synthetic_stage(config, tmp_path / "two")
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    assert (
        len({line.partition('"text"')[2] for line in texts(tmp_path / "one")}) == 4
    )  # each from its own seed


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is no language model that transformers can load"):
        synthetic_stage(settings(str(tmp_path / "empty")), tmp_path / "out")
