"""The adapters of a server: which names there are, what a name chooses, and who may change them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from handler.adapters import Adapters
from handler.call import Call
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.native import NativeApi
from llama2.adapters.reference import AdapterRef
from llama2.engine.sequence import Errand, Output, Request
from llama2.errors import InvalidValue
from tests.handler.openai.support import USER, Server, make_server
from tests.handler.support import byte_tokenizer, config
from tests.support.adapters import write_random_adapter
from tests.support.weights import tiny_args


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("polite", "brief")):
        write_random_adapter(tmp_path / "adapters" / name, tiny_args(), seed)
    return tmp_path / "adapters"


def server_of(folder: Path, tmp_path: Path, *, can_change: bool = True) -> Server:
    return make_server(tmp_path, adapters=Adapters(folder, can_change=can_change))


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (None, None),
        ("llama", None),
        ("smol", None),
        ("brief", "brief"),
        ("llama:brief", "brief"),
        ("smol:polite", "polite"),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_a_name_chooses_the_adapter_and_comes_back(
    folder: Path, tmp_path: Path, path: str, model: str | None, adapter: str | None
) -> None:
    bodies: dict[str, dict[str, Any]] = {"completions": {"prompt": "Hi"}, "chat/completions": {"messages": [USER]}}
    asked = bodies.get(path, {"input": "Hi"})
    server = server_of(folder, tmp_path)
    request = server.request(path, model=model, **asked)
    assert request.adapter == (None if adapter is None else AdapterRef.of(folder / adapter))
    if path == "completions":
        assert server.say(path, "ok", model=model, **asked)["model"] == (model or "smol")


@pytest.mark.parametrize("model", ["gpt-4", "llama:nobody", "nobody:brief", "brief:llama"])
def test_an_unknown_name_is_a_404_that_names_those_there_are(folder: Path, tmp_path: Path, model: str) -> None:
    status, field, message = server_of(folder, tmp_path).refused("completions", model=model, prompt="Hi")
    assert (status, field) == (404, "model")
    assert "this server has 'smol', 'llama', 'brief', 'polite'" in message


def test_models_lists_adapters_with_root_and_parent(folder: Path, tmp_path: Path) -> None:
    server = server_of(folder, tmp_path)
    listed = {model["id"]: (model["root"], model["parent"]) for model in server.get("models")["data"]}
    assert listed == {
        "smol": ("smol", None), "llama": ("smol", None), "brief": ("brief", "smol"), "polite": ("polite", "smol")
    }  # fmt: skip
    assert server.get("models/polite")["parent"] == "smol"


def test_the_native_api_takes_an_adapter_by_name(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    api = NativeApi(tokenizer, config(tmp_path), Adapters(folder))
    (request,) = api.read({"prompt": "Hi", "adapter": "brief"}).requests("id")
    assert request.adapter == AdapterRef.of(folder / "brief")
    with pytest.raises(RequestError, match="this server has 'brief', 'polite'") as caught:
        api.read({"prompt": "Hi", "adapter": "nobody"})
    assert caught.value.status == 404
    with pytest.raises(InvalidValue, match="adapter must be the name"):
        api.read({"prompt": "Hi", "adapter": 3})


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_each_api_says_how_the_other_ones_name_of_an_adapter_is_written_in_it(
    folder: Path, tmp_path: Path, path: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {"completions": {"prompt": "Hi"}, "chat/completions": {"messages": [USER]}}
    shape = bodies.get(path, {"input": "Hi"})
    server = server_of(folder, tmp_path)
    assert server.refused(path, **shape, adapter="brief") == (
        *(400, "adapter"),
        "adapter is not supported: the name of an adapter is given as model",
    )
    assert server.request(path, **shape, adapter=None).adapter is None
    api = NativeApi(byte_tokenizer(tmp_path), config(tmp_path), Adapters(folder))
    with pytest.raises(InvalidValue, match=r"^model belongs to .*/v1/.*here adapter names an adapter, and without it"):
        api.read({"prompt": "Hi", "model": "brief"})


def run(server: Server, path: str, problem: str = "", **body: Any) -> tuple[int, Any]:
    """The status and the reply of what the engine does, where it has this `problem`."""
    call = Call("id")
    (errand,) = call.begin(server.read(path, **body))
    assert isinstance(errand, Errand)
    try:
        call.take(Output(request_id="id/0", finish_reason="error" if problem else "stop", problem=problem))
    except RequestError as error:
        call.fail(error)
    piece = call.piece()
    return piece.status, json.loads(piece.text)


def test_a_name_is_there_when_the_engine_has_loaded_the_adapter_and_gone_when_it_is_unloaded(
    folder: Path, tmp_path: Path
) -> None:
    server = server_of(folder, tmp_path)
    body = {"lora_name": "mine", "lora_path": "brief"}
    status, reply = run(server, "v1/load_lora_adapter", "it is damaged", **body)
    assert (status, "it is damaged" in reply["error"]["message"]) == (400, True)
    assert server.refused("completions", model="mine", prompt="Hi")[0] == 404
    status, reply = run(server, "v1/load_lora_adapter", **body)
    assert (status, reply["id"], reply["root"], reply["parent"]) == (200, "mine", "brief", "smol")
    assert server.request("completions", model="mine", prompt="Hi").adapter == AdapterRef.of(folder / "brief")
    assert "load_inplace" in server.refused("load_lora_adapter", **body)[2]
    assert run(server, "load_lora_adapter", **body, load_inplace=True)[0] == 200
    assert run(server, "v1/unload_lora_adapter", lora_name="mine") == (
        200, {"id": "mine", "object": "model", "deleted": True}
    )  # fmt: skip
    assert server.refused("completions", model="mine", prompt="Hi")[0] == 404
    assert server.refused("unload_lora_adapter", lora_name="mine")[:2] == (404, "lora_name")


def test_one_that_is_listed_is_read_when_a_client_loads_it_by_its_own_name(folder: Path, tmp_path: Path) -> None:
    """And where it cannot be read, the reply says why; a link that the server's owner made is as good as a folder."""
    write_random_adapter(tmp_path / "elsewhere", tiny_args())
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    server = server_of(folder, tmp_path)
    assert server.refused("load_lora_adapter", lora_name="brief", lora_path="polite")[:2] == (400, "lora_name")
    for name in ("brief", "linked"):
        body = {"lora_name": name, "lora_path": name}
        status, reply = run(server, "load_lora_adapter", "it is damaged", **body)
        assert (status, "cannot be had: it is damaged" in reply["error"]["message"]) == (400, True)
        status, reply = run(server, "load_lora_adapter", **body)
        assert (status, reply["root"]) == (200, name)
        assert server.refused("load_lora_adapter", **body)[1] == "lora_name"
    (folder / "polite" / "adapter_config.json").unlink()
    _, field, message = server.refused("load_lora_adapter", lora_name="polite", lora_path="polite")
    assert field == "lora_path"
    assert "must be a folder with adapter_config.json" in message


