"""Keys of config.json that do not change what a model computes, by the reason why; each is a regular expression.

A key that is neither read nor listed here is refused by name.
"""

from __future__ import annotations

import re

EVERYWHERE: dict[str, str] = {
    "names of the model, of its tokenizer's class and of other tasks": """
        architectures model_type auto_map transformers_version transformers.js_config tokenizer_class finetuning_task
        task_specific_params problem_type id2label label2id num_labels polygpt""",
    "generation's settings, from before they had a file of their own": """
        do_sample early_stopping temperature top_k top_p typical_p num_beams num_beam_groups max_length min_length
        length_penalty repetition_penalty diversity_penalty num_return_sequences no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids suppress_tokens prefix begin_suppress_tokens
        exponential_decay_length_penalty remove_invalid_values max_new_tokens""",
    "what a call returns, and how transformers computes it": """
        output_attentions output_hidden_states output_scores output_router_logits output_past return_dict
        return_dict_in_generate keys_to_ignore_at_inference use_cache use_bfloat16 torchscript dtype torch_dtype
        chunk_size_feed_forward gradient_checkpointing pretraining_tp tf_legacy_loss attn_implementation xla_device
        use_flash_attention use_flash_attention_2""",
    "encoders and decoders, which have a configuration of their own": """
        cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder""",
    "ids of special tokens (the tokenizer and generation have them)": ".*_token_ids?",
    "private notes of tools": "_.* unsloth_.*",
    "lengths of texts that a tool cut (the model's is max_position_embeddings)": """
        max_sequence_length model_max_length tokenizer_model_max_length tokenizer_padding_side""",
    "initial values, and the mark of a tool that converted other layouts to this one": """
        initializer_range is_llama_config rope_interleaved""",
}
_NO_BIASES = {"its class has no such biases, and their tensors would be refused": "attention_bias mlp_bias"}
OF_ONE_TYPE: dict[str, dict[str, str]] = {
    "gpt2": {
        "computed in another order, with the same result": "reorder_and_upcast_attn",
        "repeats n_positions": "n_ctx",
        "of GPT's first version": "n_special predict_special_tokens",
        "of the summary head, which no language model has": "summary_.*",
        "left by conversion tools in small test models": """
            type decoder past_names present_names hidden_size intermediate_size hidden_act
            attention_probs_dropout_prob hidden_dropout_prob type_vocab_size""",
    },
    "mistral": _NO_BIASES,
    "qwen2": _NO_BIASES,
    "mixtral": _NO_BIASES,
    "gemma2": {
        "hidden_activation is read instead": "hidden_act",
        "repeats sliding_window": "sliding_window_size",
        "how transformers keeps its cache": "cache_implementation",
    },
    "phi3": {**_NO_BIASES, "its class has no bias of the head": "lm_head_bias"},
    "starcoder2": {
        "its class has one kind of feed-forward and of norm": "mlp_type norm_type",
        "norm_epsilon is read instead": "rms_norm_eps",
    },
}


def is_ignored(key: str, model_type: str) -> bool:
    """Whether a key of an architecture's config.json has no effect."""
    lists = [*EVERYWHERE.values(), *OF_ONE_TYPE.get(model_type, {}).values()]
    return any(re.fullmatch(pattern, key) for names in lists for pattern in names.split())
