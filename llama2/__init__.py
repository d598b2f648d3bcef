"""Llama 2 with PyTorch's own tensor parallelism: the model, the converter and the engine. Knows no HTTP.

from llama2 import LLM, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Completion, Output, Reply

if TYPE_CHECKING:
    from llama2.async_llm import AsyncLLM
    from llama2.llm import LLM

    __version__: str

__all__ = ["LLM", "AsyncLLM", "Completion", "Output", "Reply", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # These import torch, which a program that only checks request bodies should not pay for.
    if name == "LLM":
        from llama2.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from llama2.async_llm import AsyncLLM

        return AsyncLLM
    if name == "__version__":
        from importlib.metadata import version

        return version("torchserve-llama2")
    raise AttributeError(f"module 'llama2' has no attribute {name!r}")
