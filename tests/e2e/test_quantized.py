"""A GGUF file's own codes, through the converter, TorchServe and two ranks, to a reply; and their certificate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama2.weights.certificate import CERTIFICATE_FILE, write_certificate
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from scripts.smollm2 import gguf_file
from tests.e2e.conftest import serving
from tests.handler.support import settings
from tests.support.certificates import certificate_of

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("quantize", "answer"), [(None, "Paris."), ("int4", "Paris")])
def test_a_quantized_model_is_served_by_two_ranks(tmp_path: Path, quantize: str | None, answer: str) -> None:
    convert(gguf_file(), tmp_path / "model", quantize=quantize, requantize=True, verify=True)
    spec = DcpFolder(tmp_path / "model").spec
    assert spec.nbytes < 0.5 * sum(part.numel() * 2 for part in map(torch.empty, spec.args.parameter_shapes().values()))
    write_certificate(tmp_path / "model", certificate_of(tmp_path / "model"))
    config = settings({"deviceType": "cpu"}, dtype="bfloat16", max_seq_len=1024, max_batch_size=8)
    question = "What is the capital of France? Answer in one sentence."
    with serving(tmp_path / "model", config) as served:
        reply = served.ask(dialog=[{"role": "user", "content": question}], temperature=0)
        with served.client() as client:
            shown = client.get(f"{served.url}/1.0/v1/certificate")
    assert (shown.status_code, shown.json()) == (200, json.loads((tmp_path / "model" / CERTIFICATE_FILE).read_text()))
    assert reply["generation"]["content"].startswith(f"The capital of France is {answer}")
