"""Replies of a given form, and how likely the model finds a text.

python examples/structured.py [CHECKPOINT]
"""

import json
import sys

import torch

from llama2 import LLM

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "million_people": {"type": "integer", "maximum": 99}},
    "required": ["city", "million_people"],
    "additionalProperties": False,
}

with LLM(sys.argv[1] if len(sys.argv) > 1 else "build/converted_checkpoints") as llm:
    (completion,) = llm.chat([{"role": "user", "content": "Describe Paris."}], temperature=0, json_schema=SCHEMA)
    print(json.loads(completion.text))
    (completion,) = llm.generate("Is the sky blue? Answer:", temperature=0, choice=[" yes", " no"])
    print(completion.text)
    for text in ("Paris is the capital of France.", "France is the capital of Paris."):
        ids = llm.tokenizer.encode_prompt(text)
        logprobs_TV = llm.score(ids).log_softmax(-1)
        print(f"{text} {logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum():.1f}")
