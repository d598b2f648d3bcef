"""A certificate of a folder that nobody has measured: for what becomes of one afterwards."""

from __future__ import annotations

from pathlib import Path

from llama2.weights.certificate import Certificate, Figures, Identity, Measurement, Reference, Text

FIGURES = Figures(
    tokens=4096,
    ln_perplexity=2.5,
    reference_ln_perplexity=2.25,
    ln_perplexity_ratio=0.25,
    ln_perplexity_ratio_error=0.01,
    kl_mean=0.125,
    kl_median=0.0625,
    kl_p99=1.5,
    kl_max=7.0,
    top1_agreement=0.75,
    logit_difference_mean=0.5,
    logit_difference_max=9.0,
    greedy_prompts=8,
    greedy_tokens=128,
    greedy_agreement_mean=20.5,
    greedy_agreement_median=11.0,
)
MEASUREMENT = Measurement(
    device="cpu",
    processor="a processor",
    kernel="A16",
    implementation="CpuKernels",
    dtype="bfloat16",
    kv_cache_dtype="auto",
    tensor_parallel_size=1,
    torch="2.13.0",
    commit="0123456789ab",
    sources="0" * 64,
    figures=FIGURES,
    noise_floor=None,
)


def certificate_of(folder: Path) -> Certificate:
    """One that fits a converted folder."""
    own = Identity.of(folder)
    return Certificate(
        weights=own.weights,
        tokenizer=own.tokenizer,
        stored={"q4": 100, "bfloat16": 10},
        reference=Reference(weights="another", stored={"bfloat16": 110}, origin=({"Q4_1": 110},), note="A note."),
        text=Text(name="book.txt", sha256="1" * 64, context=1024, stride=512),
        measurements=(MEASUREMENT,),
    )
