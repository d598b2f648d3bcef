"""Owns `load_lora_adapter` and `unload_lora_adapter`, which are vLLM's: their fields, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from handler.call import Format, Progress
from handler.errors import RequestError
from handler.openai.fields import Body, parse
from handler.openai.generation import Model
from handler.openai.replies import to_json
from llama2.adapters.reference import AdapterRef
from llama2.engine.sequence import Errand, Output


class LoadBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    # vLLM's own number for it, and its base: the name is enough, and there is one base.
    lora_int_id: int | None = None
    base_model_name: str | None = None


class UnloadBody(Body):
    lora_name: str
    lora_int_id: int | None = None  # vLLM's own number for it: the name is enough


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrandFormat:
    """The reply once the engine has done it."""

    kind: Literal["load", "unload"]
    adapter: AdapterRef
    reply: Callable[[], Any]
    stream: bool = False
    content_type: str = "application/json"
    prepare: None = None

    def requests(self, call_id: str) -> list[Errand]:
        return [Errand(request_id=f"{call_id}/0", kind=self.kind, adapter=self.adapter)]

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        raise AssertionError("it is not streamed")

    def whole(self, progress: Sequence[Progress]) -> str:
        return to_json(self.reply()) + "\n"

    def failure(self, error: RequestError) -> str:
        return error.as_json()


def load(model: Model, raw: Any) -> Format:
    """The adapter has its name when every rank has read it.

    Both raise InvalidValue or RequestError: a field is wrong, or the server does not allow it.
    """
    body = parse(LoadBody, raw)
    model.check_new_name(body.lora_name)
    ref = model.adapters.check(body.lora_name, body.lora_path, again=body.load_inplace)

    def reply() -> dict[str, Any]:
        model.adapters.add(body.lora_name, ref)
        return model.describe(body.lora_name)

    return ErrandFormat(kind="load", adapter=ref, reply=reply)


def unload(model: Model, raw: Any) -> Format:
    """The name is gone at once. The reply comes when no request has the adapter any more, and its memory is free."""
    body = parse(UnloadBody, raw)
    ref = model.adapters.remove(body.lora_name)
    return ErrandFormat(
        kind="unload",
        adapter=ref,
        reply=lambda: {"id": body.lora_name, "object": "model", "deleted": True},
    )
