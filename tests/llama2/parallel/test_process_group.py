"""Which rank gets which GPU. No GPU is needed: torch.cuda is asked what there is, and it is faked."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from llama2.parallel import process_group
from llama2.parallel.process_group import check_own_gpus, choose_device, init_process_group


def be_rank(
    monkeypatch: pytest.MonkeyPatch, *, local_rank: int, ranks: int, gpus: int, mask: str | None = None
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize("asked", [None, "cuda"])
@pytest.mark.parametrize(
    ("local_rank", "gpus", "mask", "device"),
    [
        (1, 8, None, "cuda:1"),
        (1, 2, "4,5", "cuda:1"),
        (0, 1, "4", "cuda:0"),
        (1, 1, "5", "cuda:0"),  # its own, as SLURM deals them out
        (1, 1, "GPU-8f1c", "cuda:0"),
    ],
)
def test_each_rank_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, local_rank: int, gpus: int, mask: str | None, device: str
) -> None:
    be_rank(monkeypatch, local_rank=local_rank, ranks=2, gpus=gpus, mask=mask)
    assert choose_device(asked) == torch.device(device)


@pytest.mark.parametrize(("local_rank", "warnings"), [(0, 1), (1, 0)])
def test_gpus_that_are_too_few_are_left_alone_and_one_rank_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, local_rank: int, warnings: int
) -> None:
    be_rank(monkeypatch, local_rank=local_rank, ranks=4, gpus=2)
    with caplog.at_level(logging.WARNING):
        assert choose_device() == torch.device("cpu")
    assert len(caplog.messages) == warnings
    assert all("2 GPUs are visible to the 4 ranks of this host" in message for message in caplog.messages)


@pytest.mark.parametrize(("built", "warnings"), [(True, 1), (False, 0)])
def test_a_missing_gpu_is_a_warning_only_where_torch_was_built_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, built: bool, warnings: int
) -> None:
    be_rank(monkeypatch, local_rank=0, ranks=1, gpus=0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with caplog.at_level(logging.WARNING):
        assert choose_device() == torch.device("cpu")
    assert len(caplog.messages) == warnings


def test_a_gpu_that_is_not_there_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, local_rank=2, ranks=4, gpus=2)
    with pytest.raises(ValueError, match="rank 2 of this host has no GPU: there are 2"):
        choose_device("cuda")


def test_the_same_gpu_on_two_hosts_is_no_fault() -> None:
    check_own_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-2")])


def test_two_ranks_on_one_gpu_are_named_when_the_group_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(answers: list[object], mine: object) -> None:
        answers[:] = [mine, ("elsewhere", "GPU-8f1c"), mine]

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8f1c"))
    monkeypatch.setattr(process_group.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(process_group.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(process_group.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(process_group.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"ranks 0 and 2 were both given GPU-8f1c of host .* CUDA_VISIBLE_DEVICES"):
        init_process_group(torch.device("cuda", 0))
