"""A model of random weights, converted, and adapters of PEFT's for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama2.adapters.adapter import Adapter
from llama2.adapters.format import read_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_models import peft_model
from tests.support.weights import random_weights, tiny_args

ARGS = tiny_args()
WEIGHTS = random_weights(ARGS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("adapters") / "checkpoint", ARGS, WEIGHTS)


@pytest.fixture(scope="session")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all linear layers, as PEFT writes it."""
    folder = tmp_path_factory.mktemp("adapters") / "peft"
    peft_model(ARGS, WEIGHTS, target_modules="all-linear").save_pretrained(str(folder))
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Adapter]:
    """Draw one with PEFT's own options, have PEFT write it, and read it."""

    def make(**options: Any) -> Adapter:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        peft_model(ARGS, WEIGHTS, **{"target_modules": "all-linear", **options}).save_pretrained(str(folder))
        return read_adapter(folder, ARGS)

    return make
