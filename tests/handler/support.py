"""A byte-level tokenizer in which every ASCII character is one token, and settings to go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers

from handler.config import HandlerConfig
from handler.torchserve.model_config import read_model_config
from llama2.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path, *, add_bos: bool = False) -> Tokenizer:
    """Write a tokenizer.json with a ChatML template into `folder` and load it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, "add_bos_token": add_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def settings(top: dict[str, Any] | None = None, **handler: Any) -> dict[str, Any]:
    """The repository's model-config.yaml with some keys changed, and with small sizes."""
    values = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    values["handler"] |= {"max_seq_len": 512, "max_batch_size": 6, "max_new_tokens": 50}
    values["handler"] |= handler
    return values | (top or {})


def config(base: Path, **handler: Any) -> HandlerConfig:
    return read_model_config(settings(converted_ckpt_dir=".", **handler), base=base)
