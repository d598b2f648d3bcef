"""An adapter's folder is the old one or the new one, and is written for what its config says alone."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2.adapters.adapter import Adapter
from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import Base, read_adapter, read_base, targets, write_adapter
from tests.llama2.adapters.conftest import ARGS


@pytest.fixture
def adapter(peft_folder: Path) -> Adapter:
    return read_adapter(peft_folder, ARGS)


@pytest.fixture
def config(peft_folder: Path) -> AdapterConfig:
    return AdapterConfig.load(peft_folder)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 2,000 bytes, pytest's own log neither: no longer than a call takes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_adapter(adapter: Adapter, config: AdapterConfig, tmp_path: Path) -> None:
    base = Base(weights="xxh3_128:00", stored={"bfloat16": 1})
    write_adapter(tmp_path / "mine", adapter.pairs, config, ARGS, base=base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = {name: replace(pair, b_FR=pair.b_FR + 1) for name, pair in adapter.pairs.items()}
    with pytest.raises(OSError, match="File too large"), full_disk():
        write_adapter(tmp_path / "mine", changed, config, ARGS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_too_little_space_is_said_before_anything_is_written(
    adapter: Adapter, config: AdapterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="not enough disk space"):
        write_adapter(tmp_path / "mine", adapter.pairs, config, ARGS)
    assert not list(tmp_path.iterdir())


def test_a_new_one_replaces_the_whole_folder(adapter: Adapter, config: AdapterConfig, tmp_path: Path) -> None:
    base = Base(weights="xxh3_128:00", stored={"bfloat16": 1})
    write_adapter(tmp_path / "mine", adapter.pairs, config, ARGS, base=base)
    write_adapter(tmp_path / "mine", adapter.pairs, config, ARGS)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert read_base(tmp_path / "mine") is None


def test_pairs_must_be_what_the_config_says(adapter: Adapter, config: AdapterConfig, tmp_path: Path) -> None:
    weight = "layers.1.attention.wk"
    pair = adapter.pairs[weight]
    wrong = {
        r"differ in layers\.1\.attention\.wk": {name: one for name, one in adapter.pairs.items() if name != weight},
        "must have matrices": dict(adapter.pairs) | {weight: replace(pair, a_RC=pair.a_RC[:2], b_FR=pair.b_FR[:, :2])},
        r"is scaled by 3.0, and by 2.0 in the config": dict(adapter.pairs) | {weight: replace(pair, scaling=3.0)},
    }
    for message, pairs in wrong.items():
        with pytest.raises(ValueError, match=message):
            write_adapter(tmp_path / "mine", pairs, config, ARGS)
    assert not list(tmp_path.iterdir())


def test_the_reader_needs_no_file_once_it_has_read(adapter: Adapter, config: AdapterConfig, tmp_path: Path) -> None:
    """A file that is overwritten in place must not change what is computed."""
    write_adapter(tmp_path, adapter.pairs, config, ARGS)
    read = read_adapter(tmp_path, ARGS)
    file = tmp_path / "adapter_model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    for name, pair in adapter.pairs.items():
        assert torch.equal(read.pairs[name].a_RC, pair.a_RC)
        assert torch.equal(read.pairs[name].b_FR, pair.b_FR)


def test_a_config_that_is_made_here_names_its_targets() -> None:
    config = AdapterConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 4})
    found = targets(config, ARGS)
    assert {(name.rpartition(".")[2], *target) for name, target in found.items()} == {("wq", 8, 2.0), ("wv", 4, 4.0)}
    assert len(targets(AdapterConfig(), ARGS)) == 7 * ARGS.n_layers
