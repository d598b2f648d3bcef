"""Serves the demo model to clients in another virtual environment; run by the server's own python.

When the server is READY, one line of JSON on stdout says where it is. It lives until stdin ends.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llama2.adapters.reference import WEIGHTS_FILE
from llama2.config import ModelArgs
from llama2.weights.readers.gguf.file import GgufFile
from scripts.smollm2 import gguf_file, write
from tests.e2e.conftest import serving
from tests.handler.support import ROOT, settings
from tests.support.adapters import write_random_adapter
from tests.support.reference import reference_model
from tests.support.weights import meta_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What a client is told."""

    url: str
    key: str
    checkpoint: str
    reference: str


def write_reference(folder: Path) -> None:
    """The same weights as transformers keeps them."""
    model = GgufFile(gguf_file())
    weights = {name: weight.bfloat16() for name, weight in meta_weights(model).items()}
    reference_model(model.spec.args, weights).bfloat16().save_pretrained(folder)
    model.write_tokenizer(folder)


def main(folder: Path) -> None:
    meta, checkpoint, reference = folder / "meta", folder / "converted", folder / "transformers"
    write(meta, num_shards=3)
    arguments = [
        "--original_ckpt_dir",
        str(meta),
        "--tokenizer_path",
        str(meta),
        "--save_checkpoint_dir",
        str(checkpoint),
    ]
    subprocess.run([sys.executable, "convert_checkpoints.py", *arguments], cwd=ROOT, check=True)
    write_reference(reference)
    args = ModelArgs.load(checkpoint)
    for seed, name in enumerate(("first", "second", "spare")):
        write_random_adapter(folder / "adapters" / name, args, seed, r=8, size=0.3)
    write_random_adapter(folder / "adapters" / "damaged", args, r=8)
    (folder / "adapters" / "damaged" / WEIGHTS_FILE).write_bytes(b"no adapter" * 9999)
    # fp32: what is computed together cannot change a token. A test can fill a queue this short.
    top = {"deviceType": "cpu", "batchSize": 16, "jobQueueSize": 16}
    config = settings(top, dtype="float32", max_seq_len=1024, max_batch_size=8, max_step_tokens=256)
    config["handler"] |= {"adapters_dir": str(folder / "adapters"), "allow_runtime_lora_updating": True}
    with serving(checkpoint, config) as served:
        whereabouts = Whereabouts(
            url=f"{served.url}/1.0",
            key=served.server.key("inference"),
            checkpoint=str(checkpoint),
            reference=str(reference),
        )
        print(json.dumps(dataclasses.asdict(whereabouts)), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
