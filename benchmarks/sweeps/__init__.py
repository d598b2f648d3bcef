"""What can be chosen about a kernel, tried one choice after the other."""
