"""Measures fine-tuning against PEFT and transformers: the same weights, samples, batches and adapter, in turns.

    python -m benchmarks.finetune --checkpoint smollm2 [--tokens 256] [--batch_size 4] [--rounds 5] [--out FILE]

Two kinds of samples: texts of which every token counts, all of one length; and prompts of any length up to that, whose
completions alone count, an eighth of them. PEFT pads a batch to its longest sample, as its users do; tokens of padding
count for nobody. Both step with AdamW over fp32 matrices, and both, or none, compute layers again on the way back.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.peers.export import Source, write_hf
from benchmarks.results import RESULTS, machine, save
from benchmarks.tables import table
from llama2.adapters.format import targets
from llama2.flags import check_counts, run
from llama2.parallel.plan import build_mesh
from llama2.parallel.process_group import init_process_group
from llama2.training.checkpoints import RunFolder
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample
from llama2.training.run import load
from llama2.training.trainer import Trainer
from llama2.weights.readers.dcp import DcpFolder

CPU = torch.device("cpu")
BATCHES = 8
# One training step over these samples.
TakeStep = Callable[[Sequence[Sample]], object]


def benchmark(
    *,
    checkpoint: str,
    tokens: int = 256,
    batch_size: int = 4,
    rounds: int = 5,
    threads: int = 2,
    gradient_checkpointing: bool = False,
    out: str = str(RESULTS / "finetune.json"),
) -> None:
    """Train with both in turns on a CPU, print tokens/s, and write them as JSON.

    Args:
        checkpoint: a converted folder, of weights that are not quantized.
        tokens: of the longest samples.
        batch_size: samples of a step.
        rounds: how many steps of each count, after one that warms up.
        threads: of the processor.
        gradient_checkpointing: whether both compute layers again on the way back.
        out: the JSON file to write.
    """
    check_counts(tokens=tokens, batch_size=batch_size, rounds=rounds, threads=threads)
    torch.set_num_threads(threads)
    folder = DcpFolder(checkpoint)
    config = TrainingConfig(
        checkpoint_dir=checkpoint,
        data="none",
        output_dir="none",
        validation_fraction=0,
        max_length=tokens,
        schedule="constant",
        gradient_checkpointing=gradient_checkpointing,
    )
    kinds = samples_of(folder.spec.args.vocab_size, tokens=tokens, batch_size=batch_size, steps=rounds + 1)
    figures: dict[str, Any] = {"machine": machine()}
    with TemporaryDirectory(prefix="benchmark-finetune-") as scratch:
        init_process_group(CPU)
        peer = peft_step(write_hf(Source.of_checkpoint(Path(checkpoint)), Path(scratch), folder.spec.dtype), config)
        own = own_step(folder, config, Path(scratch))
        rows = []
        for kind, steps in kinds.items():
            seconds: dict[str, list[float]] = {"own": [], "peft": []}
            for step in steps:
                for name, take in (("own", own), ("peft", peer)):
                    started = time.perf_counter()
                    take(step)
                    seconds[name].append(time.perf_counter() - started)
            counts = [sum(map(len, step)) for step in steps][1:]
            rates = {
                name: statistics.median(count / each for count, each in zip(counts, taken[1:], strict=True))
                for name, taken in seconds.items()
            }
            ratios = [theirs / ours for ours, theirs in zip(seconds["own"][1:], seconds["peft"][1:], strict=True)]
            figures[kind] = {"tokens_per_s": rates, "ratio": statistics.median(ratios), "ratios": ratios}
            rows.append(
                [kind, f"{rates['own']:.0f}", f"{rates['peft']:.0f}", f"{statistics.median(ratios):.2f}",
                 f"{min(ratios):.2f} to {max(ratios):.2f}"]
            )  # fmt: skip
    print(table(["samples", "tokens/s", "PEFT's", "ratio", "of single steps"], rows))
    settings = {
        "tokens": tokens, "batch_size": batch_size, "rounds": rounds, "threads": threads,
        "gradient_checkpointing": gradient_checkpointing, "rank": config.rank,
    }  # fmt: skip
    print(f"wrote {save(out, 'finetune', settings, figures)}")


def samples_of(vocab_size: int, *, tokens: int, batch_size: int, steps: int) -> dict[str, list[list[Sample]]]:
    """By kind, the samples of each step."""
    drawn = random.Random(0)

    def sample(length: int, learned: int) -> Sample:
        ids = tuple(drawn.randrange(vocab_size) for _ in range(length))
        return Sample(ids=ids, counts=(False,) * (length - learned) + (True,) * learned)

    lengths = [[drawn.randint(tokens // 4, tokens) for _ in range(batch_size)] for _ in range(steps)]
    return {
        "texts": [[sample(tokens, tokens - 1) for _ in range(batch_size)] for _ in range(steps)],
        "prompts": [[sample(length, max(1, length // 8)) for length in step] for step in lengths],
    }


def own_step(folder: DcpFolder, config: TrainingConfig, scratch: Path) -> TakeStep:
    wanted = targets(config.adapter_config(), folder.spec.args)
    mesh = build_mesh(folder.spec, "cpu")
    passes, adapter, collectives = load(folder, wanted, config, mesh=mesh, dtype=folder.spec.dtype, device=CPU)
    samples: list[Sample] = []
    trainer = Trainer(config, passes, adapter, collectives, RunFolder(scratch, {}), samples, [])

    def take(step: Sequence[Sample]) -> None:
        samples[:] = step
        trainer.step(1, [list(range(len(step)))])

    return take


def peft_step(folder: Path, config: TrainingConfig) -> TakeStep:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    lora = LoraConfig(r=config.rank, lora_alpha=int(config.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, fused=True)

    def take(step: Sequence[Sample]) -> None:
        longest = max(map(len, step))
        ids, labels, mask = (torch.full((len(step), longest), fill) for fill in (0, -100, 0))
        for row, sample in enumerate(step):
            ids[row, : len(sample)], mask[row, : len(sample)] = torch.tensor(sample.ids), 1
            labels[row, : len(sample)] = torch.where(torch.tensor(sample.counts), torch.tensor(sample.ids), -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()

    return take


def main() -> None:
    run(benchmark)


if __name__ == "__main__":
    main()
