"""Makes a TorchServe model archive: the handler, the model's code and a checked `model-config.yaml`.

    python build_archive.py --checkpoint converted_checkpoints --config model-config.yaml --model_store model_store

The installed command is `llama2-archive`.
"""

from __future__ import annotations

from handler.torchserve.server.archive import main

if __name__ == "__main__":
    main()
