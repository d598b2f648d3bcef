"""Owns `make chat`: a page in the browser that talks with the served model. Knows the page, not how replies are made.

It is served on this machine only, and neither the page nor its server connects to anything but the model's server.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import fire
import gradio
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.client import Reply, Sampling, Server

ROOT = Path(__file__).resolve().parent.parent
BASE_URL = "http://127.0.0.1:8080/predictions/llama/1.0/v1"
KEY_FILE = ROOT / "build" / "server" / "key_file.json"
# A reply may name an image or a link elsewhere: the browser must not fetch it.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

IDLE: Final = {"submit_btn": True, "stop_btn": False}
BUSY: Final = {"submit_btn": False, "stop_btn": True}
QUIET: Final[Any] = {"show_progress": "hidden", "api_visibility": "private"}

# So that a model that does not stop leaves room for later turns.
REPLY_TOKENS: Final = 256

# Enter while a reply comes: what is in the box is sent when the reply has ended.
ENTER_WHILE_BUSY: Final = """() => {
    const box = document.querySelector("#box")
    if (box.querySelector("[data-testid=stop-button]") && box.querySelector("textarea").value.trim())
        box.dataset.waiting = "yes"
}"""
SEND_WHAT_WAITS: Final = """() => {
    const box = document.querySelector("#box")
    if (box.dataset.waiting) {
        delete box.dataset.waiting
        setTimeout(() => box.querySelector("[data-testid=submit-button]")?.click(), 100)
    }
}"""

History = list[dict[str, Any]]  # as gradio.Chatbot has it: each message is {"role", "content": [parts]}


def build_page(server: Server) -> gradio.Blocks:
    """The page, ready to be launched."""

    async def greet() -> tuple[Any, str]:
        """The placeholder of an empty conversation, and the line above every one: who answers, or why nobody does."""
        try:
            model = await server.model()
        except Exception as error:
            return gradio.update(placeholder=f"### Not connected\n{server.explain(error)}"), "not connected"
        return gradio.update(placeholder=f"### {model.name}\nAsk it something."), html.escape(str(model))

    async def take_turn(
        event: gradio.EventData,
        text: str,
        history: History,
        system: str,
        temperature: float,
        top_p: float,
        max_tokens: int | None,
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Ask what is in the box, or for a retry the last question again."""
        if isinstance(event.target, gradio.Chatbot):
            history = without_last_reply(history)
        elif text.strip():
            history = [*history, {"role": "user", "content": [{"type": "text", "text": text}]}]
            text = ""
        else:
            return
        yield gradio.update(value=text, **BUSY), history
        sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens or None)
        async with contextlib.aclosing(server.reply(to_messages(history, system), sampling)) as replies:
            async for reply in replies:
                yield gradio.skip(), [*history, to_bubble(reply)]

    with gradio.Blocks(title="Chat", analytics_enabled=False) as page:
        line = gradio.HTML(elem_id="model", container=False, padding=False)
        chat = gradio.Chatbot(elem_id="chat", show_label=False, container=False, buttons=[], latex_delimiters=[])
        box = gradio.Textbox(
            elem_id="box",
            label="Message",
            show_label=False,
            container=False,
            placeholder="Message",
            max_lines=8,
            autofocus=True,
            **IDLE,
        )
        with gradio.Accordion("Settings", open=False, elem_id="settings"):
            system = gradio.Textbox("", label="System prompt", lines=2)
            with gradio.Row():
                temperature = gradio.Slider(0, 2, value=0.6, step=0.05, label="Temperature", min_width=210)
                top_p = gradio.Slider(0.05, 1, value=0.9, step=0.05, label="Top p", min_width=210)
                max_tokens = gradio.Number(
                    REPLY_TOKENS, label="Max tokens (0: all that fit)", minimum=0, precision=0, min_width=190
                )
        turn = gradio.on(
            [box.submit, chat.retry],
            take_turn,
            [box, chat, system, temperature, top_p, max_tokens],
            [box, chat],
            **QUIET,
        )
        settled = turn.then(settle, chat, [box, chat], queue=False, **QUIET)  # runs after a stop too
        settled.then(greet, None, [chat, line], queue=False, **QUIET)
        box.submit(None, js=ENTER_WHILE_BUSY, queue=False, **QUIET)
        settled.then(None, js=SEND_WHAT_WAITS, queue=False, **QUIET)
        box.stop(None, cancels=turn, **QUIET)
        chat.clear(list, None, chat, queue=False, **QUIET)
        page.load(greet, None, [chat, line], queue=False, **QUIET)
    return page.queue(default_concurrency_limit=None, api_open=False)


