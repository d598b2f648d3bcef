"""Weights on disk and their way into the model: readers, the converter, and the loader of converted folders."""
