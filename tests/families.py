"""A tiny model of transformers for each row of `neurons.FAMILIES`, and what it should hold."""

from typing import Any

import torch

HIDDEN, INNER, LAYERS, EXPERTS = 8, 12, 2, 3

_OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": 2, "n_positions": 32},
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 2},
    "opt": {"hidden_size": HIDDEN, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN,
            "num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 32},
    "gpt_neox": {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
                 "num_attention_heads": 2},
    # one layer of experts, one without
    "qwen3_moe": {"mlp_only_layers": [1], "intermediate_size": 2 * INNER},
    "qwen2_moe": {"shared_expert_intermediate_size": 2 * INNER},
    "olmoe": {"head_dim": 2},
}  # fmt: skip
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
}
"""Four heads of 6 for queries, two for keys and values."""
_WITHOUT_GROUPS = ("gpt2", "bloom", "opt", "gpt_neox")


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any):
    """A model with 16 tokens and two layers; biases are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = _OWN.get(model_type, {})
    sizes = own if model_type in _WITHOUT_GROUPS else {**_LLAMA, **own}
    tokens = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**tokens, **sizes, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, a tied one once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
