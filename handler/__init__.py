"""TorchServe's side of the server: HTTP bodies in, replies out. Knows no model maths."""
