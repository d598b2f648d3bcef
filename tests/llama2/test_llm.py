"""The offline front: what goes in, what comes out, and that a mistake leaves it usable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama2 import LLM, SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

PARAMS = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    args = tiny_args(vocab_size=512)
    tokenizer_file = tiny_sentencepiece(folder, vocab_size=512)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer_file)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_seq_len=128, max_batch_size=2)


def test_an_option_of_the_engine_is_a_keyword_and_an_unknown_one_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_seq_len must be a positive integer, got 0"):
        LLM(folder, max_seq_len=0)
    with pytest.raises(TypeError, match="max_sequence_length"):
        LLM(folder, max_sequence_length=8)


def test_text_and_its_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "What is the recipe of mayonnaise?"
    ids = llm.tokenizer.encode_prompt(text)
    assert ids[0] == llm.tokenizer.bos_id
    (from_text,), (from_ids,) = llm.generate([text], PARAMS), llm.generate([ids], PARAMS)
    assert from_text == from_ids
    assert (from_text.prompt_tokens, len(from_text.token_ids), from_text.finish_reason) == (len(ids), 8, "length")
    assert from_text.logprobs is None
    whole = llm.tokenizer.decode(ids + from_text.token_ids)
    assert whole == text + from_text.text


def test_replies_come_in_the_order_of_the_prompts_each_with_its_own_params(llm: LLM) -> None:
    prompts = ["one", "two two", "three", "four", "five"]
    params = [SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True) for length in (9, 1, 7, 2, 5)]
    replies = llm.generate(prompts, params)
    assert [len(reply.token_ids) for reply in replies] == [9, 1, 7, 2, 5]
    assert [reply.prompt_tokens for reply in replies] == [len(llm.tokenizer.encode_prompt(one)) for one in prompts]


def test_a_chat_is_encoded_in_the_models_format(llm: LLM) -> None:
    (reply,) = llm.chat([[{"role": "user", "content": "Hello!"}]], PARAMS)
    assert reply.prompt_tokens == len(llm.tokenizer.encode_prompt("[INST] Hello! [/INST]"))


def test_nothing_in_nothing_out(llm: LLM) -> None:
    assert llm.generate([], PARAMS) == []


def test_one_mistake_in_a_batch_is_named_and_nothing_of_the_batch_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt_ids must have from 1 to 127 tokens, got 500"):
        llm.generate([[5], [5] * 500], PARAMS)
    with pytest.raises(ValueError, match=r"as many as there are prompts \(2\), got 1"):
        llm.generate([[5], [6]], [PARAMS])
    with pytest.raises(ValueError, match="got one string"):
        llm.generate("Hello", PARAMS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each a list of messages; got a message in its place"):
        llm.chat([{"role": "user", "content": "Hello!"}], PARAMS)  # type: ignore[list-item]
    assert len(llm.generate([[5]], PARAMS)) == 1


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[5, 6]], PARAMS)
    step, calls = llm._engine.step, iter([True, True, False])

    def interrupted() -> object:
        if not next(calls):
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[7], [8], [9]], PARAMS)
    monkeypatch.undo()
    assert llm.generate([[5, 6]], PARAMS) == expected
    llm._engine.check_integrity()
    assert llm._engine.stats().free_blocks == llm._engine.stats().total_blocks


@pytest.mark.integration
def test_a_script_runs_unchanged_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """The same lines in one process and on two ranks: every rank gets the same reply and ends by itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from llama2 import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, max_seq_len=64)\n"
        "(reply,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_new_tokens=5))\n"
        f"Path({str(tmp_path)!r}, os.environ.get('RANK', 'alone')).write_text(str(reply.token_ids))\n"
    )
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
        assert done.returncode == 0, done.stderr
    alone, *ranks = [(tmp_path / name).read_text() for name in ("alone", "0", "1")]
    assert ranks == [alone, alone]
