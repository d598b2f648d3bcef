"""A peer runs our weights: what is exported is the same model, and what is asked is answered."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.engines import MeasuredEngine
from benchmarks.peers.export import Source, write_gguf, write_hf
from benchmarks.peers.protocol import Peer, PeerError, Setup, Work
from benchmarks.peers.registry import find_peers
from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sequence import Request
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

ARGS = tiny_args(vocab_size=512)
PROMPTS = np.random.default_rng(0).integers(0, ARGS.vocab_size, (3, 20)).tolist()

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    return write_checkpoint(folder / "converted", ARGS, random_weights(ARGS), tiny_sentencepiece(folder))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    config = EngineConfig(max_seq_len=64, max_batch_size=4, prefix_cache=False)
    return load_engine(checkpoint, dtype=torch.float32, device="cpu", config=config)


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return write_hf(Source.of_checkpoint(checkpoint), checkpoint.parent / "cache", torch.float32)


def setup(weights: Path) -> Setup:
    return Setup(
        weights=str(weights),
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch=3,
        max_length=64,
        options={"random_weights": False},
    )


def test_transformers_computes_our_logits_from_the_exported_folder(engine: Engine, exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.inference_mode():
        theirs = model(torch.tensor(PROMPTS[:1])).logits[0]
    assert model.dtype == torch.float32
    engine.add(Request(request_id="score", prompt_ids=tuple(PROMPTS[0]), score=True, generate=False))
    (ours,) = engine.step()
    torch.testing.assert_close(ours.prompt_logits, theirs, rtol=1e-4, atol=1e-4)


def test_the_gguf_file_holds_our_weights_in_metas_layout(checkpoint: Path) -> None:
    """Through gguf's own reader: every tensor by its name there, weights in the type asked for, norms in fp32."""
    path = write_gguf(Source.of_checkpoint(checkpoint), checkpoint.parent / "cache", torch.bfloat16)
    reader = gguf.GGUFReader(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, ARGS.n_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = {str(names.get_name(name, (".weight",))): weight for name, weight in random_weights(ARGS).items()}
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        tensor = stored[name]
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        expected = weight if weight.dim() == 1 else weight.bfloat16().float()
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == ARGS.rope_theta
    assert fields["llama.attention.head_count_kv"] == ARGS.n_kv_heads
    assert fields["llama.vocab_size"] == ARGS.vocab_size
    assert fields["tokenizer.ggml.model"] == "no_vocab"


def test_an_export_is_kept_until_the_checkpoint_changes(checkpoint: Path, exported: Path) -> None:
    cache = exported.parent
    former = (exported / "model.safetensors").stat().st_mtime_ns
    assert write_hf(Source.of_checkpoint(checkpoint), cache, torch.float32) == exported
    assert (exported / "model.safetensors").stat().st_mtime_ns == former
    other = write_checkpoint(checkpoint.parent / "other" / "converted", ARGS, random_weights(ARGS, seed=1))
    assert write_hf(Source.of_checkpoint(other), cache, torch.float32) != exported
    assert not list(cache.glob("*.partial-*"))


def test_a_shape_is_exported_without_weights_which_its_reader_makes_up(tmp_path: Path) -> None:
    folder = write_hf(Source.of_shape("tiny", ARGS), tmp_path, torch.bfloat16)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["transformers", "transformers_batching"])
def test_a_peer_in_its_own_process_gives_our_greedy_tokens(
    engine: Engine, exported: Path, tmp_path: Path, name: str
) -> None:
    """The same prompts, the same fp32 weights: the same 1 + 6 tokens of each reply, and a time for each phase."""
    kind = find_peers([name], device_type="cpu")[name]
    work = Work(prompts=PROMPTS, new_tokens=6)
    with Peer(kind.python, f"benchmarks.peers.{kind.module}", setup(exported), log=tmp_path / "log") as peer:
        theirs = peer.run(work)
        assert peer.run(work).token_ids == theirs.token_ids
    ours = MeasuredEngine(engine).run(work)
    assert ours.token_ids == theirs.token_ids
    assert [len(reply) for reply in ours.token_ids] == [7, 7, 7]
    assert min(ours.prefill_seconds, ours.decode_seconds, theirs.prefill_seconds, theirs.decode_seconds) > 0
    engine.check_integrity()


def test_a_peer_lives_on_after_a_mistake(exported: Path, tmp_path: Path) -> None:
    kind = find_peers(["transformers"], device_type="cpu")["transformers"]
    work = Work(prompts=PROMPTS, new_tokens=2)
    with Peer(kind.python, f"benchmarks.peers.{kind.module}", setup(exported), log=tmp_path / "log") as peer:
        with pytest.raises(PeerError, match="ValueError: expected sequence of length"):
            peer.run(Work(prompts=[[1, 2], [3]], new_tokens=1))
        assert [len(reply) for reply in peer.run(work).token_ids] == [3, 3, 3]


def test_only_the_measured_work_is_in_the_times(engine: Engine) -> None:
    """One step computes 3 prompts of 20 tokens; another repeats it, and 6 decode. The cache holds none of it."""
    measured, work = MeasuredEngine(engine), Work(prompts=PROMPTS, new_tokens=6)
    measured.run(work)  # warms up
    before = engine.stats()
    measured.run(work)
    after = engine.stats()
    assert after.steps - before.steps == 1 + 1 + 6
    assert after.prompt_tokens - before.prompt_tokens == 2 * 3 * 20
    assert after.cached_tokens == 0
    assert after.free_blocks == after.total_blocks


def test_what_a_library_prints_is_no_answer_and_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Peer(Path(sys.executable), "tests.benchmarks.chatty_peer", setup(tmp_path), log=log) as peer:
        assert peer.version == "1.0"
        done = peer.run(Work(prompts=[[1, 2]], new_tokens=3))
    assert (done.prefill_seconds, done.decode_seconds, done.token_ids) == (1.0, 3.0, [[1, 2]])
    assert log.read_text().splitlines() == [f"loading {tmp_path}", '{"error": "from a library in C"}']


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"No module named benchmarks\.peers\.nobody"):
        Peer(Path(sys.executable), "benchmarks.peers.nobody", setup(tmp_path), log=tmp_path / "log")
