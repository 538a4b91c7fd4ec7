"""The chat page in a real browser, headless Chromium, against a server whose answers are scripted.

Every test also fails when the page asks another origin for anything, breaks its own content security policy, stores the
key for good, raises an error or writes one to the console that the test does not expect. Skipped, visibly, where
playwright or Chromium is missing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ernie45.server.page import page_routes

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

KEY = "sk-test+/=~%41"  # whatever a key may hold, it has to survive the address
TIMEOUT_S = 5.0
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# The server -----------------------------------------------------------------------------------------------------------


def piece(finish: str | None = None, **delta: Any) -> str:
    return event({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(prompt: int, completion: int, *, cached: int = 0, reasoning: int = 0) -> str:
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return event({"id": "c", "choices": [], "usage": counts})


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"


@dataclass
class FakeServer:
    """Serves the page and an API that answers a question with the events scripted for it."""

    scripts: dict[str, list[str | float | threading.Event]] = field(default_factory=dict)
    """Last user message -> events; a number sleeps so many seconds, an Event is waited for."""
    refusals: dict[str, Response] = field(default_factory=dict)
    """Last user message -> answer instead of a stream, once."""
    readiness: dict[str, str] | None = None
    """The body of a 503 of /ready, while it is not ready."""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "ernie-test", "max_model_len": 4096}])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client went away in the middle of a stream."""
    url: str = ""

    def app(self) -> Starlette:
        routes = [
            Route("/ready", self.ready),
            Route("/v1/models", self.list_models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        return Starlette(routes=[*page_routes(), *routes])

    def refused(self, request: Request) -> Response | None:
        if request.headers.get("authorization") == f"Bearer {KEY}":
            return None
        return error(401, "Incorrect API key provided", "authentication_error", code="invalid_api_key")

    async def ready(self, request: Request) -> Response:
        if self.readiness is not None:
            return JSONResponse(self.readiness, status_code=503)
        return JSONResponse({"status": "ready"})

    async def list_models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"object": "list", "data": self.models})

    async def chat(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if question in self.refusals:
            return self.refusals.pop(question)
        return StreamingResponse(self.stream(self.scripts[question]), media_type="text/event-stream")

    async def stream(self, script: list[str | float | threading.Event]) -> AsyncIterator[str]:
        left = self.left  # of the test that began this stream
        try:
            for step in script:
                if isinstance(step, str):
                    yield step
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    await _wait(step)
        except asyncio.CancelledError:
            left.set()
            raise


async def _wait(gate: threading.Event) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not gate.is_set():
        assert time.monotonic() < deadline, "the test did not open the gate"
        await asyncio.sleep(0.01)


def error(status: int, message: str, kind: str, *, code: str | None = None, wait: int | None = None) -> Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=status, headers={} if wait is None else {"Retry-After": str(wait)})


def serve(fake: FakeServer) -> Callable[[], None]:
    """Starts the server on a free port in a thread; returns what stops it."""
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listener.close()

    return stop


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    stop = serve(server)
    yield server
    stop()


@pytest.fixture
def fake(server: FakeServer) -> FakeServer:
    """The one server of this file, as if new: starting one takes longer than most tests."""
    vars(server).update(vars(FakeServer(url=server.url)))
    return server


# The browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and all that was seen of it from outside."""

    page: Any
    expected_errors: list[str] = field(default_factory=list)
    """Parts of console errors that the test brings about, such as the browser's own line for a 401."""
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def on_console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def on_dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def unexpected(self) -> list[str]:
        return [e for e in self.errors if not any(part in e for part in self.expected_errors)]


VIOLATIONS = "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"


@pytest.fixture
def watched(browser: Any, fake: FakeServer) -> Iterator[Watched]:
    context = browser.new_context(locale="en-GB", color_scheme="light", viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1000 * TIMEOUT_S)
    context.add_init_script(VIOLATIONS)
    watched = Watched(context.new_page())
    page = watched.page
    page.on("console", watched.on_console)
    page.on("pageerror", lambda error: watched.errors.append(f"raised: {error}"))
    page.on("dialog", watched.on_dialog)
    page.on("popup", lambda popup: watched.errors.append(f"popup: {popup.url}"))
    page.on("request", lambda request: watched.requests.append(request.url))
    yield watched
    stored = page.evaluate("JSON.stringify(localStorage)")
    context.close()
    assert KEY not in stored
    assert [url for url in watched.requests if not url.startswith(f"{fake.url}/")] == []
    assert watched.unexpected() == []


