"""Adapters (LoRA, arXiv:2106.09685): PEFT's files, and the memory from which a step adds them to its products."""
