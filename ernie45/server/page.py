"""The chat page as routes: `/` and the files in `page/`, held in memory, under a policy that forbids other origins.

The page is public, as it says nothing that the package does not; what it asks of the API needs a key. It stands on
starlette alone, so that it can be served, and tested, without an engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"

# Scripts and styles from files of this server only: no inline text, no eval, no frame, no form that leaves the page.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept by the browser but asked for each time: file names carry no version, and an upgrade must not mix two pages.
    "Cache-Control": "no-cache",
}

# What is served is what has a type here; the system's own table of types differs from machine to machine.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """One file as it goes out."""

    content: bytes
    media_type: str
    etag: str
    """Quoted, from the content: equal files have equal tags on every machine."""


def page_routes() -> list[Route]:
    """The routes of the chat page: `/` and `/page/...`, for GET and HEAD.

    Reads the files now, once; a request never touches the disk, and a path that is not among them is a 404.
    """
    files = dict(_read(_FOLDER))
    paths = {"/": files.pop("index.html"), **{f"/page/{name}": file for name, file in files.items()}}
    return [_route(path, file) for path, file in paths.items()]


def _route(path: str, file: PageFile) -> Route:
    async def page(request: Request) -> Response:
        return _respond(request, file)

    return Route(path, page, methods=["GET"], name="page", include_in_schema=False)


def _read(folder: Path) -> Iterator[tuple[str, PageFile]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TYPES and path.is_file():
            content = path.read_bytes()
            yield (
                path.relative_to(folder).as_posix(),
                PageFile(
                    content=content,
                    media_type=_TYPES[path.suffix],
                    etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
                ),
            )


def _respond(request: Request, file: PageFile) -> Response:
    headers = _HEADERS | {"ETag": file.etag}
    if _is_known(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _is_known(if_none_match: str, etag: str) -> bool:
    """RFC 9110, 13.1.2: a list of tags or `*`, compared weakly, as a proxy that compresses makes tags weak."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return "*" in tags or etag in tags
