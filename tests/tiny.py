"""Tiny models and tokenizers, built on the spot: two layers, a few thousand weights, real architectures."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distillm.types import Layout

PAD, EOS = "<pad>", "</s>"

SENTENCES = [
    "The small fox sleeps near the warm stove in the kitchen.",
    "A river runs through the valley and turns the old mill.",
    "Seven birds sat on the wire; three of them flew away.",
    "Please write a short answer to the question about water.",
    "Below is an instruction that describes a small task.",
    "Bread needs flour, water, salt and a little patience.",
    "The teacher reads the question and writes the answer.",
    "The student reads the answer and learns to write it.",
    "How many legs does a spider have? A spider has eight legs.",
    "What is the colour of the sky? The sky is blue on a clear day.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(vocab_size: int = 300, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: ``<pad>`` is 0, ``</s>`` is 1, any text round-trips. ``len`` is ``vocab_size``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=256,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


_ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "gemma2": {**_ROTARY, "head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "qwen3_moe": {
        **_ROTARY,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "cohere": {**_ROTARY, "logit_scale": 0.0625},
    "granite": {**_ROTARY, "logits_scaling": 8.0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 256},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "bart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0},
}

_DEPTHS = {
    "gpt2": ["n_layer"],
    "t5": ["num_layers", "num_decoder_layers"],
    "bart": ["encoder_layers", "decoder_layers"],
    "marian": ["encoder_layers", "decoder_layers"],
}
_DROPOUTS = {
    "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "opt": ["dropout", "attention_dropout", "layerdrop"],
    "gpt_neox": ["hidden_dropout", "attention_dropout"],
    "bart": ["dropout", "attention_dropout", "activation_dropout"],
    "marian": ["dropout", "attention_dropout", "activation_dropout"],
    "t5": ["dropout_rate"],
}


def tiny_config(kind: str = "llama", vocab_size: int = 300, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """A model configuration as a plain dictionary, ``model_type`` included; no dropout unless ``changes`` has it."""
    sizes = {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    depths = dict.fromkeys(_DEPTHS.get(kind, ["num_hidden_layers"]), layers)
    no_dropout = dict.fromkeys(_DROPOUTS.get(kind, ["attention_dropout"]), 0.0)
    return {"model_type": kind, **_KINDS[kind], **sizes, **depths, **no_dropout, **changes}


def _build(auto: Any, kind: str, vocab_size: int, layers: int, seed: int, **changes: Any) -> PreTrainedModel:
    settings = tiny_config(kind, vocab_size, layers, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        # Distinct biases and scales, so that a forgotten one shows; larger weights, so that rows differ.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.data.normal_(std=0.1)
        model.tie_weights()
    return model.eval()


def tiny_causal(kind: str = "llama", vocab_size: int = 300, layers: int = 2, seed: int = 0, **config: Any) -> Any:
    """A decoder-only model in eval mode: llama, qwen2, gemma2, cohere, granite, gpt2, opt or gpt_neox."""
    return _build(AutoModelForCausalLM, kind, vocab_size, layers, seed, **config)


def tiny_seq2seq(kind: str = "bart", vocab_size: int = 300, layers: int = 2, seed: int = 0, **config: Any) -> Any:
    """An encoder-decoder model in eval mode: bart, marian or t5, any ``final_logits_bias`` not zero."""
    model: Any = _build(AutoModelForSeq2SeqLM, kind, vocab_size, layers, seed, **config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed + 1)))
    return model


def tiny_model(kind: str, **options: Any) -> Any:
    """A tiny model of either kind, by its name."""
    return (tiny_seq2seq if kind in ("bart", "marian", "t5") else tiny_causal)(kind, **options)


def layout_for(model: Any, pad_id: int = 0) -> Layout:
    """How ``model`` is fed; an encoder reads the end token last."""
    config = model.config
    return Layout(pad_id, (config.decoder_start_token_id,), (1,)) if config.is_encoder_decoder else Layout(pad_id)


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write an ordinary model folder (either part may be None) and return it."""
    if model is not None:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
