"""The studies within seconds: made-up rows in place of the data sets, and tiny models in place of the large ones."""

import json
import random
from pathlib import Path

from distillm.commands import tokenizer_to
from distillm.models import load_model, load_tokenizer, save_model

WORDS = (
    "small",
    "old",
    "red",
    "dog",
    "man",
    "child",
    "sits",
    "runs",
    "reads",
    "near",
    "under",
    "table",
    "house",
    "book",
)
FIELDS = {
    "multi30k": ("source", "target"),
    "multi30k_en_fr": ("source", "target"),
    "samsum": ("document", "summary"),
    "dolly": ("instruction", "output"),
    "self_instruct": ("instruction", "output"),
    "vicuna": ("instruction", "output"),
    "super_natural_instructions": ("instruction", "output"),
}
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TINY = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 30,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
    "opus-mt-en-fr": {
        "model_type": "marian", "d_model": 16, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "max_position_embeddings": 256, "scale_embedding": True,
    },
}  # fmt: skip
"""Configurations with the layers of the pretrained models, a thousandth as wide."""


def write_rows(folder: Path, rows: int = 40) -> None:
    """Every data set of the studies under ``folder``, with sentences drawn from a few words."""
    draw = random.Random(0)
    for name, (question, answer) in FIELDS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, count in {"train": rows, "valid": 8, "test": 8}.items():
            made = [[" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2)] for _ in range(count)]
            lines = (json.dumps({question: asked, answer: said}) for asked, said in made)
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pretrained(model: str, folder: Path) -> None:
    """A tiny model with random weights, in the place of the pretrained one."""
    texts = folder.with_name(f"{folder.name}.words.txt")
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("\n".join(WORDS), encoding="utf-8")
    spoken = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer_to(spoken, [str(texts)], "bpe", 300)
    tokenizer = load_tokenizer(str(spoken))
    tokenizer.chat_template = CHAT
    known = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    save_model(load_model(None, config=TINY[model] | known, device="cpu"), tokenizer, folder)
