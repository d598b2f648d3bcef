"""The choices in a kernel, tried one after the other."""
