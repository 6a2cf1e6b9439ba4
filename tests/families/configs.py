"""A tiny config for every text family of transformers: the usual names of sizes, made small wherever a config has them.

The families are those of transformers' own mappings, so a family that comes with a new version is tried without a line
here. CHANGES holds what a family needs besides: sizes of another name, or values that must fit together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

VOCABULARY = 96
WINDOW = 16  # of every window and chunk
SPECIALS: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 4}  # as tests/task_nets.py
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "emb_dim",
            "embed_dim",
            "embedding_size",
            "dim_model",
            "entity_emb_size",
            "sub_key_dim",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "d_inner",
            "mlp_dim",
            "dff",
            "dim_ff",
            "feed_forward_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "hidden_dim",
            "block_ff_dim",
        ),
        96,
    ),
    "moe_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "router_hidden_size": 16,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
        ),
        4,
    ),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "attention_head_size": 16,
    "vocab_size": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "src_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "entity_vocab_size": 8,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"), 256),
    **dict.fromkeys(
        (
            "sliding_window",
            "attention_chunk_size",
            "window_size",
            "chunk_size",
            "attention_window_size",
            "mamba_chunk_size",
        ),
        WINDOW,
    ),
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "mamba_d_state": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "zero_expert_num": 2,
    "num_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "d_rel": 8,
    "image_size": 32,
    "hidden_size_global": 64,
    "patch_size": 16,
    "lru_width": 64,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    **SPECIALS,
}
SPARSE = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
LINEAR_AND_FULL = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear")
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in LINEAR_AND_FULL},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "esm": {"mask_token_id": 5, "pad_token_id": 0},
    "lilt": {"hidden_size": 96},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "longcat_flash": {"head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "cpmant": {
        "prompt_types": 4,
        "prompt_length": 2,
        "segment_types": 4,
        "dim_head": 16,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32},
    },
    "dots1": {"max_window_layers": 1},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 8},
    "gemma4_text": {"global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    "qwen4_exp_text": {
        **SPARSE,
        "layer_types": ["linear_attention", "qwen_sparse_attention"],
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "attn_layers": ["local", "lsh"],
        "hash_seed": 1,
    },
    "zamba": {"n_mamba_heads": 2, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "n_mamba_heads": 4,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
        "num_hidden_layers": 4,
        "num_mem_blocks": 1,  # the block of both is one
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "markuplm": {
        "tag_pad_id": 7,
        "subs_pad_id": 15,
        "xpath_unit_hidden_size": 4,
        "max_xpath_tag_unit_embeddings": 8,
        "max_xpath_subs_unit_embeddings": 16,
    },
    "canine": {"num_hash_buckets": 64},
    "phi4_multimodal": SPECIALS,
    "encoder-decoder": {
        "encoder": BERT,
        "decoder": BERT | {"is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
}


@dataclass(frozen=True)
class Entry:
    """A family for a task. config_class, model_class: of transformers."""

    family: str
    task: str
    config_class: Any
    model_class: Any

    @property
    def name(self) -> str:
        return f"{self.family}:{self.task}"


def entries() -> Iterator[Entry]:
    """Every family that transformers maps to a language model, a classifier of sequences or an encoder-decoder."""
    import transformers

    mappings = {
        "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "seq2seq": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    for task, mapping in mappings.items():
        known: set[str] = set()
        for config_class in mapping.keys():  # noqa: SIM118 - no dict, and iterating over it loads every model
            if config_class.model_type not in known:
                known.add(config_class.model_type)
                yield Entry(config_class.model_type, task, config_class, mapping[config_class])


def tiny_config(config_class: Any) -> Any:
    """A small config of this class. Raises what transformers raises where the sizes do not fit together."""
    names = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", ())}
    names |= set(getattr(config_class, "attribute_map", ()))
    values = {name: value for name, value in SIZES.items() if name in names}
    changes = deepcopy(CHANGES.get(config_class.model_type, {}))  # encoder-decoder takes its dicts apart
    parts = getattr(config_class, "sub_configs", None) or {}
    if parts:
        usual = config_class(**deepcopy(changes))
        found = {name: getattr(usual, name, None) for name in parts}
        values |= {name: tiny_config(type(part)) for name, part in found.items() if part is not None}
    if not parts:
        values |= {name: value for name, value in SPECIALS.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has keys for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    return config_class(**(values | changes))


def config_of(entry: Entry) -> Any:
    """The tiny config of a family for a task; as a language model, what can be a decoder is one."""
    config = tiny_config(entry.config_class)
    if entry.task == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder, config.is_encoder_decoder = True, False
    return config
