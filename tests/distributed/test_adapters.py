"""Ranks that each add their own share of an adapter give together what one rank gives; so do those that merge one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import read_adapter, write_adapter
from llama2.config import ModelArgs
from llama2.weights.convert import convert
from tests.support.adapters import adapted_logits, random_pairs
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*single process.*"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

IDS = list(range(3, 33))


def logits(folder: str, adapter: str) -> torch.Tensor | None:
    """Of a prompt with an adapter, and of the same without."""
    return adapted_logits(folder, [(IDS, read_adapter(adapter, ModelArgs.load(folder))), (IDS, None)])


@pytest.mark.parametrize(
    ("changes", "degrees"),
    [
        ({"n_kv_heads": 8}, [2, 3]),  # 3, 3 and 2 heads on three ranks
        ({"dim": 72, "n_heads": 9, "n_kv_heads": 3}, [2, 3, 6]),  # on six, two ranks share the 3 heads of a KV head
        ({"n_heads": 8, "n_kv_heads": 2}, [8]),  # each KV head on 4 ranks
    ],
)
def test_every_degree_agrees_with_peft(tmp_path: Path, changes: dict[str, object], degrees: list[int]) -> None:
    # Not for the ranks, which would import it too.
    from tests.support.peft_models import peft_logits, peft_model

    args = tiny_args(vocab_size=97, **changes)
    weights = random_weights(args)
    folder = write_checkpoint(tmp_path / "checkpoint", args, weights)
    model = peft_model(args, weights, target_modules="all-linear", r=5, rank_pattern={"down_proj": 3})
    model.save_pretrained(str(tmp_path / "adapter"))
    with model.disable_adapter():
        plain = peft_logits(model, IDS)
    expected = torch.cat((peft_logits(model, IDS), plain))
    for degree in (1, *degrees):
        first, *others = run_ranks(degree, logits, str(folder), str(tmp_path / "adapter"))
        torch.testing.assert_close(first, expected, atol=1e-4, rtol=0, msg=f"TP={degree}")
        assert others == [None] * (degree - 1)


def merge(source: str, target: str, adapter: str) -> str:
    try:
        convert(source, target, adapter=adapter, output_format="hf")
    except ValueError as error:
        return str(error)
    return ""


def test_processes_that_merge_together_write_what_one_writes(tmp_path: Path) -> None:
    args, config = tiny_args(vocab_size=480), AdapterConfig()
    meta_folder(tmp_path / "meta", args, random_weights(args, dtype=torch.bfloat16), num_shards=2)
    tiny_sentencepiece(tmp_path / "meta", vocab_size=480)
    convert(tmp_path / "meta", tmp_path / "nf4", quantize="nf4")
    write_adapter(tmp_path / "adapter", random_pairs(config, args), config, args)
    for source in ("meta", "nf4"):
        for processes in (1, 3):
            paths = (str(tmp_path / source), str(tmp_path / f"{source}x{processes}"), str(tmp_path / "adapter"))
            assert run_ranks(processes, merge, *paths) == [""] * processes
        one, three = ((tmp_path / f"{source}x{number}" / "model.safetensors").read_bytes() for number in (1, 3))
        assert one == three
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    messages = run_ranks(2, merge, str(tmp_path / "meta"), str(tmp_path / "out"), str(tmp_path / "adapter"))
    assert len(set(messages)) == 1
    assert "adapter_model.safetensors is no whole safetensors file" in messages[0]
    assert not (tmp_path / "out").exists()
