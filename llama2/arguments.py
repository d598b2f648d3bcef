"""Owns what the arguments of a call mean, of `LLM` and of `AsyncLLM`: prompts, dialogs and parameters, to requests.

Knows no engine: of one it has the limits.
"""

from __future__ import annotations

import json
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from llama2.adapters.reference import AdapterRef
from llama2.engine.limits import Limits
from llama2.engine.sampling_params import SamplingParams, with_completion_tokens
from llama2.engine.sequence import Grammar, Request
from llama2.errors import InvalidValue, shown
from llama2.names import first_names
from llama2.text.chat import encode_dialog
from llama2.text.grammar import GrammarCompiler
from llama2.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Dialog = Sequence[Message]
Prompt = str | Sequence[int]
Parameters = SamplingParams | Sequence[SamplingParams] | None
Adapters = Path | str | Sequence[Path | str | None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What a call says of each of its prompts, and of all."""

    params: list[SamplingParams]
    adapters: list[AdapterRef | None]
    grammar: Grammar | None = None


class ArgumentReader:
    """Makes requests for one model. All of its methods may be called in any thread."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        """`limits` are the engine's that will run the requests."""
        self._tokenizer = tokenizer
        self._limits = limits
        grammars = GrammarCompiler(tokenizer, limits.vocab_size)
        # By constraint: what makes its grammar, of what type, and that type in words.
        self._makers: dict[str, tuple[Callable[[Any], Grammar], Any, str]] = {
            "grammar": (grammars.lark, str, "a grammar in llguidance's Lark syntax"),
            "json_schema": (grammars.json_schema, (dict, bool), "a schema (a dict or JSON text) or a pydantic model"),
            "regex": (grammars.regex, str, "a regular expression"),
            "choice": (grammars.choice, list, "a list of texts"),
        }
        self._calls = count()

    def completions(self, prompts: str | Sequence[Prompt], *parameters: Any, **options: Any) -> list[Request]:
        """A request for each prompt, or for the one text; `parameters` and `options` as `_read`.

        Raises:
            InvalidValue: an argument is wrong.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        items = _items("prompts", prompts, "a text, or a list of texts and lists of token ids")
        encoded = [self._prompt_ids(f"prompts[{index}]", prompt) for index, prompt in enumerate(items)]
        requests = self._requests(encoded, self._read(len(encoded), *parameters, **options), continues_prompt=True)
        return self._checked("prompts[{}]", requests)

    def chats(self, dialogs: Dialog | Sequence[Dialog], *parameters: Any, **options: Any) -> list[Request]:
        """A request for each dialog, or for the one; otherwise as `completions`."""
        items = _items("dialogs", dialogs, "a dialog, which is a list of messages, or a list of dialogs")
        if not items:  # a dialog without messages, or no dialog: neither has a reply
            raise InvalidValue(
                "dialogs", 'must be a dialog, such as [{"role": "user", "content": "Hello"}], or a list of them, got []'
            )
        if any(isinstance(item, Mapping) for item in items):
            items = [items]
        encoded = [self._dialog_ids(f"dialogs[{index}]", dialog) for index, dialog in enumerate(items)]
        requests = self._requests(encoded, self._read(len(encoded), *parameters, **options), continues_prompt=False)
        return self._checked("dialogs[{}]", requests)

    def one(self, prompt: Any, *parameters: Any, **options: Any) -> Request:
        """The request for one prompt or, where it holds messages, for a dialog; otherwise as `completions`."""
        kind = "a text, a list of token ids or a list of messages"
        items = [] if isinstance(prompt, str) else _items("prompt", prompt, kind)
        if any(isinstance(item, Sequence) for item in items):
            raise InvalidValue(
                "prompt",
                f"must be one prompt or dialog, got {shown(prompt)}: generate and chat take several at a time, and so "
                "do the streams of an AsyncLLM",
            )
        read = self.chats if any(isinstance(item, Mapping) for item in items) else self.completions
        (request,) = read([prompt], *parameters, **options)
        return request

    def score(self, token_ids: Sequence[int], adapter: Path | str | None = None) -> Request:
        """The request for the logits of a prompt."""
        if isinstance(token_ids, str):
            raise InvalidValue(
                "token_ids", "must be a list of token ids, which tokenizer.encode_prompt makes of a text"
            )
        (request,) = self._requests(
            [_token_ids("token_ids", token_ids, "one flat list of token ids")],
            _Given(params=[SamplingParams()], adapters=_adapters(adapter, 1)),
            continues_prompt=True,
        )
        (request,) = self._checked("token_ids", [replace(request, score=True, generate=False)])
        return request

    def _checked(self, place: str, requests: list[Request]) -> list[Request]:
        """`requests`, or an InvalidValue that names the prompt that the engine cannot run by its `place`."""
        for index, request in enumerate(requests):
            try:
                self._limits.check(request)
            except InvalidValue as error:
                field = place.format(index) if error.field == "prompt_ids" else error.field
                raise InvalidValue(field, error.problem) from None
        return requests

    def _requests(
        self,
        prompts: list[list[int]],
        given: _Given,
        *,
        continues_prompt: bool,
    ) -> list[Request]:
        call = next(self._calls)
        every = [with_completion_tokens(params) for params in given.params] if continues_prompt else given.params
        return [
            Request(
                request_id=f"{call}-{index}",
                prompt_ids=tuple(ids),
                params=params,
                continues_prompt=continues_prompt,
                grammar=given.grammar,
                adapter=adapter,
            )
            for index, (ids, params, adapter) in enumerate(zip(prompts, every, given.adapters, strict=True))
        ]

    def _prompt_ids(self, place: str, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode_prompt(prompt)
        if isinstance(prompt, numbers.Integral):
            raise InvalidValue(
                place, f"must be a text or a list of token ids, got {shown(prompt)}: one prompt of ids is [[1, 2, 3]]"
            )
        return _token_ids(place, prompt, "a text or a list of token ids")

    def _dialog_ids(self, place: str, dialog: Any) -> list[int]:
        messages = _items(place, dialog, "a list of messages")
        try:
            return encode_dialog(self._tokenizer, messages)
        except InvalidValue as error:
            raise InvalidValue(place + error.field.removeprefix("messages"), error.problem) from None
        except ValueError as error:
            raise InvalidValue(place, f"cannot be encoded: {error}") from None

    def _read(
        self,
        count: int,
        params: Parameters = None,
        sampling_params: Parameters = None,
        *,
        adapter: Adapters = None,
        **options: Any,
    ) -> _Given:
        """The parameters and adapters of `count` prompts: one for all, or one each. `options` are fields of
        `SamplingParams`, which win over the parameters, and a constraint for all: at most one of grammar, json_schema,
        regex and choice."""
        if params is not None and sampling_params is not None:
            raise InvalidValue("sampling_params", "is a second name of params: give one of them")
        given = sampling_params if params is None else params
        if given is None or isinstance(given, SamplingParams):
            every = [given or SamplingParams()] * count
        elif isinstance(given, (list, tuple)) and all(isinstance(one, SamplingParams) for one in given):
            every = list(given)
        else:
            raise InvalidValue(
                "params",
                f"must be SamplingParams, such as SamplingParams(temperature=0), or a list, got {shown(given)}",
            )
        if len(every) != count:
            raise InvalidValue("params", f"must be one or as many as there are prompts ({count}), got {len(every)}")
        fields = first_names(options, SamplingParams, *self._makers, "adapter")
        asked = {name: value for name in self._makers if (value := fields.pop(name, None)) is not None}
        if fields:
            every = [replace(one, **fields) for one in every]
        grammar = self._grammar(asked, ignore_eos=any(one.ignore_eos for one in every))
        return _Given(params=every, adapters=_adapters(adapter, count), grammar=grammar)

    def _grammar(self, asked: Mapping[str, Any], *, ignore_eos: bool) -> Grammar | None:
        if not asked:
            return None
        (name, value), *others = asked.items()
        if others or ignore_eos:
            raise InvalidValue(others[0][0] if others else "ignore_eos", f"cannot be combined with {name}")
        make, kind, allowed = self._makers[name]
        value = _schema(value) if name == "json_schema" else value
        if not isinstance(value, kind):
            raise InvalidValue(name, f"must be {allowed}, got {shown(value)}")
        try:
            return make(value)
        except ValueError as error:
            raise InvalidValue(name, f"cannot be followed: {error}") from None


def _adapters(given: Adapters, count: int) -> list[AdapterRef | None]:
    """One for all prompts, or one each."""
    if given is None or isinstance(given, (str, Path)):
        return [None if given is None else AdapterRef.of(given)] * count
    folders = _items("adapter", given, "the folder of an adapter, or a list with one or None for each prompt")
    if len(folders) != count:
        raise InvalidValue("adapter", f"must be one or as many as there are prompts ({count}), got {len(folders)}")
    known = {folder: AdapterRef.of(folder) for folder in folders if folder is not None}
    return [known.get(folder) for folder in folders]


def _items(place: str, value: Any, allowed: str) -> list[Any]:
    """The items of something like a list, such as an array or a tensor."""
    try:
        if isinstance(value, (str, bytes, Mapping)):
            raise TypeError
        return list(value)
    except TypeError:
        raise InvalidValue(place, f"must be {allowed}, got {shown(value)}") from None


def _token_ids(place: str, value: Any, allowed: str) -> list[int]:
    ids = _items(place, value, allowed)
    try:
        return [operator.index(token_id) for token_id in ids]
    except TypeError:
        raise InvalidValue(place, f"must be {allowed}, got {shown(value)}") from None


def _schema(value: Any) -> Any:
    """A schema from JSON text, or from a pydantic model."""
    if hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise InvalidValue("json_schema", f"is no JSON: {error}") from None
    return value