@pytest.fixture
def page(watched: Watched, fake: FakeServer) -> Any:
    """The page, open with the key, ready to send."""
    return open_page(watched.page, fake)


def open_page(page: Any, fake: FakeServer) -> Any:
    page.goto(f"{fake.url}/#key={quote(KEY, safe='')}", wait_until="commit")
    page.locator(".server.ready").wait_for()
    return page


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer_text(page: Any) -> Any:
    return page.locator("article.answer > .text").last


def expect(locator: Any) -> Any:
    return playwright_api.expect(locator)


# What it does ---------------------------------------------------------------------------------------------------------


def test_the_key_leaves_the_address_and_is_never_stored_for_good(page: Any) -> None:
    assert "#" not in page.url
    assert page.evaluate("sessionStorage.getItem('ernie45.key')") == KEY
    page.reload()
    page.get_by_text("Ready", exact=True).wait_for()


def test_an_answer_streams_and_stands_with_its_figures(page: Any, fake: FakeServer) -> None:
    gates = [threading.Event(), threading.Event()]
    fake.scripts["Hello"] = [
        ": keep-alive\n\n",
        piece(role="assistant", content=""),
        piece(content="Good "),
        gates[0],
        "data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "morning"}}]}) + "\r\n\r\n",
        0.15,
        ": keep-alive\n\n",
        piece(content=" 你好"),
        gates[1],
        piece(finish="stop"),
        usage(1812, 3, cached=1640),
        DONE,
    ]
    ask(page, "Hello")
    expect(answer_text(page)).to_have_text("Good")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.locator(".conversations .entry").click()  # it is open already, and goes on
    gates[0].set()
    expect(answer_text(page)).to_have_text("Good morning 你好")
    expect(page.locator(".figures.live")).to_contain_text("measured in this page")
    gates[1].set()
    figures = page.locator(".figures:not(.live)")
    expect(figures).to_contain_text("in 1,812 (1,640 cached) · out 3 · ")
    assert " s to first token" in figures.inner_text()
    body = fake.bodies[0]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert body.keys() == {"model", "messages", "stream", "stream_options"}, "what is unset is not sent"


def test_rate_is_the_servers_count_over_the_measured_time(page: Any, fake: FakeServer) -> None:
    fake.scripts["q"] = [piece(content="a"), 0.5, piece(content="b"), piece(finish="stop"), usage(4, 11), DONE]
    ask(page, "q")
    figures = page.locator(".figures:not(.live)")
    expect(figures).to_contain_text("tok/s")
    rate = float(figures.inner_text().rsplit("· ", 1)[1].split(" ")[0])
    assert 10 < rate < 25, "10 tokens after the first one in about half a second"


def test_stop_closes_the_connection_and_keeps_the_text(page: Any, fake: FakeServer) -> None:
    fake.scripts["q"] = [piece(content="Once upon"), threading.Event()]
    fake.scripts["go on"] = [piece(content="there was"), threading.Event()]
    ask(page, "q")
    expect(answer_text(page)).to_have_text("Once upon")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_text("Stopped", exact=True)).to_have_count(1)
    assert fake.left.wait(TIMEOUT_S), "the server did not see the client leave"
    expect(answer_text(page)).to_have_text("Once upon")

    fake.left.clear()
    ask(page, "go on")
    expect(answer_text(page)).to_have_text("there was")
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped", exact=True)).to_have_count(2)
    assert fake.left.wait(TIMEOUT_S)
    assert [m["content"] for m in fake.bodies[1]["messages"]] == ["q", "Once upon", "go on"]