def test_what_vllms_clients_say_beside_the_name_is_taken_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    server = server_of(folder, tmp_path)
    body: dict[str, Any] = {"lora_name": "mine", "lora_path": "brief", "lora_int_id": 7, "base_model_name": "other"}
    status, reply = run(server, "v1/load_lora_adapter", **body)
    assert (status, reply["root"], reply["parent"]) == (200, "brief", "smol")
    assert run(server, "v1/unload_lora_adapter", lora_name="mine", lora_int_id=3)[0] == 200


@pytest.mark.parametrize(
    ("name", "path", "field"),
    [
        ("x", "../secret", "lora_path"),
        ("x", "/etc", "lora_path"),
        ("x", ".", "lora_path"),
        ("x", "nothing", "lora_path"),
        ("x", "link", "lora_path"),
        ("x", "a\0b", "lora_path"),
        ("x", "n" * 5000, "lora_path"),
        ("a/b", "brief", "lora_name"),
        ("", "brief", "lora_name"),
        ("llama", "brief", "lora_name"),
    ],
)
def test_only_what_is_below_the_folder_is_loaded_by_a_plain_name(
    folder: Path, tmp_path: Path, name: str, path: str, field: str
) -> None:
    write_random_adapter(tmp_path / "secret", tiny_args())
    (folder / "link").symlink_to(tmp_path / "secret")
    status, param, _ = server_of(folder, tmp_path).refused("load_lora_adapter", lora_name=name, lora_path=path)
    assert (status, param) == (400, field)


def test_clients_change_nothing_unless_the_server_says_so(folder: Path, tmp_path: Path) -> None:
    server = server_of(folder, tmp_path, can_change=False)
    assert server.refused("load_lora_adapter", lora_name="mine", lora_path="brief")[0] == 403
    assert server.refused("unload_lora_adapter", lora_name="brief")[0] == 403
    assert server.request("completions", model="brief", prompt="Hi").adapter is not None


