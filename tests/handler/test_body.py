import json
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
