"""The chat page as files over HTTP: headers, caching, what is served and what is not, no reference elsewhere.

What the page does in a browser is in test_page_browser.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from ernie45.server import page
from ernie45.server.page import CONTENT_SECURITY_POLICY, page_routes

FOLDER = Path(page.__file__).parent / "page"
OWN_FILES = sorted(path for path in FOLDER.glob("*") if path.is_file())
SCRIPTS = [path for path in OWN_FILES if path.suffix == ".js"]
PAGE = "/page/app.js"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(_app()) as client:
        yield client


@pytest.mark.parametrize("path", ["/", PAGE, "/page/base.css", "/page/vendor/preact.mjs", "/page/icon.svg"])
def test_headers_forbid_everything_from_elsewhere(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cache-control"] == "no-cache"


def test_content_types(client: TestClient) -> None:
    expected = {
        "/": "text/html; charset=utf-8",
        "/page/app.js": "text/javascript; charset=utf-8",
        "/page/vendor/htm.mjs": "text/javascript; charset=utf-8",
        "/page/base.css": "text/css; charset=utf-8",
        "/page/icon.svg": "image/svg+xml",
    }
    assert {path: client.get(path).headers["content-type"] for path in expected} == expected


def test_a_known_etag_is_answered_with_304(client: TestClient) -> None:
    first = client.get(PAGE)
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(PAGE, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b""), known
        assert again.headers["etag"] == etag
        assert again.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert client.get(PAGE, headers={"If-None-Match": '"other"'}).content == first.content


def test_get_and_head_only(client: TestClient) -> None:
    head = client.head(PAGE)
    assert head.status_code == 200
    assert int(head.headers["content-length"]) == (FOLDER / "app.js").stat().st_size
    for path in ("/", PAGE):
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert client.request(method, path).status_code == 405, (method, path)


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing.js",
        "/page/index.html",  # it is at /, and only there
        "/page/vendor",
        "/page/vendor/",
        "/page/vendor/README.md",
        "/page//app.js",
        "/page/./app.js",
        "/page/vendor/../app.js",
        "/page/../page.py",
        "/page/%2e%2e/page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/page/..%5cpage.py",
        "/page/%2Fetc%2Fpasswd",
        "/page//etc/passwd",
        "/page/app.js%00",
        "/page/app.js%00.css",
        "/page/app.js/",
        "/page/APP.JS",
        "/page/%252e%252e%252fpage.py",
        "/page/vendor/%e2%80%a5/app.js",
    ],
)
def test_what_is_not_on_the_list_is_404(path: str) -> None:
    """Sent as it stands: a client's own tidying of `..` would hide what the server makes of it."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }
    status, body = _call(scope)
    assert status == 404
    assert b"import" not in body
    assert b"root:" not in body


def test_requests_never_touch_the_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a request opened a file")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    monkeypatch.setattr("os.stat", fail)
    assert client.get(PAGE).status_code == 200
    assert client.get("/page/nothing.js").status_code == 404


def test_stands_without_torch_and_without_the_rest() -> None:
    code = (
        "import sys, ernie45.server.page as p; p.page_routes(); "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('ernie45.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ernie45.server', 'ernie45.server.page']"


def test_every_file_referred_to_is_served(client: TestClient) -> None:
    seen: set[str] = set()
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        waiting += [_resolved(path, target) for target in _references(path, answer.text)]
    served = {
        f"/page/{path.relative_to(FOLDER).as_posix()}" for path in FOLDER.rglob("*") if path.suffix in page._TYPES
    }
    assert seen - {"/"} == served - {"/page/index.html"}, "a file that nothing refers to, or that is not served"


def test_every_module_is_preloaded() -> None:
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    preloaded = set(re.findall(r'rel="modulepreload" href="page/([^"]+)"', index))
    modules = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in (".js", ".mjs")}
    assert preloaded == modules - {"app.js", "theme.js"}


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_nothing_refers_to_another_origin(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"(?:https?|wss?|ftp|blob|data|javascript)://?[^\s\"'`]*", text)
    assert not re.findall(r"[\"'(]//[^/\s]", text)


def test_no_inline_code_and_no_markup_from_text() -> None:
    """The policy would block the first at run time; the second it could not, so it must not be written at all."""
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)", index)
    assert not re.search(r"<style|\bstyle=|\bon\w+=", index)
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
        assert not re.search(forbidden, text), path.name
        assert not re.search(r"\bstyle=|srcdoc|<iframe", text), path.name


def test_both_languages_have_the_same_words() -> None:
    english, chinese = _tables()
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_text_is_used_and_every_used_text_exists() -> None:
    english, _ = _tables()
    code = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS if path.name != "strings.js")
    called = set(re.findall(r"\bt\(\"(\w+)\"", code))
    assert called <= english.keys()
    # Keys also travel as plain strings; two families are put together from a prefix and a name.
    mentioned = set(re.findall(r"\"(\w+)\"", code))
    composed = {f"p_{name}" for name in re.findall(r"name: \"(\w+)\"", code)} | {
        f"server_{name}" for name in ("connecting", "ready", "loading", "restarting", "unreachable", "locked")
    }
    assert english.keys() - called - mentioned - composed == set()


def test_vendored_files_are_the_published_ones() -> None:
    vendor = FOLDER / "vendor"
    table = dict(re.findall(r"^\| ([\w.]+) \|.*`([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE))
    modules = {path.name: path for path in vendor.iterdir() if path.suffix in (".mjs", ".js")}
    assert table.keys() == modules.keys()
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in modules.items()} == table
    for package in ("preact", "htm", "marked"):
        assert (vendor / f"LICENSE-{package}").stat().st_size > 500


def _tables() -> tuple[dict[str, str], dict[str, str]]:
    """The two tables of strings.js, one `key: "text",` per line; the browser test reads them as JavaScript does."""
    text = (FOLDER / "strings.js").read_text(encoding="utf-8")
    english, chinese = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \},$", text, re.MULTILINE | re.DOTALL)
    entry = re.compile(r'^    (\w+): "(.*)",$', re.MULTILINE)
    for table in (english, chinese):
        lines = [line for line in table.splitlines() if line.strip() and not line.strip().startswith("//")]
        assert len(entry.findall(table)) == len(lines) == len(dict(entry.findall(table)))
    return dict(entry.findall(english)), dict(entry.findall(chinese))


def _references(path: str, text: str) -> list[str]:
    if path == "/":
        return re.findall(r'\b(?:src|href)="([^"]+)"', text)
    if "/vendor/" in path:
        return re.findall(r'\b(?:import|from)\s*"([^"]+)"', text)
    return re.findall(r'\b(?:import|from) "([^"]+)"', text)


def _resolved(path: str, target: str) -> str:
    if path == "/":
        return f"/{target}"
    assert target.startswith("./"), f"{path} imports {target}"
    return f"{path.rsplit('/', 1)[0]}/{target[2:]}"


def _app() -> Starlette:
    app = Starlette(routes=page_routes())
    app.router.redirect_slashes = False  # as the server has it
    return app


def _call(scope: dict[str, Any]) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(_app()(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
