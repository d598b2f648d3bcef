"""The TorchServe front: polls in, replies out. Nothing outside this folder knows TorchServe."""
