"""Damage to a model is told by its name, and a sound model is not called damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers, processors

from f2llm.model.decoder import Decoder, initialise
from f2llm.model.folder import Model
from f2llm.model.sanity import check_base
from f2llm.model.tokenizer import PAD

MakeModel = Callable[..., Model]


def of_tokenizer(change: Callable[[Tokenizer], Tokenizer]) -> Callable[[Model], Model]:
    """The model with a changed copy of its tokenizer."""

    def damage(model: Model) -> Model:
        return replace(model, tokenizer=change(Tokenizer.from_str(model.tokenizer.to_str())))

    return damage


def of_weights(change: Callable[[Decoder, int], Any]) -> Callable[[Model], Model]:
    """The model with weights changed in place; the number is EOS's."""

    def damage(model: Model) -> Model:
        with torch.no_grad():
            change(model.decoder, model.facts.eos_id)
        return model

    return damage


def without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def without_padding(tokenizer: Tokenizer) -> Tokenizer:
    """PAD, and every other token but EOS, is an ordinary one."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != PAD]
    return Tokenizer.from_str(json.dumps(content))


def without_words(tokenizer: Tokenizer) -> Tokenizer:
    """EOS and PAD are all it knows."""
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"vocab": {token["content"]: token["id"] for token in content["added_tokens"]}}
    content["model"] |= {"merges": []}
    return Tokenizer.from_str(json.dumps(content))


def eos_in_the_text(model: Model) -> Model:
    """EOS is a character that the normalizer puts at the end: there as long as nothing is cut."""
    tokenizer = without_post_processor(Tokenizer.from_str(model.tokenizer.to_str()))
    tokenizer.normalizer = normalizers.Sequence(
        [tokenizer.normalizer, normalizers.Replace(Regex("$"), "\u0003")]
    )
    eos_id = tokenizer.token_to_id("\u0103")  # the byte 3 in byte-level BPE's alphabet
    assert eos_id is not None
    return replace(model, tokenizer=tokenizer, facts=replace(model.facts, eos_id=eos_id))


def no_attention(decoder: Decoder, _: int) -> None:
    for name, parameter in decoder.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter.zero_()


def row_of_another(decoder: Decoder, eos_id: int) -> None:
    rows_VE = decoder.embed_tokens.weight
    rows_VE[eos_id] = 1.001 * rows_VE[7]


DAMAGE: dict[str, tuple[Callable[[Model], Model], str]] = {
    "no post-processor": (of_tokenizer(without_post_processor), "does not end every text"),
    "EOS in the text": (eos_in_the_text, "whole or cut"),
    "nothing to pad with": (of_tokenizer(without_padding), "only token to pad with"),
    "a row of zeros": (of_weights(lambda d, eos: d.embed_tokens.weight[eos].zero_()), "has norm 0,"),
    "a row too small": (of_weights(lambda d, eos: d.embed_tokens.weight[eos].mul_(0.02)), "was not trained"),
    "a row too large": (of_weights(lambda d, eos: d.embed_tokens.weight[eos].mul_(50)), "was not trained"),
    "a row of another token": (of_weights(row_of_another), "is that of token 7 as well"),
    "no number": (of_weights(lambda d, _: d.norm.weight[3].fill_(torch.nan)), "not finite"),
    "too large a number": (of_weights(lambda d, _: d.norm.weight[3].fill_(torch.inf)), "not finite"),
    "no attention": (of_weights(no_attention), "alike (mean cosine 1.0"),
    "weights of zeros": (of_weights(lambda d, _: d.norm.weight.zero_()), "alike"),
    "no words": (of_tokenizer(without_words), "alike (mean cosine 1.0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_told_in_one_sentence(make_model: MakeModel, name: str) -> None:
    damage, expected = DAMAGE[name]
    (sentence,) = check_base(damage(make_model()))
    assert expected in sentence


@pytest.mark.parametrize("seed", range(3))
def test_a_sound_model_is_not_called_damaged(make_model: MakeModel, seed: int) -> None:
    model = make_model(seed=seed)
    assert check_base(model) == []
    # Nor is one that training starts with.
    initialise(model.decoder, torch.Generator().manual_seed(seed))
    assert check_base(model) == []


def test_looking_changes_nothing(make_model: MakeModel) -> None:
    model = make_model()
    before, tokenizer = (
        {n: t.clone() for n, t in model.decoder.state_dict().items()},
        model.tokenizer.to_str(),
    )
    check_base(model)
    assert model.tokenizer.truncation is None and model.tokenizer.to_str() == tokenizer
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.decoder.state_dict().items())
