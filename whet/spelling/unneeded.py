"""Other tools' settings that a recipe may have and whet does not need, with the reason that is said of each.

What would change what is learned does not stand here but in `NOT_THERE`: it is accepted where it is off, and refused
otherwise. Sources: as of `translations`.
"""

from __future__ import annotations

from typing import Any

IGNORED: dict[str, str] = {
    "whet finishes a run, continues it or leaves it alone, and overwrites none": """
        auto_resume_from_checkpoints dataset_prepared_path do_train ignore_data_skip overwrite_cache
        overwrite_output_dir restore_callback_states_from_checkpoint resume_from_checkpoint save_on_each_node
        save_only_model save_safetensors save_strategy saves_per_epoch
    """,
    "whet evaluates with held-out rows, at train.eval_steps and with whet eval": """
        batch_eval_metrics compute_metrics do_bench_eval do_eval do_predict eval_accumulation_steps eval_delay
        eval_on_start eval_packing eval_sample_packing eval_strategy eval_table_size evals_per_epoch
        evaluation_strategy greater_is_better include_for_metrics include_inputs_for_metrics metric_for_best_model
        predict_with_generate prediction_loss_only
    """,
    "whet writes metrics.jsonl, plots and a page for every run": """
        debug disable_tqdm include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica
        log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_strategy mlflow_experiment_name
        plot_loss project run_name skip_memory_metrics trackio_space_id use_swanlab use_wandb verbose wandb_entity
        wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch
    """,
    "whet uploads nothing": """
        export_hub_model_id hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token_env
        push_to_hub push_to_hub_model_id push_to_hub_organization
    """,
    "whet lays the model, its rows and its memory out by itself": """
        accelerator_config attn_implementation auto_find_batch_size auto_mapping average_tokens_across_devices
        base_model_config base_model_name_or_path batched bf16_full_eval bnb_4bit_quant_storage data_seed
        dataloader_drop_last dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
        dataloader_prefetch_factor dataset_batch_size dataset_kwargs ddp_backend ddp_broadcast_buffers
        ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout deepspeed device_map eager_attention
        enable_liger_kernel fan_in_fan_out fast_inference flash_attention flash_attn fp16_full_eval fp16_opt_level
        fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism
        gpu_memory_utilization gradient_checkpointing_kwargs group_by_length half_precision_backend inference_mode
        is_llama_derived_model jit_mode_eval label_names length_column_name liger_kernel_config
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules llm_int8_threshold load_in_fp8
        local_rank lora_fan_in_fan_out low_cpu_mem_usage max_lora_rank max_memory model_type no_cuda offload_buffers
        pad_to_multiple_of pad_to_sequence_len padding padding_side parallelism_config peft_version
        preprocessing_batch_size quant_method quantization_method remove_unused_columns return_tensors s2_attention
        sdp_attention seed_worker shuffle skip_special_tokens streaming strict tf32 tokenizer_type
        torch_empty_cache_steps torchdynamo truncation use_cache use_cpu use_fast use_fast_tokenizer
        use_flash_attention_2 use_ipex use_liger_kernel use_reentrant use_unsloth xformers_attention
    """,
    "the tokenizer's own tokens are used; model.new_tokens adds some": """
        add_bos_token add_eos_token add_special_tokens bos_token eos_token eos_token_id pad_token pad_token_id
        special_tokens tokenizer_use_mistral_common unk_token
    """,
    "answers are those of greedy decoding, which is the same each time": """
        do_sample generation_config generation_max_length generation_num_beams min_p num_beams repetition_penalty
        skip_prompt streamer temperature top_k top_p
    """,
    "whet knows the answers by the template's structure (data.loss_on)": """
        add_generation_prompt data_collator instruction_part instruction_template mlm_probability response_part
        response_template roles_to_train tokenize train_on_eos
    """,
    "labels come from the data (whet data check shows them)": """
        id2label label2id num_labels
    """,
    "whet never runs a model's own code": """
        trust_remote_code trust_remote_code_model
    """,
}
REASONS = {name: reason for reason, names in IGNORED.items() for name in names.split()}
# With the values that leave things as they are, beside those of OFF.
NOT_THERE: dict[str, tuple[Any, ...]] = dict.fromkeys(
    [
        "adam_mini",
        "additional_target",
        "alora_invocation_tokens",
        "beta",
        "corda_config",
        "cosine_constant_lr_ratio",
        "cosine_min_lr_ratio",
        "efficient_eos",
        "ensure_weight_tying",
        "eva_config",
        "freeze_trainable_layers",
        "gradient_checkpointing_ratio",
        "interleave_probs",
        "label_smoothing",
        "label_smoothing_factor",
        "layer_replication",
        "layers_pattern",
        "loftq_config",
        "lora_bias",
        "lr_scheduler_kwargs",
        "mask_history",
        "megatron_config",
        "mixture_of_depths",
        "mlm",
        "moe_aux_loss_coef",
        "neftune_noise_alpha",
        "optim_args",
        "optim_target_modules",
        "pissa_init",
        "ref_model",
        "relora",
        "reward_model",
        "rope_scaling",
        "router_aux_loss_coef",
        "shift_attn",
        "trainable_tokens",
        "use_apollo",
        "use_badam",
        "use_dft_loss",
        "use_galore",
        "use_llama_pro",
        "use_muon",
        "use_qalora",
        "use_swift",
    ],
    (),
) | {
    "loss_type": ("nll",),
    "mix_strategy": ("concat",),
    "buffer_size": (16384,),
    "enable_thinking": (True,),
    "qalora_group_size": (16,),
}
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", "no", "none", "None", "off", "false", [], {})
# What others report to, and whet sends nothing to.
SERVICES = frozenset(
    [
        "wandb",
        "mlflow",
        "comet_ml",
        "clearml",
        "neptune",
        "swanlab",
        "trackio",
        "dvclive",
        "codecarbon",
        "azure_ml",
        "dagshub",
        "flyte",
    ]
)
SECRETS = frozenset(
    [
        "api_key",
        "hf_hub_token",
        "hf_token",
        "hub_token",
        "push_to_hub_token",
        "token",
        "use_auth_token",
        "wandb_api_key",
    ]
)
