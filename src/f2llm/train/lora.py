"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, put into the decoder in place.

A linear layer's weight W stays as it is and becomes W + (alpha / rank) * B @ A, with A [rank, in] drawn at random and
B [out, rank] zero, so that training starts at the model itself. The decoder stays our class: its layers are called as
before, adapters stand in its state dict, and after merging nothing tells that they were there.
"""

import torch

from f2llm.errors import UsageError
from f2llm.model.decoder import Decoder

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(decoder: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Give all seven linear projections of each layer an adapter; only adapters require gradients from then on.

    Args:
        decoder: changed in place. `layers.0.mlp.up_proj.weight` becomes `layers.0.mlp.up_proj.base_layer.weight`,
            beside `...up_proj.lora_A.default.weight` [rank, in] and `...up_proj.lora_B.default.weight` [out, rank],
            of the same dtype and on the same device. What the decoder computes stays the same.
        rank: inner width of each adapter.
        alpha: adapters count alpha / rank times.
        seed: of the adapters' initial values; the global generators are left as they were.

    Raises UsageError if peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError(
            "LoRA needs the library peft, which is missing; install f2llm[lora], or train without lora."
        ) from None
    # Alpha is a whole number by peft's annotation alone: it is only ever divided by the rank.
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))  # type: ignore[arg-type]
    # peft draws on the CPU, wherever the decoder is; torch.manual_seed would seed the generators of GPUs as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, decoder)


def merge_lora(decoder: Decoder) -> None:
    """Add each adapter to the weight it belongs to and take it away, in place; all weights require gradients again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            decoder.set_submodule(name, module.get_base_layer())
    del decoder.peft_config  # where peft notes what it added
    decoder.requires_grad_(True)
