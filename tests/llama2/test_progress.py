"""Work is done alike with a bar and without one."""

from __future__ import annotations

import sys

import pytest

from llama2.progress import progress


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_items_and_updates_pass(monkeypatch: pytest.MonkeyPatch, has_tqdm: bool) -> None:
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress([3, 1, 2], desc="items", disable=True)) == [3, 1, 2]
    assert list(progress([], disable=True)) == []
    with progress(total=5, unit="B", disable=True) as bar:
        bar.update(2)
        bar.update()
