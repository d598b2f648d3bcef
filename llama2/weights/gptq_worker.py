"""Owns the calls of gptqmodel: a program for the interpreter of an environment that has it. Nobody imports this.

    python -I gptq_worker.py FOLDER

FOLDER has the model as `plain`, in Hugging Face's format, and `task.json`, and gets the `result`. A line on stdout
stands for each layer that is done. Ends when stdin does: when the process that started it has ended. Knows no llama2.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn


def main() -> None:
    # The library writes to stdout as well.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))

    # Its own number is 1 on two cores, with which it fails. Nothing is fetched from anywhere.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, min(12, os.cpu_count() or 1))))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    _write_tokenizer(folder / "plain")

    class Progress:
        """What the library calls after each layer, twice of most."""

        done = 0

        def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
            if layer_idx >= self.done:
                self.done = layer_idx + 1
                print(self.done, file=channel, flush=True)

    config = QuantizeConfig(
        bits=4,
        group_size=task["group_size"],
        sym=True,
        desc_act=False,
        act_group_aware=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        offload_to_disk_path=str(folder / "offload"),
    )
    model = GPTQModel.load(str(folder / "plain"), config, dtype=torch.bfloat16)
    model.layer_callback = Progress()
    sequences = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in task["sequences"]]
    model.quantize(sequences, batch_size=1)
    model.save(str(folder / "result"))


def _write_tokenizer(folder: Path) -> None:
    """One that nothing is read with: the library asks for it, and not every model's can be loaded here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _end_with_parent() -> NoReturn:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
