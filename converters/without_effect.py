"""Fields of config.json files that say nothing about the function from tokens to logits, for all families.

Collected from what transformers 4 and 5 write and from published configs (Llama, Qwen, Mistral, Gemma, DeepSeek,
gpt-oss, GLM, Phi, OLMo, InternLM, and the tools that people saved them with). A family that gives one of them a meaning
takes it, and then this list does not speak of it.
"""

from collections.abc import Mapping
from typing import Any

# fmt: off
WITHOUT_EFFECT = frozenset(
    {
        # how transformers builds, names and loads a model
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_experts_implementation", "_flash_attn_2_enabled", "_name_or_path", "architectures", "attn_implementation",
        "auto_map", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
        "initializer_factor", "initializer_range", "is_decoder", "keys_to_ignore_at_inference", "label2id", "id2label",
        "low_cpu_mem_usage", "model_type", "num_labels", "problem_type", "pretraining_tp", "torch_dtype",
        "torchscript", "transformers.js_config", "transformers_version", "transformers_weights",
        "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_flash_attention", "use_flash_attention_2",
        # what it returns and keeps
        "cache_implementation", "num_logits_to_keep", "output_attentions", "output_hidden_states", "output_past",
        "output_router_logits", "output_scores", "return_dict", "return_dict_in_generate", "use_cache",
        "use_return_dict",
        # tokens and the tokenizer
        "bos_token", "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token", "eos_token_id",
        "mask_token_id", "pad_token", "pad_token_id", "prefix", "sep_token_id", "tokenizer_class", "unk_token_id",
        # generation, which transformers 4 wrote into config.json too
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
        "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "top_k", "top_p", "typical_p",
        # parallel layout and losses beside the one of the next token
        "ep_size", "seq_aux",
    }
)

HARMLESS_AT: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "cross_attention_hidden_size": (None,), "embd_pdrop": (0,), "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,), "is_causal": (True,), "is_encoder_decoder": (False,), "pruned_heads": ({}, None),
    "resid_pdrop": (0,), "tie_encoder_decoder": (False,), "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}
# fmt: on
"""Fields that change the function unless they have one of these values."""
