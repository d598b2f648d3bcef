"""Owns `certificate.json` of a converted folder: what the precision of its weights costs, as it was measured.

It says of which weights it speaks, by their hashes, and is refused beside others. Knows no torch, and not how anything
is measured. pydantic and xxhash are imported where a certificate is read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llama2.config import MODEL_ARGS_FILE
from llama2.weights.kinds import CALIBRATION_FILE, FORMATS_FILE, METADATA_FILE
from llama2.weights.manifest import MANIFEST_FILE, Manifest
from llama2.weights.origin import ORIGIN_FILE

CERTIFICATE_FILE = "certificate.json"

_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How far the logits of one model are from a reference's, over the same `tokens` of a text.

    Attributes:
        tokens: how many were predicted by both.
        ln_perplexity: mean negative log-probability (natural) of these tokens.
        ln_perplexity_ratio: of the model's perplexity over the reference's: the mean of the tokens' differences.
        ln_perplexity_ratio_error: its standard error: the standard deviation of the windows' means, over the root of
            their number. Neighbouring tokens are correlated; windows stand for them.
        kl_mean: Kullback-Leibler divergence KL(reference || model) of a token's distribution, in nats.
        top1_agreement: the fraction of tokens where both find the same token likeliest.
        logit_difference_mean: of |logit - reference's logit| over all tokens and the whole vocabulary.
        greedy_agreement_mean: how many tokens of a greedy reply are the same before the first that differs, over
            `greedy_prompts` prompts; at most `greedy_tokens`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    tokens: int
    ln_perplexity: float
    reference_ln_perplexity: float
    ln_perplexity_ratio: float
    ln_perplexity_ratio_error: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    logit_difference_mean: float
    logit_difference_max: float
    greedy_prompts: int
    greedy_tokens: int
    greedy_agreement_mean: float
    greedy_agreement_median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One configuration that ran.

    Attributes:
        device: cpu or cuda; `processor` is its name.
        kernel: A8, A16 or A32: bits of the activations that weights are multiplied by.
        implementation: the class in llama2/kernels that computed it.
        dtype: of activations. `kv_cache_dtype` is that of the KV cache, or auto, which is the same.
        commit, sources: the code's, of which the second is a hash over llama2/.
        figures: the weights against the reference.
        noise_floor: the reference in `dtype` against itself in fp32; none where it was not measured.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    device: str
    processor: str
    kernel: str
    implementation: str
    dtype: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    torch: str
    commit: str
    sources: str
    figures: Figures
    noise_floor: Figures | None

    @property
    def configuration(self) -> tuple[str | int, ...]:
        """Of two measurements with the same one the later counts."""
        return (
            self.device,
            self.processor,
            self.kernel,
            self.implementation,
            self.dtype,
            self.kv_cache_dtype,
            self.tensor_parallel_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the weights were compared with. `origin` is that of its folder (see `origin`), `note` says it in words."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    weights: str
    stored: dict[str, int]
    origin: tuple[dict[str, int] | dict[str, str], ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What both were given, in windows of `context` tokens that begin `stride` tokens apart.

    Of each window the last `stride` tokens count, so that each has at least `context - stride` tokens before it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    sha256: str
    context: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """`weights` and `tokenizer` are hashes of the folder's files, `stored` the number of values in each precision."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    weights: str
    tokenizer: str
    stored: dict[str, int]
    reference: Reference
    text: Text
    measurements: tuple[Measurement, ...]

    def joined(self, earlier: Certificate) -> Certificate | None:
        """This one with the measurements of an earlier one in other configurations.

        None if the earlier one is about something else: other weights, another reference or text.
        """
        if replace(earlier, measurements=self.measurements) != self:
            return None
        own = {one.configuration for one in self.measurements}
        others = (one for one in earlier.measurements if one.configuration not in own)
        return replace(self, measurements=(*others, *self.measurements))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The hashes of what a certificate is about."""

    weights: str
    tokenizer: str

    @classmethod
    def of(cls, folder: Path) -> Identity:
        """Of a converted folder.

        Raises:
            ValueError: it has no hashes, or they are damaged.
        """
        manifest = _manifest(folder)
        others = (CERTIFICATE_FILE, ORIGIN_FILE, CALIBRATION_FILE)
        return cls(
            weights=manifest.digest(_describes_weights),
            tokenizer=manifest.digest(lambda name: not _describes_weights(name) and name not in others),
        )


def read_certificate(folder: Path, *, weights: Path | None = None) -> Certificate | None:
    """The certificate in `folder`, None if there is none. `weights`: the converted folder that it must be about, if it
    is not that folder's own.

    Raises:
        ValueError: it is damaged, or about other weights.
    """
    path = folder / CERTIFICATE_FILE
    if not path.exists():
        return None
    if weights is None:
        _manifest(folder).check_file(CERTIFICATE_FILE)
    certificate = _parse(path)
    own = Identity.of(weights or folder)
    for what in ("weights", "tokenizer"):
        if getattr(certificate, what) != getattr(own, what):
            raise ValueError(
                f"{path} is not about the {what} in {weights or folder}: remove it, or measure again with "
                "python -m benchmarks.certify"
            )
    return certificate


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write it into the folder that it is about, and its hash into the folder's manifest."""
    text = json.dumps(certificate.to_json(), indent=1, allow_nan=False) + "\n"
    _manifest(folder).put(CERTIFICATE_FILE, text.encode())


def _manifest(folder: Path) -> Manifest:
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no {MANIFEST_FILE}, so no certificate can be about it: convert it again")
    return manifest


def _describes_weights(name: str) -> bool:
    return name.endswith(".distcp") or name in (METADATA_FILE, MODEL_ARGS_FILE, FORMATS_FILE)


def _parse(path: Path) -> Certificate:
    import pydantic

    try:
        certificate: Certificate = pydantic.TypeAdapter(Certificate).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no certificate of this version: {field}: {first['msg']}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return certificate