def test_thinking_opens_while_it_lasts_and_folds_with_its_count(watched: Watched, fake: FakeServer) -> None:
    fake.models = [{"id": "ernie-thinking", "max_model_len": 4096, "capabilities": ["thinking", "tools"]}]
    page = open_page(watched.page, fake)
    gate = threading.Event()
    fake.scripts["q"] = [
        piece(reasoning_content="Let me see. "),
        gate,
        piece(content="42"),
        piece(finish="stop"),
        usage(8, 214, reasoning=96),
        DONE,
    ]
    page.get_by_label("Settings").first.click()
    page.get_by_label("Longest thought (tokens)").fill("128")
    page.keyboard.press("Escape")
    ask(page, "q")
    expect(page.get_by_text("Let me see.")).to_be_visible()
    expect(page.locator(".thought summary")).to_contain_text("Thinking …")
    gate.set()
    expect(page.locator(".thought summary")).to_contain_text("96 tokens")
    expect(page.get_by_text("Let me see.")).to_be_hidden()
    expect(page.locator(".figures")).to_contain_text("out 214 (96 thinking)")
    page.locator(".thought summary").click()
    expect(page.get_by_text("Let me see.")).to_be_visible()
    assert (fake.bodies[0]["enable_thinking"], fake.bodies[0]["reasoning_max_tokens"]) == (True, 128)

    page.get_by_role("button", name="Think", exact=True).click()
    ask(page, "q")
    expect(page.locator("article.answer")).to_have_count(2)
    assert fake.bodies[1]["enable_thinking"] is False
    assert "reasoning_max_tokens" not in fake.bodies[1]


def test_a_model_that_always_thinks_has_no_switch(watched: Watched, fake: FakeServer) -> None:
    fake.models = [{"id": "x", "max_model_len": 4096, "capabilities": ["thinking"], "thinking": "always"}]
    page = open_page(watched.page, fake)
    fake.scripts["q"] = [piece(reasoning_content="Hm"), piece(content="42"), piece(finish="stop"), usage(8, 3), DONE]
    ask(page, "q")
    expect(page.locator("article.answer")).to_contain_text("42")
    expect(page.get_by_role("button", name="Think", exact=True)).to_have_count(0)
    assert "enable_thinking" not in fake.bodies[0]


def test_a_wrong_key_is_asked_for_again(watched: Watched, fake: FakeServer) -> None:
    watched.expected_errors = ["401"]
    page = watched.page
    page.goto(fake.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server asks for its key")
    for wrong in ("wrong", "密钥"):
        dialog.get_by_label("Key").fill(wrong)
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server refused this key")
    dialog.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()


def test_a_key_that_stops_working_is_asked_for_while_chatting(page: Any, watched: Watched, fake: FakeServer) -> None:
    watched.expected_errors = ["401"]
    fake.refusals["q"] = error(401, "The key was revoked", "authentication_error")
    fake.scripts["q"] = [piece(content="Yes"), piece(finish="stop"), DONE]
    ask(page, "q")
    expect(page.get_by_role("dialog")).to_contain_text("The server refused this key")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".failure")).to_contain_text("The key was revoked")
    page.get_by_role("button", name="Try again").click()
    expect(answer_text(page)).to_have_text("Yes")


def test_a_busy_server_is_asked_again_after_the_time_that_it_named(
    page: Any, watched: Watched, fake: FakeServer
) -> None:
    watched.expected_errors = ["429"]
    fake.refusals["q"] = error(429, "64 requests are waiting", "overloaded", wait=1)
    fake.scripts["q"] = [piece(content="Now"), piece(finish="stop"), DONE]
    ask(page, "q")
    failure = page.locator(".failure")
    expect(failure).to_contain_text("The server is busy")
    expect(failure).to_contain_text("64 requests are waiting")
    expect(failure).to_contain_text("try again in 1 s")
    failure.get_by_role("button", name="Try again").click()
    expect(answer_text(page)).to_have_text("Now")
    expect(failure).to_have_count(0)
    assert len(fake.bodies) == 2


def test_an_answer_that_does_not_reach_its_end_says_why(page: Any, fake: FakeServer) -> None:
    broken = event({"error": {"message": "The engine restarted", "type": "server_error", "param": None, "code": None}})
    fake.scripts["q"] = [piece(content="Half an answer"), broken, DONE]
    ask(page, "q")
    failure = page.locator(".failure")
    expect(failure).to_contain_text("The answer broke off")
    expect(failure).to_contain_text("The engine restarted")
    expect(answer_text(page)).to_have_text("Half an answer")

    fake.scripts["q"] = [piece(content="Half")]
    page.get_by_role("button", name="Try again").click()
    expect(failure).to_contain_text("ended before the answer was complete")

    fake.scripts["q"] = [piece(content="As long as allowed"), piece(finish="length"), DONE]
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Cut off: the limit of tokens is reached.")).to_be_visible()
    expect(answer_text(page)).to_have_text("As long as allowed")
    expect(failure).to_have_count(0)


