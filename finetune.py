"""Fine-tunes a converted model: `python finetune.py CONFIG.yaml`, or under torchrun at any tensor parallel degree.

    torchrun --nproc_per_node 2 finetune.py CONFIG.yaml --resume

docs/finetuning.md lists the options. The installed command is `llama2-finetune`.
"""

from __future__ import annotations

from llama2.training.command import main

if __name__ == "__main__":
    main()
