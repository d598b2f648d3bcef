import json
import re
from pathlib import Path
from typing import Any

import pytest

from handler.call import Call, Format
from handler.errors import RequestError
from handler.native import _OPENAI_FIELDS, MAX_PROMPTS, NativeApi
from llama2.engine.sequence import Output, TokenLogprobs
from llama2.errors import InvalidValue
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from tests.handler.openai.support import make_server
from tests.handler.support import byte_tokenizer, config
from tests.support.tokenizers import tiny_sentencepiece


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.fixture
def api(tokenizer: Tokenizer, tmp_path: Path) -> NativeApi:
    return NativeApi(tokenizer, config(tmp_path, max_seq_len=40, max_new_tokens=7))


def shown(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    """The text of prompt ids, special tokens spelled out."""
    spelling = {token_id: piece for piece, token_id in tokenizer.special_tokens.items()}
    return "".join(spelling.get(token_id) or tokenizer.token_bytes(token_id).decode() for token_id in ids)


def prompts(tokenizer: Tokenizer, api: NativeApi, body: Any) -> list[str]:
    return [shown(tokenizer, request.prompt_ids) for request in api.read(body).requests("id")]


def answer(form: Format, *texts: str, finish_reason: Any = "stop") -> str:
    """Feed each request of a call one token of text at a time; all that it sends."""
    sent, call = "", Call("id")
    for request in call.begin(form):
        for text in texts:
            last = text is texts[-1]
            call.take(
                Output(
                    request_id=request.request_id,
                    text=text,
                    token_ids=(1,),
                    finish_reason=finish_reason if last else None,
                )
            )
            sent += call.piece().text
    return sent


def test_a_prompt_is_encoded_as_it_stands_and_its_reply_continues_it(tokenizer: Tokenizer, api: NativeApi) -> None:
    (request,) = api.read({"prompt": "Hi <s>"}).requests("id")
    assert list(request.prompt_ids) == tokenizer.encode("Hi <s>")
    assert request.continues_prompt


def test_a_plain_text_is_a_prompt_or_one_user_message_as_mode_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = NativeApi(tokenizer, config(tmp_path, mode="chat"))
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts(tokenizer, NativeApi(tokenizer, config(tmp_path)), "Hi") == ["Hi"]
    assert prompts(tokenizer, chat, "Hi") == [said]
    assert prompts(tokenizer, chat, {"prompt": ["Hi"]}) == [said]
    assert prompts(tokenizer, chat, {"prompt": "Hi", "mode": "text_completion"}) == ["Hi"]


def test_a_dialog_is_a_chat_in_either_mode_and_its_reply_a_text_of_its_own(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    api = NativeApi(tokenizer, config(tmp_path, mode="text_completion"))
    (request,) = api.read({"dialog": [{"role": "user", "content": "Hi"}]}).requests("id")
    assert shown(tokenizer, request.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert not request.continues_prompt


def test_sampling_fields_win_over_the_files_defaults(api: NativeApi) -> None:
    fields = {"temperature": 0, "stop": "x", "stop_token_ids": [3], "seed": 5, "logprobs": 2, "ignore_eos": True}
    (request,) = api.read({"prompt": "a", **fields}).requests("id")
    params = request.params
    assert (params.max_new_tokens, params.top_p) == (7, 0.9)
    assert (
        params.temperature,
        params.stop,
        params.stop_token_ids,
        params.seed,
        params.logprobs,
        params.ignore_eos,
    ) == (*(0, ("x",), (3,), 5, 2, True),)
    assert api.read({"prompt": "a", "stop": ["x", "y"]}).params.stop == ("x", "y")


def test_one_prompt_gives_one_object_and_a_list_gives_a_list(api: NativeApi) -> None:
    one = json.loads(answer(api.read({"prompt": "abc"}), "x", "", "y"))
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    assert one == {"generation": "xy", "finish_reason": "stop", "usage": usage}
    assert json.loads(answer(api.read({"prompt": ["abc"]}), "x", "", "y")) == [one]
    both = json.loads(answer(api.read({"prompt": ["abc", "de"]}), "é", finish_reason="length"))
    assert [(reply["generation"], reply["finish_reason"], reply["usage"]["prompt_tokens"]) for reply in both] == [
        *(("é", "length", 3), ("é", "length", 2)),
    ]


def test_a_chat_is_answered_with_a_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    api = NativeApi(tokenizer, config(tmp_path))
    dialog = [{"role": "user", "content": "Hi"}]
    reply = json.loads(answer(api.read({"dialog": dialog}), "Yo"))
    assert reply["generation"] == {"role": "assistant", "content": "Yo"}
    assert len(json.loads(answer(api.read({"dialog": [dialog, dialog]}), "Yo"))) == 2


def test_a_stream_is_one_object_per_line_whose_texts_add_up_and_whose_last_has_the_usage(api: NativeApi) -> None:
    form = api.read({"prompt": "abc", "stream": True})
    assert form.content_type == "application/x-ndjson"
    lines = [json.loads(line) for line in answer(form, "x\n", "", "y").splitlines()]
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    assert lines == [{"text": "x\n"}, {"text": "y", "finish_reason": "stop", "usage": usage}]


def test_a_streamed_list_says_on_each_line_whose_it_is(api: NativeApi) -> None:
    form = api.read({"prompt": ["a", "b"], "stream": True})
    lines = [json.loads(line) for line in answer(form, "x", "y").splitlines()]
    assert [(line["index"], line["text"], line.get("finish_reason")) for line in lines] == [
        *((0, "x", None), (0, "y", "stop"), (1, "x", None), (1, "y", "stop")),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_one_per_token_with_their_text(api: NativeApi, tokenizer: Tokenizer, stream: bool) -> None:
    call = Call("id")
    call.begin(api.read({"prompt": "a", "logprobs": 1, "stream": stream}))
    (x,) = tokenizer.encode("x")
    entry = TokenLogprobs(token_id=x, logprob=-0.5, top=((x, -0.5),))
    call.take(Output(request_id="id/0", text="x", token_ids=(x,), logprobs=(entry,), finish_reason="length"))
    token = {"token": "x", "token_id": x, "logprob": -0.5}
    assert json.loads(call.piece().text)["logprobs"] == [{**token, "top": [token]}]


def test_a_prompt_of_the_longest_length_is_taken_and_one_token_more_is_refused(api: NativeApi) -> None:
    assert api.read({"prompt": "a" * 39}).prompts[0].truncated == 0
    with pytest.raises(RequestError, match=r"prompt\[1\] has at least 40 tokens, but at most 39 are taken"):
        api.read({"prompt": ["a", "a" * 40]})


def test_truncation_left_keeps_the_end_and_room_for_the_reply_and_says_how_much_went(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    api = NativeApi(tokenizer, config(tmp_path, max_seq_len=40, max_new_tokens=10, truncation="left"))
    form = api.read({"prompt": "a" * 30 + "b" * 30})
    assert shown(tokenizer, form.requests("id")[0].prompt_ids) == "b" * 30
    usage = json.loads(answer(form, "x"))["usage"]
    assert usage == {"prompt_tokens": 30, "completion_tokens": 1, "truncated_tokens": 30}
    assert prompts(tokenizer, api, {"prompt": "a" * 39}) == ["a" * 39]
    assert prompts(tokenizer, api, {"prompt": "a" * 40, "max_new_tokens": 1000}) == ["a" * 20]
    dialog = {"mode": "chat", "max_new_tokens": None}
    assert len(api.read({"prompt": "a" * 80, **dialog}).prompts[0].ids) == 39


def test_truncation_left_keeps_the_bos_that_the_model_was_trained_to_see(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, add_bos=True)
    api = NativeApi(tokenizer, config(tmp_path, max_seq_len=40, max_input_token_length=5, truncation="left"))
    (prompt,) = api.read({"prompt": "abcdefgh"}).prompts
    assert shown(tokenizer, prompt.ids) == "<s>efgh"
    assert prompt.truncated == 4


SAID = {"role": "user", "content": "Hi"}
TAG = "<|im_end|>"


@pytest.mark.parametrize("body", [{"dialog": [{"role": "user", "content": TAG}]}, {"prompt": TAG, "mode": "chat"}])
def test_a_message_may_spell_a_control_token_unless_special_tags_says_reject(
    tmp_path: Path, tokenizer: Tokenizer, body: Any
) -> None:
    (request,) = NativeApi(tokenizer, config(tmp_path)).read(body).requests("id")
    assert shown(tokenizer, request.prompt_ids).count(TAG) == 2
    assert request.prompt_ids.count(tokenizer.special_tokens[TAG]) == 1
    with pytest.raises(InvalidValue, match=r"must not contain the special tag '<\|im_end\|>'"):
        NativeApi(tokenizer, config(tmp_path, special_tags="reject")).read(body)


def test_turns_are_merged_unless_dialog_turns_says_strict(tmp_path: Path) -> None:
    llama2 = load_tokenizer(tiny_sentencepiece(tmp_path))
    (request,) = NativeApi(llama2, config(tmp_path)).read({"dialog": [SAID, SAID]}).requests("id")
    assert llama2.decode(request.prompt_ids) == "[INST] Hi\n\nHi [/INST]"
    with pytest.raises(InvalidValue, match=r"dialog\[1\].role must be 'assistant', got 'user'; join"):
        NativeApi(llama2, config(tmp_path, dialog_turns="strict")).read({"dialog": [SAID, SAID]})


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt or dialog must be in the body, and not both"),
        ({"prompt": "a", "dialog": [SAID]}, "prompt", "prompt or dialog must be in the body, and not both"),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens", "is an unknown field: did you mean 'max_new_tokens'?"),
        ({"prompt": 5}, "prompt", "prompt must be a string or a list of these, got 5"),
        ({"prompt": None}, "prompt", "got None"),
        ({"prompt": []}, "prompt", f"prompt must hold from 1 to {MAX_PROMPTS} at once, got 0"),
        ({"prompt": ""}, "prompt", "prompt must not be empty"),
        ({"prompt": ["a", 5]}, "prompt[1]", "prompt[1] must be a string, got 5"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", f"to {MAX_PROMPTS} at once, got {MAX_PROMPTS + 1}"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
        ({"dialog": "Hi"}, "dialog", "dialog must be a list of messages or a list of these, got 'Hi'"),
        ({"dialog": []}, "dialog", f"dialog must hold from 1 to {MAX_PROMPTS} at once, got 0"),
        ({"dialog": [[]]}, "dialog[0]", "dialog[0] must hold at least one message"),
        ({"dialog": ["Hi"]}, "dialog[0]", "dialog[0] must be a list of messages, got 'Hi'"),
        ({"dialog": [SAID, "Hi"]}, "dialog[1]", "dialog[1] must have a role and a content"),
        ({"dialog": [{"role": "user"}]}, "dialog[0]", "dialog[0] must have a role and a content"),
        ({"dialog": [[SAID], [{"role": "user", "content": 5}]]}, "dialog[1][0].content", "must be a string, got 5"),
        (
            {"dialog": [{"role": "usr", "content": "Hi"}]},
            "dialog[0].role",
            "dialog[0].role must be one of 'system', 'user', 'assistant', got 'usr'",
        ),
        ({"dialog": [SAID], "mode": "text_completion"}, "mode", "mode must be 'chat' for a dialog"),
        ({"prompt": "a", "mode": "talk"}, "mode", "mode must be 'text_completion' or 'chat', got 'talk'"),
        ({"prompt": "a", "mode": ["chat"]}, "mode", "mode must be"),
        ({"prompt": "a", "stream": "yes"}, "stream", "stream must be true or false, got 'yes'"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "from 1 to 2147483647, got 0"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens", "got True"),
        ({"prompt": "a", "temperature": -1}, "temperature", "got -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", "got nan"),
        ({"prompt": "a", "frequency_penalty": 10**400}, "frequency_penalty", "a number in [-2, 2], got 1000"),
        ({"prompt": "a", "top_p": "x"}, "top_p", "top_p must be a number"),
        ({"prompt": "a", "stop": 5}, "stop", "stop must be at most 64 strings of 1 to 1000 characters, got 5"),
        ({"prompt": "a", "stop": [""]}, "stop", "stop must be"),
        ({"prompt": "a", "stop": ["x"] * 65}, "stop", "stop must be at most 64 strings of 1 to 1000 characters"),
        ({"prompt": "a", "stop": "x" * 1001}, "stop", "stop must be at most 64 strings of 1 to 1000 characters"),
        ({"prompt": "a", "stop_token_ids": 5}, "stop_token_ids", "must be a list of token ids, got 5"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
    ],
)
def test_a_mistake_is_named_by_its_field(api: NativeApi, body: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        api.read(body)
    assert message in str(caught.value)
    assert caught.value.field == param


@pytest.mark.parametrize("shape", [{"prompt": "a"}, {"dialog": [SAID]}, {}], ids=["prompt", "dialog", "neither"])
@pytest.mark.parametrize("name", _OPENAI_FIELDS)
def test_a_field_of_the_openai_api_is_told_where_and_how_it_is_taken(
    api: NativeApi, tmp_path: Path, shape: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        api.read({**shape, name: [5]})
    assert caught.value.field == name
    found = re.search(r" at /predictions/llama/1\.0/(v1/\S+), as ([^;]*)", str(caught.value))
    assert found
    rest: dict[str, Any] = {"prompt": "a"} if found[1] == "v1/completions" else {"messages": [SAID]}
    rest = {} if found[1] == "v1/responses" else rest
    assert make_server(tmp_path, max_seq_len=500).request(found[1], **{**rest, **json.loads(f"{{{found[2]}}}")})


def test_both_apis_have_the_same_words_for_the_same_mistake(api: NativeApi, tmp_path: Path) -> None:
    openai = make_server(tmp_path)
    mistakes: list[dict[str, Any]] = [
        *({"stop": 5}, {"stop": ["x", 5]}, {"stop_token_ids": 5}, {"stop_token_ids": [-1]}, {"seed": 2**63}),
        *({"min_p": 2}, {"min_p": "x"}, {"presence_penalty": 3}, {"frequency_penalty": []}, {"top_k": -2}),
        *({"repetition_penalty": 0}, {"min_tokens": -1}, {"ignore_eos": 1}, {"logprobs": 21}, {"prompt": "\ud800"}),
    ]
    for mistake in mistakes:
        body = {"prompt": "a", **mistake}
        with pytest.raises(InvalidValue) as caught:
            api.read(body)
        assert openai.refused("v1/completions", **body) == (400, caught.value.field, str(caught.value))
    with pytest.raises(InvalidValue, match="min_token is an unknown field: did you mean 'min_tokens'"):
        api.read({"prompt": "a", "min_token": 5})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 5_000_000},
        {"prompt": ["a", "word " * 1_000_000]},
        {"prompt": "a" * 5_000_000, "mode": "chat"},
        {"dialog": [{"role": "user", "content": "a" * 5_000_000}]},
    ],
    ids=["text", "list", "message", "dialog"],
)
def test_a_text_that_is_too_long_is_not_tokenized(
    api: NativeApi, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, body: Any
) -> None:
    encoded: list[str] = []
    encode = type(tokenizer).encode

    def count(self: Tokenizer, text: str, **others: Any) -> list[int]:
        encoded.append(text)
        return encode(self, text, **others)

    monkeypatch.setattr(type(tokenizer), "encode", count)
    with pytest.raises(RequestError, match=r"has at least \d+ tokens, but at most 39 are taken") as caught:
        api.read(body)
    assert caught.value.code == "context_length_exceeded"
    assert sum(map(len, encoded)) < 100


def test_a_long_text_that_will_be_cut_is_taken(tmp_path: Path, tokenizer: Tokenizer) -> None:
    api = NativeApi(tokenizer, config(tmp_path, max_seq_len=40, truncation="left"))
    assert api.read({"prompt": "a" * 10_000}).prompts[0].truncated > 9_900
