"""The arithmetic on a GPU."""
