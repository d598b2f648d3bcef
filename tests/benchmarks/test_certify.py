"""The figures are those of the definitions, nothing costs nothing, and damage costs more the larger it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.certify import certify
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.certificate import CERTIFICATE_FILE, Figures, read_certificate
from llama2.weights.convert import convert
from tests.support.reference import reference_model
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ROOT = Path(__file__).parents[2]
ARGS = tiny_args(vocab_size=480)
SIZES: dict[str, Any] = {"context": 48, "stride": 24, "device": "cpu"}

Converted = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = meta_folder(tmp_path_factory.mktemp("certify") / "source", ARGS, random_weights(ARGS), num_shards=1)
    tiny_sentencepiece(folder, vocab_size=480)
    return folder


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Converted:
    def make(quantize: str) -> Path:
        convert(source, tmp_path / quantize, quantize=quantize, quantize_head=False)
        return tmp_path / quantize

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def main{index}(argv): return {index * index}\n" for index in range(60)))
    return path


def figures(folder: Path) -> Figures:
    certificate = read_certificate(folder)
    assert certificate is not None
    return certificate.measurements[-1].figures


def test_a_folder_against_itself_costs_nothing(converted: Converted, text: Path) -> None:
    folder = converted("none")
    certify(checkpoint=str(folder), reference=str(folder), text=str(text), tokens=240, **SIZES)
    found = figures(folder)
    assert (found.kl_mean, found.kl_max, found.logit_difference_max) == (0, 0, 0)
    assert (found.ln_perplexity_ratio, found.ln_perplexity_ratio_error) == (0, 0)
    assert (found.top1_agreement, found.tokens) == (1, 240)
    assert found.greedy_agreement_mean == found.greedy_tokens == 24


def test_the_certificate_says_what_was_measured(converted: Converted, text: Path) -> None:
    folder, reference = converted("int4"), converted("none")
    certify(checkpoint=str(folder), reference=str(reference), text=str(text), **SIZES)
    certificate = read_certificate(folder)
    assert certificate is not None
    assert certificate.text.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (certificate.text.context, certificate.text.stride) == (48, 24)
    assert certificate.stored.keys() == {"q4", "float32"}
    assert certificate.reference.stored.keys() == {"float32"}
    assert "never quantized" in certificate.reference.note
    (measured,) = certificate.measurements
    assert (measured.device, measured.kernel, measured.tensor_parallel_size) == ("cpu", "A16", 1)
    assert (measured.torch, measured.noise_floor is None) == (torch.__version__, False)


def test_each_way_to_serve_the_weights_has_an_entry_and_its_own_figures(converted: Converted, text: Path) -> None:
    folder, reference = converted("int8"), converted("none")
    for activations, kv_cache in (("auto", "auto"), ("int8", "auto"), ("auto", "int8")):
        served = {"activation_dtype": activations, "kv_cache_dtype": kv_cache}
        certify(checkpoint=str(folder), reference=str(reference), text=str(text), **{**SIZES, **served})
    certificate = read_certificate(folder)
    assert certificate is not None
    found = {(one.kernel, one.kv_cache_dtype): one.figures.kl_mean for one in certificate.measurements}
    assert found.keys() == {("A16", "auto"), ("A8", "auto"), ("A16", "int8")}
    assert min(found.values()) == found["A16", "auto"] < found["A8", "auto"]


def test_the_coarser_the_weights_the_larger_the_figures(converted: Converted, text: Path) -> None:
    reference, folders = converted("none"), [converted("int8"), converted("int4")]
    certify(checkpoint=list(map(str, folders)), reference=str(reference), text=str(text), dtype="fp32", **SIZES)
    fine, coarse = map(figures, folders)
    for name in ("kl_mean", "kl_median", "kl_p99", "logit_difference_mean", "logit_difference_max"):
        assert 0 < 2 * getattr(fine, name) < getattr(coarse, name), name
    assert 1 > fine.top1_agreement > coarse.top1_agreement
    assert fine.greedy_tokens > fine.greedy_agreement_mean > coarse.greedy_agreement_mean


def test_the_figures_are_those_of_transformers(source: Path, tmp_path: Path, text: Path) -> None:
    weights, damaged = random_weights(ARGS), random_weights(ARGS)
    generator = torch.Generator().manual_seed(5)
    for name in damaged:
        damaged[name] += 0.02 * torch.randn(damaged[name].shape, generator=generator)
    meta_folder(tmp_path / "damaged", ARGS, damaged, num_shards=1)
    shutil.copy(source / "tokenizer.model", tmp_path / "damaged")
    convert(source, tmp_path / "theirs")
    convert(tmp_path / "damaged", tmp_path / "own")
    certify(checkpoint=str(tmp_path / "own"), reference=str(tmp_path / "theirs"), text=str(text), dtype="fp32", **SIZES)

    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode(text.read_text())
    span, stride = SIZES["context"] - 1, SIZES["stride"]
    starts = range(0, len(ids) - span + 1, stride)
    windows_WT = torch.tensor([[tokenizer.bos_id, *ids[start : start + span]] for start in starts])
    with torch.inference_mode():
        own, theirs = (
            reference_model(ARGS, one)(windows_WT).logits[:, -stride - 1 : -1].double() for one in (damaged, weights)
        )
    own_logs, their_logs = own.log_softmax(-1), theirs.log_softmax(-1)
    next_WT1 = windows_WT[:, -stride:, None]
    kl = torch.nn.functional.kl_div(own_logs, their_logs, log_target=True, reduction="none").sum(-1).flatten()
    own_nll, their_nll = (-logs.gather(-1, next_WT1)[..., 0] for logs in (own_logs, their_logs))
    means = (own_nll - their_nll).mean(1)
    expected = {
        "tokens": kl.numel(),
        "ln_perplexity": own_nll.mean(),
        "reference_ln_perplexity": their_nll.mean(),
        "ln_perplexity_ratio": (own_nll - their_nll).mean(),
        "ln_perplexity_ratio_error": means.std() / len(means) ** 0.5,
        "kl_mean": kl.mean(),
        "kl_median": kl.quantile(0.5),
        "kl_p99": kl.quantile(0.99),
        "kl_max": kl.max(),
        "top1_agreement": (own.argmax(-1) == theirs.argmax(-1)).double().mean(),
        "logit_difference_mean": (own - theirs).abs().mean(),
        "logit_difference_max": (own - theirs).abs().max(),
    }
    found = figures(tmp_path / "own")
    assert {name: getattr(found, name) for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-3, abs=1e-5
    )


@pytest.mark.integration
def test_another_degree_adds_an_entry(converted: Converted, text: Path) -> None:
    folder, reference = converted("int4"), converted("none")
    words = (
        f"-m benchmarks.certify --checkpoint {folder} --reference {reference} --text {text} --context 48 --stride 24"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launch in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *launch, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    certificate = read_certificate(folder)
    assert certificate is not None
    one, two = certificate.measurements
    assert (one.tensor_parallel_size, two.tensor_parallel_size) == (1, 2)
    assert two.figures.kl_mean == pytest.approx(one.figures.kl_mean, rel=0.2)


def refused(**arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        certify(**{**SIZES, **{name: str(value) if name != "stride" else value for name, value in arguments.items()}})
    return str(caught.value)


def test_another_architecture_is_refused(converted: Converted, text: Path, tmp_path: Path) -> None:
    other = tiny_args(vocab_size=480, norm_eps=1e-6)
    source = meta_folder(tmp_path / "source", other, random_weights(other), num_shards=1)
    tiny_sentencepiece(source, vocab_size=480)
    convert(source, tmp_path / "other")
    message = refused(checkpoint=tmp_path / "other", reference=converted("none"), text=text)
    assert "must be of one architecture, but norm_eps is 1e-06 in " in message


def test_another_tokenizer_is_refused(converted: Converted, text: Path, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "source", ARGS, random_weights(ARGS), num_shards=1)
    tiny_sentencepiece(source, vocab_size=470)
    convert(source, tmp_path / "other")
    message = refused(checkpoint=tmp_path / "other", reference=converted("none"), text=text)
    assert message.endswith("must have the same tokenizer")


def test_a_text_that_is_too_short_is_told_how_much_is_needed(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def main(argv)")
    folder = converted("none")
    message = refused(checkpoint=folder, reference=folder, text=tmp_path / "short.txt")
    assert "tokens, and 8 windows need 215: give a longer one" in message
    assert not (folder / CERTIFICATE_FILE).exists()


def test_a_text_that_cannot_be_read_is_named(converted: Converted, tmp_path: Path) -> None:
    folder = converted("none")
    assert "cannot be read" in refused(checkpoint=folder, reference=folder, text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not in UTF-8: byte 3" in refused(checkpoint=folder, reference=folder, text=tmp_path / "latin.txt")


def test_a_stride_that_leaves_no_context_is_refused(converted: Converted, text: Path) -> None:
    folder = converted("none")
    assert "--stride must be less than the 47" in refused(checkpoint=folder, reference=folder, text=text, stride=47)


def test_the_file_is_json_that_others_can_read(converted: Converted, text: Path) -> None:
    folder = converted("none")
    certify(checkpoint=str(folder), reference=str(folder), text=str(text), dtype="fp32", **SIZES)
    content = json.loads((folder / CERTIFICATE_FILE).read_text(), parse_constant=pytest.fail)
    assert content["measurements"][0]["noise_floor"] is None
