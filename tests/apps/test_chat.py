"""The chat page in headless Chromium, against a real server: what one sees, and what the server is asked to do."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

import pytest

from tests.apps.conftest import Page, chatting, wait_for
from tests.e2e.conftest import Served
from tests.handler.support import ROOT

pytestmark = pytest.mark.clients

LONG = "Write a very long story about a llama, in many chapters."
PACE = r"\d+\.\d\d s to first token · \d+\.\d tokens/s · (\d+) prompt \+ (\d+) reply tokens( · cut at the token limit)?"


def counts(note: str) -> tuple[int, int]:
    """The prompt's and the reply's tokens."""
    found = re.fullmatch(PACE, note)
    assert found, note
    return int(found[1]), int(found[2])


def test_text_streams_in_and_each_reply_shows_its_pace(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    page.set("Max tokens", "40")
    page.say(LONG)
    seen: list[str] = []
    while page.busy or not seen:
        if len(page.messages) == 2 and not page.notes:
            seen.append(page.messages[1])
        time.sleep(0.05)
    lengths = sorted({len(text) for text in seen})
    assert len(lengths) > 5, lengths  # not all at once
    note = wait_for(lambda: page.notes, "the note")[0]
    assert counts(note)[1] == 40
    assert note.endswith("cut at the token limit")


def test_stop_ends_the_reply_on_the_server_and_retry_asks_again(page: Page, chat_url: str, served: Served) -> None:
    page.open(chat_url)
    page.set("Max tokens", "900")
    page.say(LONG)
    wait_for(lambda: len(page.messages) == 2 and len(page.messages[1]) > 20, "text")
    wait_for(lambda: served.gauge("llama_requests_running") == 1, "one running request")
    page.click("#box [data-testid=stop-button]")
    wait_for(lambda: served.gauge("llama_requests_running") == 0, "no running request", seconds=3)
    wait_for(lambda: page.notes == ["stopped"] and not page.busy, "the note")
    assert len(page.messages[1]) > 20, "the text so far stays"

    page.set("Max tokens", "8")
    page.click("#chat button[title=Retry]")
    note = wait_for(lambda: page.notes != ["stopped"] and not page.busy and page.notes, "another reply")[0]
    assert counts(note)[1] == 8
    assert len(page.messages) == 2


def test_closing_the_page_ends_the_reply(page: Page, chat_url: str, served: Served) -> None:
    page.open(chat_url)
    page.set("Max tokens", "900")
    page.say(LONG)
    wait_for(lambda: served.gauge("llama_requests_running") == 1, "one running request")
    page.browser.get("about:blank")
    wait_for(lambda: served.gauge("llama_requests_running") == 0, "no running request", seconds=3)


def test_what_was_said_and_the_settings_reach_the_model(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    page.set("Max tokens", "8")
    page.set("Temperature", "0")
    first, reply = counts(page.ask("Hello"))
    again, _ = counts(page.ask("Hello"))
    assert again >= 2 * (first - 30) + reply, "the first turn is part of the second prompt"
    greedy = [text.splitlines()[0] for text in page.messages[1::2]]
    page.click("#chat button[title=Clear]")
    wait_for(lambda: not page.messages, "an empty page")
    assert counts(page.ask("Hello"))[0] == first, "cleared"
    assert page.messages[1].splitlines()[0] == greedy[0], "temperature 0"
    page.click("#chat button[title=Clear]")
    wait_for(lambda: not page.messages, "an empty page")
    page.set("System prompt", "You are a llama " + "and " * 50 + "a friend.")
    assert counts(page.ask("Hello"))[0] > first + 25, "the system prompt"


def test_enter_during_a_reply_sends_what_is_written_when_it_has_ended(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    page.set("Max tokens", "40")
    page.say(LONG)
    wait_for(lambda: len(page.messages) == 2, "a reply")
    page.say("and then?")
    assert page.all("#box[data-waiting]")
    assert page.all("#box textarea")[0].get_attribute("value") == "and then?"
    wait_for(lambda: len(page.notes) == 2 and not page.busy, "the reply to what waited")
    assert page.messages[2].strip() == "and then?"
    assert len(page.messages) == 4
    assert page.all("#box textarea")[0].get_attribute("value") == ""
    assert not page.all("#box[data-waiting]")


def test_the_model_is_named_above_every_conversation(page: Page, chat_url: str, served: Served) -> None:
    page.open(chat_url)
    page.set("Max tokens", "4")
    page.ask("Hello")
    (line,) = page.texts("#model")
    assert line.strip() == f"llama · 127.0.0.1:{served.server.ports.inference} · context 1,024"


def test_a_reply_leaves_room_for_more_unless_told_otherwise(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    page.click("#settings > button")
    wait_for(lambda: page._field("Max tokens"), "the field")
    assert page._field("Max tokens").get_attribute("value") == "256"


def test_nothing_lies_below_the_button_that_clears(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    page.set("Max tokens", "4")
    page.ask("Hello")
    clear, first = page.all("#chat button[title=Clear]")[0].rect, page.all("#chat .message-row")[0].rect
    assert clear["y"] + clear["height"] + 8 <= first["y"]


@pytest.mark.parametrize("settings", [False, True], ids=["chat", "settings"])
def test_a_phone_shows_it_all_without_scrolling_sideways(page: Page, chat_url: str, settings: bool) -> None:
    page.open(chat_url, width=390, height=844)
    page.set("Max tokens", "30")
    page.ask("A long word: " + "llama" * 40)
    if not settings:
        page.click("#settings > button")
    script = (
        "return [document.documentElement.scrollWidth, innerWidth, document.documentElement.scrollHeight, innerHeight]"
    )
    width, window_width, height, window_height = page.browser.execute_script(script)
    assert window_width == 390
    assert width <= window_width
    assert height <= window_height
    send = page.all("#box [data-testid=submit-button]")[0].rect
    assert send["x"] + send["width"] <= 390


def test_nothing_is_fetched_from_elsewhere(page: Page, chat_url: str) -> None:
    """A message names an image on another origin, which is this test."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        page.open(chat_url)
        page.set("Max tokens", "8")
        image = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/image.png"
        page.ask(f"![image]({image})")
        assert page.all("#chat .user img"), "the page wants to show it"
        elsewhere.settimeout(0.5)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
        wanted = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        others = [
            url for url in page.browser.execute_script(wanted) if not url.startswith((chat_url, "data:", "blob:"))
        ]
        assert others == [image], "the page itself wants nothing else"


