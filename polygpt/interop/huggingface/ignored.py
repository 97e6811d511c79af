"""Keys of config.json that change nothing of what a model computes, by the reason why; each is a regular expression.

A key that is neither read nor listed here is refused by name.
"""

from __future__ import annotations

import re

EVERYWHERE: dict[str, str] = {
    "what the model is called, and tasks it is not opened for": """
        architectures model_type auto_map transformers_version transformers.js_config tokenizer_class finetuning_task
        task_specific_params problem_type id2label label2id polygpt""",
    "generation's settings, from before they had a file of their own": """
        do_sample early_stopping temperature top_k top_p typical_p num_beams num_beam_groups max_length min_length
        length_penalty repetition_penalty diversity_penalty num_return_sequences no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids suppress_tokens prefix begin_suppress_tokens
        exponential_decay_length_penalty remove_invalid_values""",
    "what a call returns, and how transformers runs it": """
        output_attentions output_hidden_states output_scores output_router_logits return_dict return_dict_in_generate
        keys_to_ignore_at_inference use_cache use_bfloat16 torchscript dtype torch_dtype chunk_size_feed_forward
        gradient_checkpointing pretraining_tp tf_legacy_loss cross_attention_hidden_size is_decoder
        is_encoder_decoder""",
    "ids of special tokens, which the tokenizer and generation have, and private notes of tools": ".*_token_ids? _.*",
    "initial values, and the mark of a tool that converted other layouts to this one": """
        initializer_range is_llama_config rope_interleaved""",
}
OF_ONE_TYPE: dict[str, dict[str, str]] = {
    "gpt2": {
        "computed in another order, to the same end": "reorder_and_upcast_attn",
        "repeats n_positions": "n_ctx",
        "of the summary head, which no language model has": "summary_.*",
        "left by conversion tools in small test models": """
            type decoder past_names present_names hidden_size intermediate_size hidden_act
            attention_probs_dropout_prob hidden_dropout_prob type_vocab_size""",
    },
    "gemma2": {
        "hidden_activation is read instead": "hidden_act",
        "how transformers keeps its cache": "cache_implementation",
    },
    "starcoder2": {"its class has one kind of feed-forward and of norm": "mlp_type norm_type"},
}


def is_ignored(key: str, model_type: str) -> bool:
    """Whether a key of an architecture's config.json has no effect."""
    lists = [*EVERYWHERE.values(), *OF_ONE_TYPE.get(model_type, {}).values()]
    return any(re.fullmatch(pattern, key) for names in lists for pattern in names.split())
