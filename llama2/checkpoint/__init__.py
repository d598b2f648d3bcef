"""Readers and writers of weight files: Meta's Fairscale shards, GGUF, and the converter between them and DCP."""