def test_a_server_that_is_not_ready_says_so_until_it_is(watched: Watched, fake: FakeServer) -> None:
    watched.expected_errors = ["503"]
    fake.readiness = {"status": "loading", "message": "reading weights: 40 %"}
    page = watched.page
    page.goto(fake.url)
    expect(page.get_by_role("heading", name="The model is loading")).to_be_visible()
    expect(page.get_by_text("reading weights: 40 %")).to_be_visible()
    page.get_by_label("Message", exact=True).fill("early")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    fake.readiness = None
    page.evaluate("key => location.hash = 'key=' + encodeURIComponent(key)", KEY)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    fake.scripts["early"] = [piece(content="ok"), piece(finish="stop"), DONE]
    page.get_by_role("button", name="Send").click()
    expect(answer_text(page)).to_have_text("ok")

    fake.readiness = {"status": "restarting", "message": "attempt 1"}
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as if the tab came back into sight
    expect(page.get_by_text("The engine is restarting: attempt 1")).to_be_visible()
    expect(page.get_by_role("button", name="Answer again")).to_have_count(0)
    fake.readiness = None
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()


def test_settings_reach_the_request_and_bad_ones_do_not(page: Any, fake: FakeServer) -> None:
    expect(page.get_by_role("button", name="Think", exact=True)).to_have_count(0)
    page.get_by_label("Settings").first.click()
    expect(page.get_by_label("Longest thought (tokens)")).to_have_count(0)
    page.get_by_placeholder("How the model should behave").fill("Be brief.")
    for label, text in {
        "Temperature": "0.7",
        "Top p": "0.9",
        "Top k": "20",
        "Min p": "0.05",
        "Longest answer": "5000",
        "Repetition penalty": "1.1",
        "Presence penalty": "-1",
        "Frequency penalty": "0.5",
        "Seed": "7",
        "Stop strings": "END\\nOF\n\n}",
    }.items():
        page.get_by_label(label).fill(text)
    expect(page.get_by_text("5000 is out of range: whole number, 1 to 4,096")).to_be_visible()
    page.get_by_label("Message", exact=True).fill("q")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.get_by_text("A setting is out of range.")).to_be_visible()
    for text, message in {"1.5": "1.5 is not a whole number", "many": "“many” is not a number"}.items():
        page.get_by_label("Longest answer").fill(text)
        expect(page.get_by_text(message)).to_be_visible()
    page.get_by_label("Longest answer").fill("64")
    fake.scripts["q"] = [piece(content="ok"), piece(finish="stop"), DONE]
    page.get_by_role("button", name="Send").click()
    expect(answer_text(page)).to_have_text("ok")
    body = fake.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in body.keys() - {"messages", "model", "stream", "stream_options"}} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "max_tokens": 64,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "seed": 7,
        "stop": ["END\nOF", "}"],
    }


def test_edit_regenerate_new_open_delete(page: Any, fake: FakeServer) -> None:
    for question, reply in {"one": "1", "two": "2", "uno": "I"}.items():
        fake.scripts[question] = [piece(content=reply), piece(finish="stop"), DONE]
    ask(page, "one")
    expect(answer_text(page)).to_have_text("1")
    ask(page, "two")
    expect(answer_text(page)).to_have_text("2")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator("article.answer")).to_have_count(2)
    expect(answer_text(page)).to_have_text("2")
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    assert [m["content"] for m in fake.bodies[2]["messages"]] == ["one", "1", "two"]

    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("textbox", name="Edit").fill("uno")
    page.keyboard.press("Enter")
    expect(answer_text(page)).to_have_text("I")
    expect(page.locator("article.answer")).to_have_count(1)
    assert [m["content"] for m in fake.bodies[3]["messages"]] == ["uno"]

    page.get_by_role("button", name="New conversation", exact=True).click()
    expect(page.get_by_role("heading", name="What would you like to ask?")).to_be_visible()
    ask(page, "two")
    expect(answer_text(page)).to_have_text("2")
    entries = page.locator(".conversations .entry")
    expect(entries).to_have_text(["two", "uno"])
    entries.nth(1).click()
    expect(answer_text(page)).to_have_text("I")
    page.get_by_role("button", name="Delete “uno”").click()
    expect(entries).to_have_text(["two"])
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(entries).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('chat'))") == []