def test_an_adapter_of_another_kind_is_left_out_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "polite" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with caplog.at_level(logging.WARNING):
        assert Adapters(folder).names == ["brief"]
    assert "the adapter polite is left out: " in caplog.text
    assert "DoRA" in caplog.text


def test_an_adapter_of_too_high_a_rank_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_random_adapter(folder / "wide", tiny_args(), r=8)
    with caplog.at_level(logging.WARNING):
        assert Adapters(folder, max_rank=4).names == ["brief", "polite"]
    assert "its rank is 8, and there is room for 4: set max_lora_rank" in caplog.text


def test_room_is_made_for_the_highest_rank_in_the_folder(folder: Path, tmp_path: Path) -> None:
    """For a higher one than most have a server must be told to; clients may load others."""
    assert Adapters(folder).max_rank == 4
    assert Adapters(folder, can_change=True).max_rank == Adapters(None).max_rank == 16
    for rank in (48, 65):
        write_random_adapter(folder / f"rank-{rank}", tiny_args(), rank_pattern={"q_proj": rank})
    assert Adapters(folder).max_rank == Adapters(folder, can_change=True).max_rank == 48
    assert Adapters(folder).names == ["brief", "polite", "rank-48"]
    assert Adapters(folder, max_rank=65).names == ["brief", "polite", "rank-48", "rank-65"]


def test_a_request_for_one_that_was_left_out_is_told_why(folder: Path, tmp_path: Path) -> None:
    write_random_adapter(folder / "wide", tiny_args(), r=65)
    reason = "left out at the start: its rank is 65, and there is room for 64"
    with pytest.raises(RequestError, match=reason) as caught:
        Adapters(folder).named("wide")
    assert caught.value.status == 404
    status, field, message = server_of(folder, tmp_path).refused("completions", model="wide", prompt="Hi")
    assert (status, field) == (404, "model")
    assert reason in message
    adapters = Adapters(folder, can_change=True)
    adapters.add("wide", AdapterRef.of(folder / "brief"))
    adapters.remove("wide")
    with pytest.raises(RequestError, match="this server has 'brief', 'polite'"):
        adapters.named("wide")


def test_an_adapter_is_no_folder_of_adapters(folder: Path) -> None:
    with pytest.raises(InvalidValue, match="adapters_dir is itself an adapter: give the folder above"):
        Adapters(folder / "brief")


def test_a_folder_that_is_being_written_is_no_adapter(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "polite").rename(folder / ".polite.partial")
    assert Adapters(folder).names == ["brief"]
    assert not caplog.records


def test_a_request_whose_adapter_cannot_be_had_is_refused(folder: Path, tmp_path: Path) -> None:
    call = Call("id")
    (request,) = call.begin(server_of(folder, tmp_path).read("completions", model="brief", prompt="Hi"))
    assert isinstance(request, Request)
    with pytest.raises(RequestError, match="the adapter cannot be had: it is gone") as caught:
        call.take(Output(request_id="id/0", finish_reason="error", problem="it is gone"))
    assert (caught.value.status, caught.value.code) == (400, "invalid_adapter")


def test_the_status_of_a_call_with_an_adapter_waits_for_the_engines_first_word(folder: Path, tmp_path: Path) -> None:
    server = server_of(folder, tmp_path)
    for model, waits in (("brief", True), ("smol", False)):
        call = Call("id")
        call.begin(server.read("completions", model=model, prompt="Hi"))
        assert call.has_status != waits
        call.take(Output(request_id="id/0", text="a", token_ids=(1,)))
        assert call.has_status
        assert call.piece().status == 200


def test_a_server_with_a_folder_has_slots(tmp_path: Path) -> None:
    def read(**given: Any) -> HandlerConfig:
        return HandlerConfig.read({"converted_ckpt_dir": ".", **given}, base=tmp_path)

    assert read().engine.max_loras == 0
    assert read(adapters_dir=".").engine.max_loras == 8
    assert read(adapters_dir=".", max_loras=3).engine.max_loras == 3
    with pytest.raises(ValueError, match="allow_runtime_lora_updating needs adapters_dir"):
        read(allow_runtime_lora_updating=True)
    with pytest.raises(ValueError, match="adapters_dir"):
        read(adapters_dir="nowhere")
    with pytest.raises(ValueError, match="max_loras must be at least 1 with an adapters_dir, got 0"):
        read(adapters_dir=".", max_loras=0)
