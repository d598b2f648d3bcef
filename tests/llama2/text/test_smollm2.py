"""A real language model: SmolLM2-135M-Instruct gives what transformers gives, in fp32 from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.weights.readers.gguf.file import GgufFile
from scripts.smollm2 import gguf_file
from tests.support.reference import reference_model
from tests.support.weights import meta_weights

pytestmark = pytest.mark.integration

TEXT = (
    "The history of Paris begins with the Parisii, a Celtic tribe who settled on the banks of the Seine. In 1969 two "
    "men walked on the moon; 今日は天気がいいですね 🙂. def main(argv):    print(argv)  # two  spaces"
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "1, 2, 3, 4,",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "The recipe of mayonnaise:",
    "A",
    "今日は",
    "🙂",
    "  two  spaces",
    "Roses are red,\nviolets are blue,\n",
    "In the beginning",
    "SELECT name FROM users WHERE",
    "To be, or not to be,",
    "The largest planet is",
    TEXT,
    TEXT * 2,
    TEXT * 4,
    "The sum of 17 and 25 is",
]


@pytest.fixture(scope="module")
def both(smollm2_checkpoint: Path) -> tuple[LLM, Any]:
    """Our engine on the converted checkpoint and transformers' model on the source's weights, both in fp32."""
    model = GgufFile(gguf_file())
    weights = {name: weight.bfloat16() for name, weight in meta_weights(model).items()}
    return LLM(smollm2_checkpoint, dtype=torch.float32, max_seq_len=512), reference_model(model.spec.args, weights)


def test_logits_equal_transformers(both: tuple[LLM, Any]) -> None:
    llm, reference = both
    ids = llm.tokenizer.encode_prompt(TEXT)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    logits = llm.score(ids)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_greedy_text_equals_transformers_generate(both: tuple[LLM, Any]) -> None:
    """Token for token on 20 prompts of 1 to 300 tokens, ours all in one batch, transformers' one by one."""
    llm, reference = both
    prompts = [llm.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    replies = llm.generate(prompts, SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True))
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            expected = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
            )
        assert reply.token_ids == expected[0, len(prompt) :].tolist()
