"""Owns the reading of GGUF files of the Llama architecture."""
