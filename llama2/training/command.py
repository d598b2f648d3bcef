"""Owns the command line of fine-tuning (`finetune.py`, `llama2-finetune`): its flags, its processes, its end."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch.distributed as dist

from llama2.parallel.process_group import LockstepError
from llama2.parallel.torchrun import exit_with, read_arguments
from llama2.training.config import TrainingConfig


def main() -> None:
    """Exit with 0, with 1 after one line for an error, or with 2 after the usage."""
    about = "Fine-tune a Llama model: LoRA, or QLoRA on an nf4 checkpoint."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("config", help="a yaml file with the options of docs/finetuning.md")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    arguments = read_arguments(parser)
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    try:
        from llama2.training.run import finetune

        result = finetune(TrainingConfig.load(arguments.config), resume=arguments.resume)
    except (ValueError, LockstepError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        exit_with(1)
    except KeyboardInterrupt:
        if first:
            print("\nstopped: --resume goes on from the newest checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        speed = f", {result.tokens / result.seconds:.0f} tokens/s" if result.tokens else ""
        logging.getLogger(__name__).info(
            "%s, after %d step%s%s", result.adapter, result.steps, "" if result.steps == 1 else "s", speed
        )


if __name__ == "__main__":
    main()
