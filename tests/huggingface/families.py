"""Tiny random models of the families of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
ABSENT = object()
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **NO_DROPOUT}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"head_dim": ABSENT, "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 256}
PER_LAYER = {**GEMMA, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8}

FEW: dict[str, dict[str, Any]] = {  # what makes families differ is among these
    "llama": {},
    "qwen2": {},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"num_key_value_heads": 4},
    "gpt_neox": {},
    "cohere": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": GPT2,
    "opt": OPT,
    "gpt_oss": {**EXPERTS, "sliding_window": 256},
}
PLAIN = """apertus arcee bitnet cohere2 ernie4_5 exaone4 gemma glm glm4 granite helium hunyuan_v1_dense lfm2 ministral
mistral nemotron olmo olmo2 olmo3 persimmon qwen3 seed_oss stablelm starcoder2 vaultgemma"""
SERVED: dict[str, dict[str, Any]] = {
    **FEW,
    **{family: {} for family in PLAIN.split()},
    "gemma3n_text": PER_LAYER | {"activation_sparsity_pattern": [0.0] * 2, "num_kv_shared_layers": 0},
    "gemma4_text": PER_LAYER | {"global_head_dim": 8},
    "gemma4_unified_text": {**GEMMA, "global_head_dim": 8},
    "phi3": {"original_max_position_embeddings": 512},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt_bigcode": GPT2,
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "ernie4_5_moe"), EXPERTS),
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
}
INTERFACE = "attends through the attention interface"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, INTERFACE),
    "codegen": ({**GPT2, "rotary_dim": 4}, INTERFACE),
    "deepseek_v2": (
        {**LATENT, "q_lora_rank": None, "v_head_dim": 8, "first_k_dense_replace": 2},
        "have widths 12, 12 and 8",
    ),
    "deepseek_v3": (
        {**LATENT, "q_lora_rank": 8, "v_head_dim": 8, "first_k_dense_replace": 2},
        "have widths 12, 12 and 8",
    ),
    "diffllama": ({}, "attends 2 times in each call"),
    "doge": ({}, "its attention is more than a softmax"),
    "falcon": ({"head_dim": ABSENT}, INTERFACE),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, INTERFACE),
    "gptj": ({**GPT2, "rotary_dim": 4}, INTERFACE),
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 48}, "carry positions in a way that cannot be undone"),
    "mamba": ({}, "in which none was found"),
    "minicpm3": ({**LATENT, "q_lora_rank": 8}, "have widths 12, 12 and 8"),
    "moshi": ({}, "carry positions in a way that cannot be undone"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, INTERFACE),
    "recurrent_gemma": ({}, "in which none was found"),
    "rwkv": ({}, INTERFACE),
    "xglm": ({"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, INTERFACE),
}
LEARNED_POSITIONS = {"biogpt", "gpt2", "gpt_bigcode", "opt"}
ONLY_EAGER = {"gpt_oss"}  # it has no other backend on a CPU


def tiny(family: str, attention: str = "eager", **changes: Any) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    own = SERVED[family] if family in SERVED else REFUSED[family][0]
    options = {name: value for name, value in {**COMMON, **own, **changes}.items() if value is not ABSENT}
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(std=0.3)  # at the usual start all would be nearly alike
    return model
