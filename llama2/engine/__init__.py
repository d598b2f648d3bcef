"""Continuous batching over a paged KV cache: what runs next, where its keys live, and which token comes out."""
