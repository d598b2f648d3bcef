"""What is trained has PEFT's gradients, however samples lie in a batch and whatever the weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llama2.adapters.adapter import LoraPair
from llama2.adapters.format import write_adapter
from llama2.config import ModelArgs
from llama2.text.tokenizer import load_tokenizer
from llama2.training import loss
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.hf_layout import hf_name, is_rotated, pairs_from_halves
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import reference_model
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.training import one_step, options, random_pairs, random_samples
from tests.support.weights import meta_folder, meta_weights, random_weights, tiny_args

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ARGS = tiny_args()
WEIGHTS = random_weights(ARGS)
SAMPLES = random_samples([5, 2, 33, 18], ARGS.vocab_size)
ALL = options()
QV = options(target_modules=["q_proj", "v_proj"], rank=4, use_rslora=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def largest_difference(ours: dict[str, LoraPair] | None, theirs: dict[str, LoraPair] | None) -> float:
    """Of any matrix, relative to its norm."""
    assert ours is not None
    assert theirs is not None
    assert ours.keys() == theirs.keys()
    return max(
        max(relative(ours[name].a_RC, theirs[name].a_RC), relative(ours[name].b_FR, theirs[name].b_FR))
        for name in theirs
    )


def peft_step(
    folder: Path, config: TrainingConfig, args: ModelArgs, model: LlamaForCausalLM, samples: list[Sample]
) -> tuple[torch.Tensor, dict[str, LoraPair]]:
    """PEFT's losses and gradients, in Meta's order of outputs; each sample alone.

    The loss is in fp64: in fp32 that of a token which the model is sure of has few digits, and its gradient no more.
    """
    write_adapter(folder, random_pairs(config, args), config.adapter_config(), args)
    tuned = peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    losses = []
    for sample in samples:
        logits = tuned(torch.tensor([sample.ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(sample.ids[1:]), reduction="none")
        losses.append(each[torch.tensor(sample.counts[1:])])
    all_losses = torch.cat(losses)
    all_losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in tuned.named_parameters() if parameter.grad is not None}

    def of(weight: str, matrix: str) -> torch.Tensor:
        return gradients.pop(f"base_model.model.{hf_name(weight)}.lora_{matrix}.default.weight")

    pairs = {}
    for weight, pair in random_pairs(config, args).items():
        b_FR = of(weight, "B")
        b_FR = pairs_from_halves(b_FR, args.head_dim) if is_rotated(weight) else b_FR
        pairs[weight] = LoraPair(a_RC=of(weight, "A"), b_FR=b_FR, scaling=pair.scaling)
    assert not gradients
    return all_losses.detach().float(), pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", ARGS, WEIGHTS)


@pytest.mark.parametrize("config", [ALL, QV], ids=["all linear layers", "q and v"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_step_has_the_gradients_of_peft(folder: Path, tmp_path: Path, config, checkpointing: bool) -> None:
    theirs, their_gradients = peft_step(tmp_path / "adapter", config, ARGS, reference_model(ARGS, WEIGHTS), SAMPLES)
    changed = options(
        target_modules=config.target_modules, rank=config.rank, use_rslora=config.use_rslora,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    ours, gradients, norm = one_step(folder, changed, SAMPLES)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert largest_difference(gradients, their_gradients) < 1e-5
    squares = sum(pair.a_RC.square().sum() + pair.b_FR.square().sum() for pair in their_gradients.values())
    assert norm == pytest.approx(float(squares) ** 0.5, rel=1e-5)


@pytest.mark.integration
def test_a_trained_model_has_the_gradients_of_peft_in_fp64(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = DcpFolder(smollm2_checkpoint)
    args, tokenizer = checkpoint.spec.args, load_tokenizer(smollm2_checkpoint)
    texts = ("The capital of France is Paris, and that of Italy is Rome.", "Once upon a time there was a king.")
    samples = [
        Sample(ids=tuple(ids), counts=(False,) * 4 + (True,) * (len(ids) - 4)) for ids in map(tokenizer.encode, texts)
    ]
    model = torch.nn.Module.double(reference_model(args, meta_weights(checkpoint)))
    theirs, expected = peft_step(tmp_path / "adapter", ALL, args, model, samples)
    ours, gradients, _ = one_step(smollm2_checkpoint, ALL, samples)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert gradients is not None

    def all_of(pairs: Mapping[str, LoraPair]) -> torch.Tensor:
        return torch.cat([matrix.flatten() for pair in pairs.values() for matrix in (pair.a_RC, pair.b_FR)])

    assert relative(all_of(gradients), all_of(expected)) < 1e-5


def test_samples_of_one_batch_do_not_see_each_other(folder: Path) -> None:
    together, gradients, _ = one_step(folder, ALL, SAMPLES)
    alone = [one_step(folder, ALL, [sample]) for sample in SAMPLES]
    torch.testing.assert_close(torch.cat([losses for losses, _, _ in alone]), together, rtol=1e-5, atol=1e-6)
    fractions = [len(losses) / len(together) for losses, _, _ in alone]

    def summed(name: str, matrix: str) -> torch.Tensor:
        parts = zip(fractions, alone, strict=True)
        return torch.stack([part * getattr((pairs or {})[name], matrix) for part, (_, pairs, _) in parts]).sum(0)

    assert gradients is not None
    expected = {name: replace(p, a_RC=summed(name, "a_RC"), b_FR=summed(name, "b_FR")) for name, p in gradients.items()}
    assert largest_difference(gradients, expected) < 1e-5


def test_the_loss_does_not_depend_on_how_many_rows_are_computed_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gradients, _ = one_step(folder, ALL, SAMPLES)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * ARGS.vocab_size * 3)
    pieces, others, _ = one_step(folder, ALL, SAMPLES)
    torch.testing.assert_close(pieces, whole)
    assert largest_difference(others, gradients) < 1e-5


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_a_quantized_base_has_the_gradients_of_its_values(tmp_path: Path, quantize: str) -> None:
    """QLoRA: nf4 as it is stored, and a checkpoint of the values that it stands for."""
    args = tiny_args(vocab_size=512)
    source = meta_folder(tmp_path / "meta", args, random_weights(args), num_shards=1)
    tiny_sentencepiece(source)
    quantized, values = tmp_path / quantize, tmp_path / "values"
    convert(source, quantized, quantize=quantize)
    convert(quantized, values, quantize="none")
    samples = random_samples([20, 9], args.vocab_size)
    ours, gradients, _ = one_step(quantized, ALL, samples)
    theirs, expected, _ = one_step(values, ALL, samples)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert largest_difference(gradients, expected) < 1e-5
    exact, _, _ = one_step(write_checkpoint(tmp_path / "exact", args, random_weights(args)), ALL, samples)
    assert (exact - ours).abs().max() > 0.01


def test_bfloat16_is_near(folder: Path) -> None:
    exact, gradients, _ = one_step(folder, ALL, SAMPLES)
    near, others, _ = one_step(folder, ALL, SAMPLES, torch.bfloat16)
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0.03)
    assert 1e-4 < largest_difference(others, gradients) < 0.05


def test_dropout_leaves_out_as_many_inputs_and_depends_on_the_seed_alone(folder: Path) -> None:
    config = options(dropout=0.25)
    first, gradients, _ = one_step(folder, config, SAMPLES, dropout_seed=3)
    again, same, _ = one_step(folder, options(dropout=0.25, gradient_checkpointing=False), SAMPLES, dropout_seed=3)
    assert torch.equal(first, again)
    assert largest_difference(same, gradients) < 1e-6
    other, _, _ = one_step(folder, config, SAMPLES, dropout_seed=4)
    without, _, _ = one_step(folder, config, SAMPLES)
    exact, _, _ = one_step(folder, ALL, SAMPLES)
    assert torch.equal(without, exact)
    assert not torch.equal(first, exact)
    assert not torch.equal(first, other)
