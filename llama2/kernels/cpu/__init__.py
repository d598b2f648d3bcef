"""The arithmetic on a CPU."""
