"""What starts TorchServe: its archive, its settings, its process. A worker imports nothing of it."""
