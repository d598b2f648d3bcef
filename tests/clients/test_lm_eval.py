"""lm-eval scores and generates through the API what it gets from transformers on the same weights."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from tests.clients.conftest import Service

pytestmark = pytest.mark.clients

TASKS = Path(__file__).with_name("lm_eval")


@pytest.fixture(scope="module", autouse=True)
def _key(service: Service) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", service.key)
        yield


def evaluate(backend: str, task: str, arguments: dict[str, Any], *, chat: bool = False) -> list[Any]:
    """What the model says to each request of the task, in order."""
    done = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
    return [reply for sample in samples for reply in sample["filtered_resps"]]


@pytest.fixture(scope="module")
def expected(service: Service) -> Any:
    """The same from transformers' model, in fp32."""
    arguments = {"pretrained": service.reference, "dtype": "float32", "device": "cpu", "batch_size": 1}

    @functools.cache
    def evaluate_once(task: str, *, chat: bool = False) -> list[Any]:
        return evaluate("hf", task, dict(arguments), chat=chat)

    return evaluate_once


@pytest.fixture(scope="module")
def completions(service: Service, model: str) -> dict[str, Any]:
    return {
        "base_url": f"{service.base_url}/completions",
        "model": model,
        "tokenizer": service.checkpoint,
        "tokenizer_backend": "huggingface",
        "max_length": 1024,
        "max_retries": 1,
    }


@pytest.mark.parametrize(
    "sent",
    [{"batch_size": 4}, {"num_concurrent": 4}, {"tokenized_requests": False}],
    ids=["lists of token ids", "four at once", "text"],
)
def test_loglikelihoods_equal_transformers(completions: dict[str, Any], expected: Any, sent: dict[str, Any]) -> None:
    """Four answers to each of twelve questions: within 1e-3 relative, and greedy where transformers is."""
    ours = evaluate("local-completions", "served_facts", completions | sent)
    theirs = expected("served_facts")
    assert len(ours) == 48
    assert_same_likelihoods(ours, theirs)


def test_loglikelihoods_in_a_chat_equal_transformers(completions: dict[str, Any], expected: Any) -> None:
    """Of what an assistant may say. Where it would say just that, the token that lm-eval lets it add ends the turn:
    if that token were missing, the answer's last one would be taken for it."""
    ours = evaluate("local-completions", "served_answers", completions | {"batch_size": 3}, chat=True)
    assert len(ours) == 12
    assert_same_likelihoods(ours, expected("served_answers", chat=True))


def assert_same_likelihoods(ours: list[Any], theirs: list[Any]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert any(greedy for _, greedy in theirs)
    assert len(ours) == len(theirs)
    for (logprob, _), (reference, _) in zip(ours, theirs, strict=True):
        assert math.isclose(logprob, reference, rel_tol=1e-3)


def test_rolling_loglikelihoods_equal_transformers(completions: dict[str, Any], expected: Any) -> None:
    """Whole passages, with emoji, ideographs and runs of spaces."""
    ours = evaluate("local-completions", "served_passages", completions)
    theirs = expected("served_passages")
    assert len(ours) == len(theirs) == 4
    for logprob, reference in zip(ours, theirs, strict=True):
        assert math.isclose(logprob, reference, rel_tol=1e-3)


@pytest.mark.parametrize("backend", ["local-completions", "local-chat-completions"])
def test_generated_answers_equal_transformers(
    service: Service, completions: dict[str, Any], model: str, expected: Any, backend: str
) -> None:
    chat = {"base_url": f"{service.base_url}/chat/completions", "model": model, "num_concurrent": 2, "max_retries": 1}
    arguments = completions if backend == "local-completions" else chat
    ours = evaluate(backend, "served_questions", arguments, chat=True)
    assert ours == expected("served_questions", chat=True)
    assert "Paris" in ours[0]
