"""Tensor parallelism: who holds what, and how the ranks' parts become one."""
