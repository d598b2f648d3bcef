"""A dtype has the same names wherever one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_kernels, gpu_peers, gpu_run
from llama2 import LLM
from llama2.dtypes import read_dtype
from llama2.errors import InvalidValue
from llama2.weights.convert_command import options
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

NAMES: list[tuple[Any, torch.dtype]] = [
    ("bf16", torch.bfloat16),
    ("bfloat16", torch.bfloat16),
    ("torch.bfloat16", torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    ("fp16", torch.float16),
    ("half", torch.float16),
    ("FP32", torch.float32),
    ("float", torch.float32),
    (torch.float32, torch.float32),
]


@pytest.mark.parametrize(("given", "dtype"), NAMES, ids=str)
def test_a_name_is_the_same_dtype_in_every_place(given: Any, dtype: torch.dtype) -> None:
    assert getattr(torch, read_dtype(given) or "") == dtype
    assert options(original_ckpt_dir="a", save_checkpoint_dir="b", dtype=given)["dtype"] == dtype
    for benchmark in (gpu_kernels, gpu_peers, gpu_run):
        assert getattr(torch, benchmark.parser().parse_args(["--dtype", str(given)]).dtype) == dtype


def test_a_model_is_loaded_in_it(tmp_path: Path) -> None:
    args = tiny_args(vocab_size=512)
    tokenizer_file = tiny_sentencepiece(tmp_path, vocab_size=512)
    folder = write_checkpoint(tmp_path / "checkpoint", args, random_weights(args), tokenizer_file)
    for given, dtype in (("bf16", torch.bfloat16), (torch.float32, torch.float32), ("auto", torch.float32)):
        with LLM(folder, dtype=given, max_seq_len=32) as llm:
            assert llm._engine._group._runner._model.dtype == dtype
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 \(bf16\), .*, got 'fp8'"):
        LLM(folder, dtype="fp8")


def test_none_is_no_dtype_and_anything_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_dtype(None) is read_dtype("auto") is None
    for wrong in ("int8", torch.int8, 16):
        with pytest.raises(InvalidValue, match="dtype must be bfloat16"):
            read_dtype(wrong)
    with pytest.raises(SystemExit):
        gpu_run.parser().parse_args(["--dtype", "int8"])
    assert "argument --dtype: dtype must be bfloat16 (bf16)" in capsys.readouterr().err