def settle(history: History) -> tuple[Any, History]:
    """After a turn, however it ended: the box is free again, and a reply that was stopped says so."""
    match history:
        case [*_, {"role": "user"}]:
            history = [*history, to_bubble(Reply(note="stopped"))]
        case [*before, {"role": "assistant", "content": [{"text": text}]}]:
            history = [*before, to_bubble(Reply(text=text, note="stopped"))]
    return gradio.update(**IDLE), history


def without_last_reply(history: History) -> History:
    asked = max(index for index, message in enumerate(history) if message["role"] == "user")
    return history[: asked + 1]


def to_bubble(reply: Reply) -> dict[str, Any]:
    """A message whose first part is what the model said, and the second, if any, the note below it."""
    parts = [reply.text]
    if reply.note:
        note = html.escape(" ".join(reply.note.split()))  # one line: an empty one would end the HTML block
        parts.append(f'<div class="note{" failed" * reply.failed}">{note}</div>')
    return {"role": "assistant", "content": [{"type": "text", "text": part} for part in parts]}


def read(message: Mapping[str, Any]) -> str:
    """What was said in a message, without the note below it."""
    return str(message["content"][0]["text"])


def to_messages(history: History, system: str) -> list[dict[str, str]]:
    """The conversation as the model is to see it: a question that got no answer is left out."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for message in history:
        if message["role"] == "assistant" and not read(message):
            messages.pop()
        else:
            messages.append({"role": message["role"], "content": read(message)})
    return messages


class Confined:
    """Tells the browser to fetch nothing from elsewhere, whatever a reply says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_confined)


def main(*, base_url: str = BASE_URL, api_key: str | None = None, port: int | None = None) -> None:
    """Serve the chat page on this machine.

    Args:
        base_url: of any server with OpenAI's API.
        api_key: for it; by default TorchServe's inference key in build/server/key_file.json.
        port: of the page; by default the first free one from 7860 on.
    """
    if api_key is None and urlsplit(base_url).hostname not in ("127.0.0.1", "localhost"):
        sys.exit("error: this machine's key is for this machine's server alone: give the other's with --api_key")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    def connect() -> Server:
        return Server(base_url, api_key=api_key and str(api_key), key_file=KEY_FILE)

    page = build_page(connect())
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=build_theme(),
            css_paths=Path(__file__).with_name("chat.css"),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(Confined)]},
        )
    except OSError:
        sys.exit("error: another program has the page's port: choose one with --port")
    print(f"The page is at {page.local_url} and talks with {base_url}\nTo end it: Ctrl-C", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        # With a client of its own: one that was used in this event loop cannot be used in the page's.
        asyncio.run(warn(connect()))
        page.block_thread()


async def warn(server: Server) -> None:
    """Say at the terminal, too, why the page would get no answer now."""
    try:
        await server.model()
    except Exception as error:
        print(f"warning: {server.explain(error)}", flush=True)


def build_theme() -> gradio.themes.Base:
    """Fonts of this machine, and one quiet colour."""
    theme = gradio.themes.Base(
        primary_hue="slate",
        neutral_hue="slate",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(
        body_text_color_subdued="*neutral_500",
        block_label_text_color="*neutral_500",
        input_background_fill="*neutral_50",
    )


if __name__ == "__main__":
    fire.Fire(main)