def test_a_wrong_key_gets_a_plain_message(page: Page, served: Served) -> None:
    with chatting(f"{served.url}/1.0/v1", "--api_key", "wrong") as url:
        page.open(url)
        assert "The server refused the key" in page.greeting
        assert page.ask("Hello").startswith("The server refused the key")


def test_a_refused_request_shows_the_servers_words(page: Page, chat_url: str) -> None:
    page.open(chat_url)
    note = page.ask("llama " * 2000)
    assert note.startswith("The server refused this request:")
    assert "1024" in note or "1023" in note
    page.set("Max tokens", "8")
    counts(page.ask("Hello"))  # what got no answer is not part of the next prompt


@pytest.fixture
def nobody() -> str:
    """An address at which no server answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_is_down_is_said_at_the_terminal(nobody: str) -> None:
    command = [sys.executable, "-m", "apps.chat", "--base_url", f"{nobody}/v1", "--api_key", "key"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        warning = next(line for line in process.stdout if line.startswith("warning: "))
        process.terminate()
    assert warning == f"warning: No server answers at {nobody}. Start one with “make serve”, then try again.\n"


def test_a_server_that_is_down_gets_a_plain_message(page: Page, nobody: str) -> None:
    with chatting(f"{nobody}/v1", "--api_key", "key") as url:
        page.open(url)
        words = f"No server answers at {nobody}. Start one with “make serve”, then try again."
        assert words in page.greeting
        wait_for(lambda: "".join(page.texts("#model")).strip() == "not connected", "the line above")
        assert page.ask("Hello") == words
        assert not page.busy
