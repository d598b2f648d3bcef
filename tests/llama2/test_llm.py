"""The offline front: what goes in, what comes out, and that a mistake leaves it usable."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from llama2 import LLM, AsyncLLM, Completion, SamplingParams
from llama2.progress import progress
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

PARAMS = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


class Answer(pydantic.BaseModel):
    sure: bool


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
    with pytest.raises(ValueError, match="max_sequence_length is an unknown name: did you mean 'max_seq_len'"):
        LLM(folder, max_sequence_length=8)


def test_the_folder_has_a_second_name_and_may_not_be_missing(folder: Path) -> None:
    with LLM(model=folder, max_model_len=32, max_num_seqs=3) as llm:
        assert llm.generate([[5]], PARAMS)
        assert (llm._engine.config.max_seq_len, llm._engine.config.max_batch_size) == (32, 3)
    for make in (LLM, AsyncLLM):
        with pytest.raises(ValueError, match="checkpoint_dir is missing: it is the folder that convert_checkpoints"):
            make(max_seq_len=32)
        with pytest.raises(ValueError, match="modell is an unknown name: did you mean 'model'"):
            make(modell=folder)
        with pytest.raises(ValueError, match=r"checkpoint_dir '/no/where' does not exist"):
            make(model="/no/where")


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
    with pytest.raises(ValueError, match=r"prompts\[.\] must have from 1 to 127 tokens, got 500"):
        llm.generate([[5], [5] * 500], PARAMS)
    with pytest.raises(ValueError, match=r"as many as there are prompts \(2\), got 1"):
        llm.generate([[5], [6]], [PARAMS])
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


def test_a_progress_bar_counts_the_replies_unless_none_is_wanted(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama2.llm.progress", lambda **settings: progress(**{**settings, "delay": 0}))
    for use_tqdm in (True, False):
        llm.generate(["Hello", "you"], PARAMS, use_tqdm=use_tqdm)
        assert ("2/2" in capsys.readouterr().err) == use_tqdm
        llm.chat([{"role": "user", "content": "Hello"}], PARAMS, use_tqdm=use_tqdm)
        assert ("1/1" in capsys.readouterr().err) == use_tqdm


def test_one_text_and_one_dialog_may_stand_alone(llm: LLM) -> None:
    dialog = [{"role": "user", "content": "Hello!"}]
    assert llm.generate("Hello", PARAMS) == llm.generate(["Hello"], PARAMS)
    assert llm.chat(dialog, PARAMS) == llm.chat([dialog], PARAMS)


def test_fields_of_the_parameters_are_keywords_and_win(llm: LLM) -> None:
    (expected,) = llm.generate(["Hello"], replace(PARAMS, max_new_tokens=3))
    assert llm.generate(["Hello"], PARAMS, max_tokens=3) == [expected]
    assert llm.generate(["Hello"], sampling_params=PARAMS, max_new_tokens=np.int64(3)) == [expected]


def test_several_replies_to_one_prompt_are_its_outputs(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=1, seed=3, max_new_tokens=6, logprobs=1, ignore_eos=True)
    (done,) = llm.generate(["Hello"], params)
    first, second = done.outputs
    assert first.token_ids != second.token_ids
    assert (done.text, done.token_ids, done.finish_reason) == (first.text, first.token_ids, first.finish_reason)
    assert done.logprobs == first.logprobs
    assert [entry.token_id for entry in second.logprobs or []] == second.token_ids


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"grammar": 'start: "ab" | "cd"'}, lambda text: text in ("ab", "cd")),
        ({"json_schema": {"enum": [7, 12]}}, lambda text: json.loads(text) in (7, 12)),
        ({"json_schema": '{"enum": [7, 12]}'}, lambda text: json.loads(text) in (7, 12)),
        ({"json_schema": Answer}, lambda text: Answer.model_validate_json(text).sure in (True, False)),
    ],
    ids=["choice", "regex", "grammar", "schema", "schema as text", "pydantic"],
)
def test_a_reply_is_held_to_a_constraint(llm: LLM, constraint: dict[str, Any], holds: Callable[[str], bool]) -> None:
    for done in llm.generate(["Is it?", "Tell me"], max_new_tokens=60, **constraint):
        assert done.finish_reason == "stop"
        assert holds(done.text)


MISTAKES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda llm: llm.generate([1, 2, 3]), r"prompts[0] must be a text or a list of token ids, got 1: one prompt"),
    (lambda llm: llm.generate(np.array([1, 2])), r"prompts[0] must be a text or a list of token ids"),
    (lambda llm: llm.generate([[1.5]]), "prompts[0] must be a text or a list of token ids, got [1.5]"),
    (lambda llm: llm.generate([{"prompt": "a"}]), "prompts[0] must be a text or a list of token ids"),
    (lambda llm: llm.generate(None), "prompts must be a text, or a list of texts and lists of token ids, got None"),
    (lambda llm: llm.generate("a", {"temperature": 0}), "params must be SamplingParams, such as"),
    (lambda llm: llm.generate("a", PARAMS, sampling_params=PARAMS), "sampling_params is a second name of params"),
    (lambda llm: llm.generate("a", temprature=1), "temprature is an unknown name: did you mean 'temperature'?"),
    (lambda llm: llm.generate("a", max_token=1), "max_token is an unknown name: did you mean 'max_tokens'?"),
    (lambda llm: llm.generate("a", json_shema={}), "json_shema is an unknown name: did you mean 'json_schema'?"),
    (lambda llm: llm.generate("a", n=3), "n must be at most max_batch_size=2, got 3"),
    (lambda llm: llm.generate("a", choice="yes"), "choice must be a list of texts, got 'yes'"),
    (lambda llm: llm.generate("a", regex="("), "regex cannot be followed: "),
    (lambda llm: llm.generate("a", grammar="start: b"), "grammar cannot be followed: "),
    (lambda llm: llm.generate("a", json_schema="{"), "json_schema is no JSON: "),
    (lambda llm: llm.generate("a", json_schema={}, regex="a"), "regex cannot be combined with json_schema"),
    (lambda llm: llm.generate("a", regex="a", ignore_eos=True), "ignore_eos cannot be combined with regex"),
    (lambda llm: llm.chat("Hello"), "dialogs must be a dialog, which is a list of messages, or a list of dialogs"),
    (lambda llm: llm.chat([]), 'dialogs must be a dialog, such as [{"role": "user", "content": "Hello"}], or a list'),
    (lambda llm: llm.chat([[], "a"]), "dialogs[0] "),
    (lambda llm: llm.chat([[{"role": "user", "content": "a"}], [{"role": "usr"}]]), "dialogs[1][0]"),
    (lambda llm: llm.stream(7), "prompt must be a text, a list of token ids or a list of messages, got 7"),
    (lambda llm: llm.stream(["a", "b"]), "prompt must be one prompt or dialog, got ['a', 'b']: generate and chat take"),
    (lambda llm: llm.stream([[5], [6]]), "prompt must be one prompt or dialog, got [[5], [6]]: generate and chat take"),
    (lambda llm: llm.stream([[{"role": "user", "content": "a"}]]), "prompt must be one prompt or dialog, got [[{"),
    (lambda llm: llm.stream([5] * 500), "prompts[0] must have from 1 to 127 tokens, got 500"),
    (lambda llm: llm.generate([[5], []]), "prompts[1] must have from 1 to 127 tokens, got 0"),
    (lambda llm: llm.score([]), "token_ids must have from 1 to 128 tokens, got 0"),
    (lambda llm: llm.score("Hello"), "token_ids must be a list of token ids, which tokenizer.encode_prompt makes"),
    (lambda llm: llm.score([[1]]), "token_ids must be one flat list of token ids, got [[1]]"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_it(llm: LLM, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(llm)
    assert str(caught.value).startswith(message)


def test_arrays_and_tensors_of_ids_are_prompts(llm: LLM) -> None:
    ids = [5, 6, 7]
    array: Any = np.array(ids)
    tensors: Any = [torch.tensor(ids)]
    assert llm.generate(array[None], PARAMS) == llm.generate(tensors, PARAMS) == llm.generate([ids], PARAMS)
    assert torch.equal(llm.score(array), llm.score(ids))


def test_the_pieces_of_a_stream_are_the_reply(llm: LLM) -> None:
    (whole,) = llm.generate(["Hello"], PARAMS)
    pieces = list(llm.stream("Hello", PARAMS))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token_id for piece in pieces for token_id in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    (chat,) = llm.chat([{"role": "user", "content": "Hello"}], PARAMS)
    assert "".join(piece.text for piece in llm.stream([{"role": "user", "content": "Hello"}], PARAMS)) == chat.text


def test_a_stream_that_is_left_gives_its_blocks_back_at_once(llm: LLM) -> None:
    for _ in llm.stream("Hello", PARAMS, max_new_tokens=10**6):
        break
    llm.stream("never begun", PARAMS)
    stats = llm._engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.total_blocks)


def test_calls_inside_the_loop_over_a_stream_leave_it_as_it_is(llm: LLM) -> None:
    (expected,) = llm.generate(["Hello"], PARAMS)
    ids: list[int] = []
    for piece in llm.stream("Hello", PARAMS):
        ids += piece.token_ids
        assert len(llm.generate([[5, 6]], PARAMS)) == 1
    assert ids == expected.token_ids


def test_threads_share_one_model_and_its_batches(llm: LLM) -> None:
    prompts = [[5 + index] * 3 for index in range(4)]
    alone = [llm.generate([prompt], PARAMS) for prompt in prompts]
    before = llm._engine.stats().steps
    start = threading.Barrier(len(prompts))

    def use(prompt: list[int]) -> list[list[Completion]]:
        start.wait()
        return [llm.generate([prompt], PARAMS) for _ in range(20)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(use, prompts))
    assert replies == [[expected] * 20 for expected in alone]
    assert llm._engine.stats().steps - before < 0.75 * len(prompts) * 20 * 8
    llm._engine.check_integrity()


@pytest.mark.parametrize("how", ["del", "close", "with"])
def test_memory_is_given_back(folder: Path, how: str) -> None:
    """Without the garbage collector's help, which would come at some time."""
    gc.disable()
    try:
        llm = LLM(folder, max_seq_len=64)
        runner = llm._engine._group._runner
        held = [weakref.ref(one) for one in (llm._engine, runner._model, runner._cache, runner._cache.keys[0])]
        del runner
        if how == "close":
            llm.close()
        elif how == "with":
            with llm:
                llm.generate("Hello", PARAMS)
        if how == "del":
            del llm
        else:
            with pytest.raises(RuntimeError, match="this LLM is closed"):
                llm.generate("Hello")
            llm.close()
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


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
        "pieces = [one.token_ids for one in llm.stream([5, 6, 7], temperature=0, max_tokens=5)]\n"
        "for _ in llm.stream([5, 6, 7], ignore_eos=True): break\n"
        "logits = llm.score([5, 6, 7])\n"
        "seen = (reply.token_ids, pieces, logits.shape)\n"
        f"Path({str(tmp_path)!r}, os.environ.get('RANK', 'alone')).write_text(str(seen))\n"
        "llm.close()\n"
    )
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
        assert done.returncode == 0, done.stderr
    alone, *ranks = [(tmp_path / name).read_text() for name in ("alone", "0", "1")]
    assert ranks == [alone, alone]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tensor_parallel_size": 2}, "start the script under torchrun"),
        ({"model": "x"}, "model is a second name of checkpoint_dir: give one of them"),
        ({"tokenizer": "x"}, "did you mean 'tokenizer_path'"),
        ({"temperature": 0}, r"is no option of an LLM but of a call: generate\(…, temperature=…\)"),
        ({"dtpye": "bf16"}, "did you mean 'dtype'"),
    ],
)
def test_an_option_that_belongs_elsewhere_is_told_where(option: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, **option)
