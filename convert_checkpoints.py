"""Converts Meta's Llama checkpoints: Fairscale shards to one folder for every tensor parallel degree, and back.

    torchrun --nnodes 1 --nproc_per_node 8 convert_checkpoints.py --original_ckpt_dir DIR \\
        --tokenizer_path DIR/tokenizer.model --model_parallel_size 8 --save_checkpoint_dir converted_checkpoints

The installed command is `llama2-convert`; under torchrun it is `torchrun … -m llama2.weights.convert_command`.
"""

from __future__ import annotations

from llama2.weights.convert_command import main

if __name__ == "__main__":
    main()
