"""Llama 2 with PyTorch's own tensor parallelism: the model, the converter and the engine. Knows no HTTP.

from llama2 import LLM, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama2.engine.sequence import Completion, SamplingParams

if TYPE_CHECKING:
    from llama2.llm import LLM

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # LLM imports torch, which a program that only checks request bodies should not pay for.
    if name == "LLM":
        from llama2.llm import LLM

        return LLM
    raise AttributeError(f"module 'llama2' has no attribute {name!r}")