def test_reload_keeps_the_conversation_half_an_answer_too(page: Any, fake: FakeServer) -> None:
    fake.scripts["one"] = [piece(content="**1**"), piece(finish="stop"), usage(5, 1), DONE]
    fake.scripts["two"] = [piece(content="half"), threading.Event()]
    ask(page, "one")
    expect(page.locator(".figures").first).to_contain_text("in 5 · out 1")
    ask(page, "two")
    expect(answer_text(page)).to_have_text("half")
    page.reload()
    expect(page.locator("article.answer > .text")).to_have_text(["1", "half"])
    expect(page.get_by_text("Stopped", exact=True)).to_be_visible()
    expect(page.locator(".figures").first).to_contain_text("in 5 · out 1")


MARKDOWN = """# Title

Some **bold**, *italic*, ~~gone~~ and `co<de>` &amp; &#x4e2d; text with [a link](https://example.org/?a=1&b=2) and \\(a_1 * b_1\\).

- one
  - nested
- [x] done

3. three

| a | b |
|---|--:|
| 1 | `2` |

> quoted

```python
print("<b>hi</b>")
```
"""


def test_markdown(page: Any, fake: FakeServer) -> None:
    pieces = [piece(content=MARKDOWN[at : at + 7]) for at in range(0, len(MARKDOWN), 7)]
    fake.scripts["q"] = [*pieces, piece(finish="stop"), DONE]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "q")
    text = answer_text(page)
    expect(text.locator("pre")).to_have_text('print("<b>hi</b>")')
    expect(text.locator("h3")).to_have_text("Title")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("p code").first).to_have_text("co<de>")
    expect(text.locator("p").first).to_contain_text("& 中 text")
    expect(text.locator("p .formula")).to_have_text("\\(a_1 * b_1\\)")
    expect(text.locator("ul ul li")).to_have_text("nested")
    expect(text.locator("ol")).to_have_attribute("start", "3")
    expect(text.locator("tbody td")).to_have_text(["1", "2"])
    expect(text.locator("blockquote")).to_have_text("quoted")
    link = text.get_by_role("link", name="a link")
    expect(link).to_have_attribute("href", "https://example.org/?a=1&b=2")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    text.get_by_role("button", name="Copy code").click()
    expect(text.locator(".code-bar")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>hi</b>")'


ATTACKS = [
    "<script>document.title='hit'</script>",
    "<img src=x onerror=\"document.title='hit'\">",
    "<svg onload=\"document.title='hit'\"><script>document.title='hit'</script></svg>",
    "<svg><animate onbegin=\"document.title='hit'\" attributeName=x dur=1s></svg>",
    "<iframe src=\"javascript:parent.document.title='hit'\"></iframe>",
    "<iframe srcdoc=\"<script>parent.document.title='hit'</script>\"></iframe>",
    "<a href=\"javascript:document.title='hit'\">click</a>",
    "<form action=\"javascript:document.title='hit'\"><button>click</button></form>",
    "<style>@import 'https://evil.example/x.css'; body{display:none}</style>",
    '<link rel=stylesheet href="https://evil.example/x.css">',
    '<meta http-equiv=refresh content="0;url=https://evil.example/">',
    '<base href="https://evil.example/">',
    "<details open ontoggle=\"document.title='hit'\">x</details>",
    '<object data="https://evil.example/x.swf"></object>',
    "<math><mtext><img src=x onerror=\"document.title='hit'\"></mtext></math>",
    "<!-- --><script>document.title='hit'</script><!-- -->",
    "[click](javascript:document.title='hit')",
    "[click](JaVaScRiPt:document.title='hit')",
    "[click](java&#x73;cript:document.title='hit')",
    "[click](java&Tab;script:document.title='hit')",
    "[click](&#1;javascript:document.title='hit')",
    "[click](<java\nscript:document.title='hit'>)",
    "[click](data:text/html,<script>document.title='hit'</script>)",
    "[click](vbscript:hit)",
    "[click](file:///etc/passwd)",
    "[click](//evil.example/)",
    "[click](blob:null/1)",
    "<javascript:document.title='hit'>",
    "[ref]\n\n[ref]: javascript:document.title='hit'",
    "![x](https://evil.example/pixel.png)",
    "![x](javascript:document.title='hit')",
    "![\" onerror=\"document.title='hit'](x)",
    "[x](https://example.org/\"onmouseover=\"document.title='hit')",
    '[x](https://example.org "\\" onmouseover=\\"document.title=1")',
    "```\"><script>document.title='hit'</script>\nx\n```",
    "| <img src=x onerror=document.title='hit'> |\n|---|\n| <script>document.title='hit'</script> |",
    "# <img src=x onerror=document.title='hit'>",
    "`<img src=x onerror=document.title='hit'>`",
    "\\<img src=x onerror=document.title='hit'\\>",
    "&lt;img src=x onerror=document.title='hit'&gt;",
    "> " * 100 + "deep",
]
# Past what the parser's stack holds: the whole text is then shown as it stands, so these go by themselves.
BOTTOMLESS = [">" * 5000 + " deep", "- " * 2000 + "deep"]


LOOK = """() => {
  const log = document.querySelector('.log');
  const forbidden = 'script, img, iframe, object, embed, form, style, link, meta, base, math, audio, video';
  const attributes = [...log.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => a.name));
  return {
    elements: [...log.querySelectorAll(forbidden)].map(e => e.outerHTML),
    svg: [...log.querySelectorAll('svg')].filter(e => !e.matches('.icon')).map(e => e.outerHTML),
    handlers: attributes.filter(name => name.startsWith('on') || name === 'style' || name === 'srcdoc'),
    links: [...new Set([...log.querySelectorAll('a')].map(a => [a.protocol, a.rel, a.target].join(' ')))],
    title: document.title,
  };
}"""
HARMLESS = {
    "elements": [],
    "svg": [],
    "handlers": [],
    "links": ["https: noopener noreferrer _blank"],
    "title": "ernie45",
}


def test_nothing_in_an_answer_is_executed_loaded_or_followed(page: Any, fake: FakeServer) -> None:
    """Question, thought and answer carry the attacks: all in one stream, and each as a stored turn of its own."""
    text = "\n\n".join(ATTACKS)
    fake.scripts[text] = [piece(reasoning_content=text), piece(content=text), piece(finish="stop"), DONE]
    ask(page, text)
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    assert page.evaluate(LOOK) == HARMLESS

    turns: list[dict[str, Any]] = []
    for attack in [*ATTACKS, *BOTTOMLESS]:
        call = {"name": attack, "arguments": attack}
        turns.append({"role": "user", "text": attack})
        turns.append({"role": "assistant", "text": attack, "reasoning": attack, "calls": [call], "finish": attack})
    stored = {"id": "a", "title": ATTACKS[0], "updated": 1, "system": text, "turns": turns}
    page.evaluate("text => localStorage.setItem('ernie45.chat.a', text)", json.dumps(stored))
    page.evaluate("sessionStorage.setItem('ernie45.open', 'a')")
    page.reload()
    expect(page.locator("article.answer")).to_have_count(len(ATTACKS) + len(BOTTOMLESS))
    assert page.evaluate(LOOK) == HARMLESS


def test_stored_conversations_are_no_way_in_either(page: Any, fake: FakeServer) -> None:
    evil = {"type": "script", "props": {"children": "document.title='hit'"}, "constructor": None}
    broken = [
        "not json",
        "null",
        json.dumps({"turns": 3}),
        json.dumps({"id": "a", "title": evil, "updated": 1, "system": "", "turns": [{"role": "user", "text": "x"}]}),
    ]
    page.evaluate("list => list.forEach((s, i) => localStorage.setItem('ernie45.chat.' + i, s))", broken)
    page.evaluate('localStorage.setItem(\'ernie45.settings\', \'{"language": "__proto__", "theme": 7}\')')
    page.reload()
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    assert page.title() == "ernie45"


def test_colours_and_language_switch_and_stay(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Use dark colours").click()
    expect(page.get_by_role("button", name="Use light colours")).to_be_visible()
    dark = page.evaluate(ground)
    assert sum(_rgb(dark)) < 200
    assert sum(_rgb(light)) > 600
    page.get_by_role("button", name="Switch to Chinese").click()
    expect(page.get_by_role("heading", name="想问点什么？")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.reload()
    expect(page.get_by_role("heading", name="想问点什么？")).to_be_visible()
    assert page.evaluate(ground) == dark
    keys = page.evaluate("import('/page/strings.js').then(m => Object.values(m.strings).map(s => Object.keys(s)))")
    assert keys[0] == keys[1], "the tables as JavaScript reads them"
    page.get_by_role("button", name="使用浅色界面").click()
    assert page.evaluate("document.documentElement.dataset.theme") is None, "the system's own colours again"


def test_system_colours_and_language_hold_at_first(browser: Any, fake: FakeServer) -> None:
    context = browser.new_context(locale="zh-CN", color_scheme="dark")
    page = context.new_page()
    page.goto(fake.url)
    expect(page.get_by_text("服务器密钥")).to_be_visible()
    assert sum(_rgb(page.evaluate("getComputedStyle(document.body).backgroundColor"))) < 200
    context.close()


def test_scrolling_up_stops_following(page: Any, fake: FakeServer) -> None:
    gate = threading.Event()
    paragraphs = [piece(content=f"Paragraph {i}.\n\n") for i in range(80)]
    fake.scripts["q"] = [*paragraphs[:60], gate, *paragraphs[60:], piece(finish="stop"), DONE]
    to_end = (
        "(() => { const l = document.querySelector('.log'); return l.scrollHeight - l.scrollTop - l.clientHeight })()"
    )
    ask(page, "q")
    expect(page.get_by_text("Paragraph 59.")).to_be_in_viewport()
    assert page.evaluate(to_end) < 3
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -600)
    jump = page.get_by_role("button", name="Jump to the latest")
    expect(jump).to_be_visible()
    gate.set()
    expect(page.get_by_text("Paragraph 79.")).to_be_attached()
    assert page.evaluate(to_end) > 400
    jump.click()
    expect(page.get_by_text("Paragraph 79.")).to_be_in_viewport()
    expect(jump).to_have_count(0)


def test_360_pixels_are_enough(watched: Watched, fake: FakeServer) -> None:
    watched.page.set_viewport_size({"width": 360, "height": 640})
    page = open_page(watched.page, fake)
    wide = "| " + " | ".join(f"column {i}" for i in range(9)) + " |\n" + "|---" * 9 + "|\n\n```\n" + "x" * 300 + "\n```"
    fake.scripts["q"] = [piece(content=f"{wide}\n\n{'w' * 200}"), piece(finish="stop"), usage(5, 2), DONE]
    ask(page, "q")
    expect(page.get_by_text("in 5 · out 2")).to_be_visible()
    assert page.evaluate("document.querySelector('.log').scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send["x"] + send["width"] <= 360
    assert send["y"] + send["height"] <= 640
    page.get_by_role("button", name="Show conversations").click()
    expect(page.locator(".conversations .entry")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".conversations .entry")).to_be_hidden()


def test_keyboard_alone_and_what_is_read_out(page: Any, fake: FakeServer) -> None:
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_focused()
    message.fill("ni")
    for of_input_method in ({"isComposing": True}, {"keyCode": 229}):
        message.dispatch_event("keydown", {"key": "Enter", "bubbles": True, **of_input_method})
    page.keyboard.press("Shift+Enter")
    expect(message).to_have_value("ni\n")
    assert fake.bodies == []
    fake.scripts["q"] = [piece(content="ok"), piece(finish="stop"), DONE]
    ask(page, "q")
    expect(page.get_by_text("The answer is complete.")).to_be_attached()
    unlabelled = page.evaluate(
        """[...document.querySelectorAll('button, input, textarea, select')].filter(e =>
             !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert unlabelled == []
    assert page.evaluate("!document.querySelector('.log').closest('[aria-live]')"), "not every token is read out"
    page.get_by_label("Settings").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Close")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def _rgb(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
