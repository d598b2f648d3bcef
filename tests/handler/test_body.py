import json
import time
from typing import Any

import pytest

from handler.body import read_body
from handler.errors import RequestError


@pytest.mark.parametrize(
    ("body", "is_json", "expected"),
    [
        ({"prompt": "a"}, True, {"prompt": "a"}),  # parsed by TorchServe
        (bytearray(b'{"prompt": "a"}'), False, {"prompt": "a"}),  # curl -T names no type
        (bytearray(b'\n {"prompt": "a"}\n'), False, {"prompt": "a"}),
        ('\ufeff{"prompt": "a"}'.encode(), False, {"prompt": "a"}),  # a byte order mark
        (bytearray("Grüße".encode()), False, "Grüße"),
        ("as text/plain", False, "as text/plain"),
        (b"one line break goes\n\n", False, "one line break goes\n"),
        (b"of either kind\r\n", False, "of either kind"),
        (b"", False, ""),
    ],
)
def test_json_is_read_as_json_and_anything_else_as_a_prompt(body: Any, is_json: bool, expected: Any) -> None:
    assert read_body(body, is_json=is_json) == expected


@pytest.mark.parametrize(
    ("body", "is_json", "message"),
    [
        (None, False, "has no body"),
        (b"abc\xffdef", False, "not UTF-8: byte 3 is 0xff"),
        (b'{"prompt": "a",\n "x" 1}', False, "not valid JSON: Expecting ':' delimiter at line 2, column 6"),
        (b'["a", ', False, "not valid JSON"),
        (b"prompt: a", True, "not valid JSON"),  # named application/json, so not a plain text
        (b"[1, 2]", False, "must be a JSON object, got list"),
        (5, True, "must be a JSON object, got int"),
        (b"[" * 200_000, False, "nesting too deep"),
        (b'{"seed": ' + b"1" * 5000 + b"}", False, "a number is too long"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400_that_says_why(body: Any, is_json: bool, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_body(body, is_json=is_json)
    assert message in str(caught.value)
    assert caught.value.status == 400


def test_a_refusal_is_json_with_message_type_param_and_code() -> None:
    assert json.loads(RequestError("no", param="top_p").as_json()) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "top_p", "code": 400}
    }
    assert json.loads(RequestError("oops", status=500).as_json())["error"]["type"] == "server_error"


@pytest.mark.parametrize("many", ["1,", "[],", "{},", "[[],"])
def test_a_body_of_more_values_than_a_prompt_can_have_is_refused_before_it_is_parsed(many: str) -> None:
    """Two million of them took a parser half a second, in which no other thread ran."""
    started = time.thread_time()
    with pytest.raises(RequestError, match="commas and brackets at most") as caught:
        read_body(('{"prompt": [' + many * 2_000_000 + "1]}").encode(), is_json=True)
    assert caught.value.status == 413
    assert time.thread_time() - started < 0.25


def test_a_long_prompt_of_token_ids_is_read() -> None:
    ids = list(range(128 * 1024))
    assert read_body(json.dumps({"prompt": ids}).encode(), is_json=True) == {"prompt": ids}
