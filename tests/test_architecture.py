"""docs/architecture.md names every file that a decoded token passes, and no other: traced through a real request."""

from __future__ import annotations

import mmap
import os
import re
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llama2.parallel import shared_layout
from tests.handler.support import byte_tokenizer, config
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.weights import random_weights, tiny_args

ROOT = Path(__file__).parents[1]
# Which of its files run depends on the machine.
KERNELS = "llama2/kernels/"
# A rank ends when nobody holds the other end of its pipe.
PIPES: list[Any] = []


class Trace:
    """The project's files in which a function is called while it is `recording`."""

    def __init__(self) -> None:
        self.recording = False
        self._files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.recording and event == "call":
            self._files.add(frame.f_code.co_filename)

    def files(self) -> set[str]:
        paths = [Path(file).relative_to(ROOT).as_posix() for file in self._files if file.startswith(f"{ROOT}/")]
        rooms = [KERNELS if path.startswith(KERNELS) else path for path in paths]
        return {path for path in rooms if path.startswith(("llama2/", "handler/"))}


def files_of_the_front(folder: Path) -> set[str]:
    """Between the poll that brings the first token and the one that brings the thirtieth."""
    from ts.context import Context, RequestProcessor

    from handler.service import Service
    from handler.torchserve.llama_handler import LlamaHandler
    from handler.torchserve.transport import Transport

    trace = Trace()
    threading.setprofile(trace)  # for the thread that hears the ranks, which does not run yet
    service = Service.load(config(folder, max_seq_len=200), names=("tiny",))
    handler = LlamaHandler()
    handler._service, handler._transport = service, Transport(service)
    context = Context("tiny", "", None, 1, None, "0")
    context.request_ids, context.request_processor = {0: "call"}, [RequestProcessor({})]
    item = {"body": {"prompt": "Hello", "stream": True, "max_new_tokens": 100, "ignore_eos": True}}
    sys.setprofile(trace)
    tokens = 0
    while tokens < 30:
        (text,) = handler.handle([item], context)
        item = item if text is None else {}  # as TorchServe does, once there is a reply
        tokens += len((text or "").splitlines())
        trace.recording = tokens > 0
    sys.setprofile(None)
    service.close()
    return trace.files()


def files_of_a_rank(folder: Path) -> set[str]:
    """Between the first outputs of a request and the thirtieth; nothing on a rank that has no outputs."""
    from llama2.config import EngineConfig
    from llama2.engine.messages import Add, Ready, Settings
    from llama2.engine.rank import Rank
    from llama2.engine.sampling_params import SamplingParams
    from llama2.engine.sequence import Request
    from llama2.parallel.process_group import Launched

    trace = Trace()
    threading.setprofile(trace)
    ours, theirs = Pipe()
    PIPES.append(ours)
    index, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    size = shared_layout.mapping_bytes(degree)
    with (folder / "memory").open("r+b") as file:
        launched = Launched(rank=index, world_size=degree, port=0, listener=-1, memory=mmap.mmap(file.fileno(), size))
    threading.Thread(target=Rank(theirs).run, args=(launched,), daemon=True).start()
    ours.send(Settings(checkpoint_dir=folder, config=EngineConfig(max_seq_len=200)))
    assert isinstance(ours.recv(), Ready)
    if index != 0:
        return set()
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    ours.send(Add(request=Request(request_id="r", prompt_ids=(1, 2, 3), params=params)))
    for _ in range(30):
        ours.recv()
        trace.recording = True
    return trace.files()


@pytest.mark.integration
def test_the_files_that_a_decoded_token_passes_are_those_that_the_page_lists(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    args = tiny_args(vocab_size=260)
    write_checkpoint(tmp_path, args, random_weights(args))
    (tmp_path / "memory").write_bytes(bytes(shared_layout.mapping_bytes(2)))
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tables = re.findall(r"passes these files.*?\n\n(.*?)\n\n", page, re.DOTALL)
    listed = [set(re.findall(r"`((?:llama2|handler)/[\w/]+(?:\.py|/))`", table)) for table in tables]
    passed = [run_ranks(2, files_of_a_rank, tmp_path)[0], files_of_the_front(tmp_path)]
    differences = [table ^ files for table, files in zip(listed, passed, strict=True)]
    assert differences == [set(), set()]
