"""A merged model computes what the base computes with the adapter, and says what it was merged into."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from llama2.adapters.adapter import Adapter
from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import Base, check_fits, read_adapter, write_adapter
from llama2.weights.certificate import Identity
from llama2.weights.convert import OutputFormat, convert
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.origin import SORTED, describe, read_origin
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import same_bits
from tests.support.adapters import adapted_logits, random_pairs
from tests.support.conversion import ARGS, WEIGHTS
from tests.support.peft_models import peft_logits, peft_model
from tests.support.quantized import save_gptq
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, meta_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*single process.*"),
]

IDS = torch.randint(0, 480, (40,), generator=torch.Generator().manual_seed(3)).tolist()
FP32 = {name: weight.float() for name, weight in WEIGHTS.items()}
CHANGED = ("attention.wq", "attention.wv", "feed_forward.w2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Meta's in bf16 as `meta`, and what is converted of it, as `plain` and `nf4`."""
    folder = tmp_path_factory.mktemp("merge")
    meta_folder(folder / "meta", ARGS, WEIGHTS, num_shards=2)
    tiny_sentencepiece(folder / "meta", vocab_size=480)
    convert(folder / "meta", folder / "plain")
    convert(folder / "meta", folder / "nf4", quantize="nf4")
    return folder


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of queries, values and w2."""
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    model = peft_model(ARGS, FP32, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 2})
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(adapter_folder: Path) -> Adapter:
    return read_adapter(adapter_folder, ARGS)


def trained_on(adapter_folder: Path, target: Path, checkpoint: Path) -> Path:
    """The same adapter, as one that names its base."""
    base = Base(weights=Identity.of(checkpoint).weights, stored=DcpFolder(checkpoint).spec.stored())
    pairs = read_adapter(adapter_folder, ARGS).pairs
    write_adapter(target, pairs, AdapterConfig.load(adapter_folder), ARGS, base=base)
    return target


def with_adapter(weights: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """The sums in fp32."""
    pairs = {f"{name}.weight": pair for name, pair in adapter.pairs.items()}
    return {
        name: weight.float() + pairs[name].delta() if name in pairs else weight.float()
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("output_format", ["dcp", "hf", "fairscale"])
def test_merged_equals_unmerged(
    models: Path, adapter_folder: Path, tmp_path: Path, output_format: OutputFormat
) -> None:
    convert(
        models / "meta",
        tmp_path / "out",
        adapter=adapter_folder,
        dtype=torch.float32,
        output_format=output_format,
        output_model_parallel_size=2 if output_format == "fairscale" else None,
        verify=True,
    )
    model = peft_model(ARGS, FP32, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 2})
    expected = peft_logits(model, IDS)
    if output_format == "hf":
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(peft_logits(theirs, IDS), expected, atol=1e-4, rtol=0)
    if output_format != "dcp":
        convert(tmp_path / "out", tmp_path / "again")
    folder = tmp_path / ("out" if output_format == "dcp" else "again")
    merged = adapted_logits(folder, [(IDS, None)])
    assert merged is not None
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert (peft_logits(model, IDS) - expected).abs().max() > 1e-2


def test_a_sum_is_rounded_once(models: Path, adapter_folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    convert(models / "plain", tmp_path / "out", adapter=adapter_folder)
    merged = meta_weights(DcpFolder(tmp_path / "out"))
    for name, values in with_adapter(WEIGHTS, adapter).items():
        assert torch.equal(merged[name], values.bfloat16()), name


def test_of_quantized_weights_those_that_change_become_plain(
    models: Path, adapter_folder: Path, adapter: Adapter, tmp_path: Path
) -> None:
    convert(models / "nf4", tmp_path / "out", adapter=adapter_folder, dtype=torch.float32)
    source, out = DcpFolder(models / "nf4"), DcpFolder(tmp_path / "out")
    changed = {f"layers.0.{name}" for name in CHANGED}
    assert out.spec.formats == {name: each for name, each in source.spec.formats.items() if name not in changed}
    for name in out.spec.tensors():
        if name.rpartition(".")[0] in source.spec.formats.keys() - changed:
            assert same_bits(out.read(name).flatten(), source.read(name).flatten()), name
    expected = with_adapter(meta_weights(source), adapter)
    for name, values in meta_weights(out).items():
        assert torch.equal(values, expected[name]), name


def test_the_sums_are_quantized_if_that_is_asked_for(
    models: Path, adapter_folder: Path, adapter: Adapter, tmp_path: Path
) -> None:
    """Of plain weights, of what they would be as NF4, and of NF4 as it is stored."""
    convert(models / "plain", tmp_path / "original", adapter=adapter_folder, quantize="nf4")
    convert(models / "plain", tmp_path / "made", adapter=adapter_folder, quantize="nf4", onto="quantized")
    with pytest.raises(ValueError, match="--requantize allows to make nf4"):
        convert(models / "nf4", tmp_path / "stored", adapter=adapter_folder, quantize="nf4")
    convert(models / "nf4", tmp_path / "stored", adapter=adapter_folder, quantize="nf4", requantize=True)
    made, stored = (meta_weights(DcpFolder(tmp_path / name)) for name in ("made", "stored"))
    bases = {"original": FP32, "made": meta_weights(DcpFolder(models / "nf4"))}
    for name, weights in bases.items():
        out = DcpFolder(tmp_path / name)
        for changed in CHANGED:
            weight = f"layers.0.{changed}"
            format = out.spec.formats[weight]
            assert isinstance(format, Lut4)
            sums = with_adapter(weights, adapter)[f"{weight}.weight"]
            expected = format.dequantize(format.quantize(sums))
            assert torch.equal(meta_weights(out)[f"{weight}.weight"], expected), (name, weight)
    for name, values in made.items():
        assert torch.equal(values, stored[name]), name


def test_a_folder_says_what_was_merged_into_it(
    models: Path, adapter_folder: Path, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = {"adapter": f"sha256:{adapter.identity.hex()}", "onto": "original"}
    with caplog.at_level("INFO"):
        convert(models / "plain", tmp_path / "merged", adapter=adapter_folder)
    stored = {"bfloat16": sum(weight.numel() for weight in WEIGHTS.values())}
    assert read_origin(tmp_path / "merged") == (stored, step)
    assert f"merging {adapter_folder} (3 weights, rank 4) into the values of {models / 'plain'} as they" in caplog.text
    assert "(bfloat16); it does not say what it was trained on" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        convert(
            models / "nf4",
            tmp_path / "twice",
            adapter=trained_on(adapter_folder, tmp_path / "mine", models / "nf4"),
            output_format="hf",
        )
    assert "as they are stored (q8 and nf4 and bfloat16), dequantized; it was trained on these" in caplog.text
    convert(tmp_path / "twice", tmp_path / "again")
    assert [set(each) for each in read_origin(tmp_path / "again")] == [
        {"bfloat16"},
        {"q8", "nf4", "bfloat16"},
        {"adapter", "onto"},
        {"bfloat16"},
    ]
    assert read_origin(tmp_path / "again")[2]["onto"] == "quantized"
    assert describe(read_origin(tmp_path / "again")).endswith(f" Adapters were merged into them: {step['adapter']}.")
    # Of a merged folder another hash is known.
    assert Identity.of(tmp_path / "merged").weights != Identity.of(models / "plain").weights


REFUSALS: list[tuple[str, str | None, dict[str, Any], str]] = [
    ("nf4", None, {"onto": "original"}, r"--onto original needs values that are not quantized, .*nf4 is stored as q8"),
    ("plain", None, {"onto": "quantized"}, r"--onto quantized needs quantized values, .*plain is stored as bfloat16"),
    ("plain", None, {"onto": "both"}, r"onto must be original or quantized, got 'both'"),
    ("plain", "nf4", {}, r"was trained on weights stored as q8 and nf4 and bfloat16, .* set --onto to original"),
    ("nf4", "plain", {}, r"was trained on weights stored as bfloat16, .* set --onto to quantized"),
    ("other", "plain", {}, r"was trained on another base: on weights stored as bfloat16 with the hash xxh3_128"),
    ("other", "plain", {"onto": "original"}, r"was trained on another base"),
]


@pytest.mark.parametrize(("source", "base", "options", "message"), REFUSALS)
def test_what_does_not_belong_together_is_refused(
    models: Path,
    adapter_folder: Path,
    tmp_path: Path,
    source: str,
    base: str | None,
    options: dict[str, Any],
    message: str,
) -> None:
    folder = adapter_folder
    if base is not None:
        folder = trained_on(adapter_folder, tmp_path / "adapter", models / base)
    if source == "other":
        other = {name: weight + 1 for name, weight in WEIGHTS.items()}
        meta_folder(tmp_path / "meta", ARGS, other, num_shards=1)
        shutil.copy(models / "meta" / "tokenizer.model", tmp_path / "meta")
        convert(tmp_path / "meta", tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        convert((tmp_path if source == "other" else models) / source, tmp_path / "out", adapter=folder, **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_said(
    models: Path, adapter_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source, base, onto, words in (
        ("plain", "nf4", "original", "weights stored as q8 and nf4 and bfloat16, whose hash cannot be compared with"),
        ("meta", "plain", None, "weights stored as bfloat16, whose hash cannot be compared with these"),
    ):
        caplog.clear()
        folder = trained_on(adapter_folder, tmp_path / "adapter", models / base)
        with caplog.at_level("INFO"):
            convert(models / source, tmp_path / "out", adapter=folder, onto=onto, overwrite=True)
        assert words in caplog.text


def test_a_folder_that_is_no_adapter_is_named_with_its_option(models: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nothere", models / "plain"):
        with pytest.raises(ValueError, match=r"^--adapter must be a folder with adapter_config.json and .*, got '/"):
            convert(models / "plain", tmp_path / "out", adapter=folder)


def test_onto_without_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--onto says what an adapter is merged into, and there is no --adapter"):
        convert(models / "plain", tmp_path / "out", onto="original")


def test_sorted_hidden_features(tmp_path: Path) -> None:
    """An adapter of PEFT's for GPTQ with desc_act is merged in the files' order, and refused beside a sorted folder."""
    model = save_gptq(tmp_path / "gptq", shuffled=("down_proj",))
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    peft.save_pretrained(str(tmp_path / "adapter"))
    ids = list(range(3, 33))
    convert(tmp_path / "gptq", tmp_path / "merged", adapter=tmp_path / "adapter", dtype=torch.float32)
    merged = adapted_logits(tmp_path / "merged", [(ids, None)])
    torch.testing.assert_close(merged, peft_logits(peft, ids), atol=1e-4, rtol=0)
    assert SORTED in read_origin(tmp_path / "merged")

    convert(tmp_path / "gptq", tmp_path / "sorted")
    args = DcpFolder(tmp_path / "sorted").spec.args
    theirs = read_adapter(tmp_path / "adapter", args)
    with pytest.raises(ValueError, match=r"hidden features these weights have in another order than the files"):
        check_fits(tmp_path / "adapter", theirs, None, is_sorted=True)
    with pytest.raises(ValueError, match=r"hidden features these weights have in another order than the files"):
        convert(tmp_path / "sorted", tmp_path / "out", adapter=tmp_path / "adapter")
    # What was trained on the folder itself fits it, and not the files.
    own = Base(weights=Identity.of(tmp_path / "sorted").weights, stored=DcpFolder(tmp_path / "sorted").spec.stored())
    write_adapter(tmp_path / "own", theirs.pairs, AdapterConfig.load(tmp_path / "adapter"), args, base=own)
    assert check_fits(tmp_path / "own", theirs, own, is_sorted=True)
    convert(tmp_path / "sorted", tmp_path / "out", adapter=tmp_path / "own")
    with pytest.raises(ValueError, match=r"was trained on a converted folder, which has hidden features in another"):
        convert(tmp_path / "gptq", tmp_path / "other", adapter=tmp_path / "own")


def test_adapters_that_leave_hidden_features_alone_fit_sorted_ones(tmp_path: Path) -> None:
    config = AdapterConfig(target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", random_pairs(config, ARGS), config, ARGS)
    assert not check_fits(tmp_path / "adapter", read_adapter(tmp_path / "adapter", ARGS), None, is_sorted=True)
