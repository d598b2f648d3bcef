import json
from typing import Any

import pytest

from handler.body import read_body
from handler.errors import RequestError


@pytest.mark.parametrize(
    ("item", "is_json", "expected"),
    [
        ({"body": {"prompt": "a"}}, True, {"prompt": "a"}),  # parsed by TorchServe
        ({"data": {"prompt": "a"}}, True, {"prompt": "a"}),  # a form field of that name
        ({"body": bytearray(b'{"prompt": "a"}')}, False, {"prompt": "a"}),  # curl -T names no type
        ({"body": bytearray(b'\n {"prompt": "a"}\n')}, False, {"prompt": "a"}),
        ({"body": '\ufeff{"prompt": "a"}'.encode()}, False, {"prompt": "a"}),  # a byte order mark
        ({"body": bytearray("Grüße".encode())}, False, "Grüße"),
        ({"body": "as text/plain"}, False, "as text/plain"),
        ({"body": b"one line break goes\n\n"}, False, "one line break goes\n"),
        ({"body": b"of either kind\r\n"}, False, "of either kind"),
        ({"body": b""}, False, ""),
    ],
)
def test_json_is_read_as_json_and_anything_else_as_a_prompt(item: dict[str, Any], is_json: bool, expected: Any) -> None:
    assert read_body(item, is_json=is_json) == expected


@pytest.mark.parametrize(
    ("item", "is_json", "message"),
    [
        ({}, False, "has no body"),
        ({"body": b"abc\xffdef"}, False, "not UTF-8: byte 3 is 0xff"),
        ({"body": b'{"prompt": "a",\n "x" 1}'}, False, "not valid JSON: Expecting ':' delimiter at line 2, column 6"),
        ({"body": b'["a", '}, False, "not valid JSON"),
        ({"body": b"prompt: a"}, True, "not valid JSON"),  # named application/json, so not a plain text
        ({"body": b"[1, 2]"}, False, "must be a JSON object, got list"),
        ({"body": 5}, True, "must be a JSON object, got int"),
        ({"body": b"[" * 200_000}, False, "nesting too deep"),
        ({"body": b'{"seed": ' + b"1" * 5000 + b"}"}, False, "a number is too long"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400_that_says_why(item: dict[str, Any], is_json: bool, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_body(item, is_json=is_json)
    assert message in str(caught.value)
    assert caught.value.status == 400


def test_a_refusal_is_json_with_message_type_param_and_code() -> None:
    assert json.loads(RequestError("no", param="top_p").as_json()) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "top_p", "code": 400}
    }
    assert json.loads(RequestError("oops", status=500).as_json())["error"]["type"] == "server_error"
