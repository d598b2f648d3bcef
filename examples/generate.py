"""Continues three prompts at once, and shows the likeliest tokens of a reply.

python examples/generate.py [CHECKPOINT]
torchrun --nproc_per_node 2 examples/generate.py [CHECKPOINT]
"""

import os
import sys

from llama2 import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Two and two are", "A llama is"]

with LLM(sys.argv[1] if len(sys.argv) > 1 else "build/converted_checkpoints") as llm:
    params = SamplingParams(temperature=0, max_new_tokens=12, logprobs=2)
    completions = llm.generate(PROMPTS, params)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank has the completions
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            print(f"{prompt}{completion.text!r} ({completion.finish_reason})")
        for entry in completions[0].logprobs or []:
            print([(llm.tokenizer.decode([token_id]), round(logprob, 2)) for token_id, logprob in entry.top])
