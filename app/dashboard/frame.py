"""The frame of every page: its templates and static files, what a browser may load, and failures as pages.

Nothing is inline and nothing comes from elsewhere, so the policy that browsers are told is as strict as it can be.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from markupsafe import Markup
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import app
from app.api.errors import MEDIA_TYPE
from app.api.origins import SAFE_METHODS
from app.errors import MergeyardError
from app.records.key import Caller

HERE = Path(__file__).parent
ROOT = "/ui"
SIGN_IN = f"{ROOT}/sign-in"
STATIC = f"{ROOT}/static"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# Styles that Plotly 4.1 sets from its script whatever it draws: nothing (its own style element, which it then fills
# rule by rule, and the colour bar's), the heatmap image's rendering, and those of maps, which its bundle brings. No
# others are allowed, and no scripts but ours: measured in Chromium. tests/browser fails where a version sets others.
PLOTLY_STYLES = (
    "'unsafe-hashes'",
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
    "'sha256-AR/cKIZjWPcPmBUPDA6oti9XBiTbJvz0Cro2J1VzzS8='",
    "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='",
)
PLOTLY_CSP = CSP.replace("style-src 'self'", " ".join(("style-src 'self'", *PLOTLY_STYLES)))
OF_PAGES = re.compile(rf"{ROOT}(?:[/?][\x21-\x7e]*)?")  # what a sign-in may lead to: nothing on another host


def page(
    request: Request, caller: Caller | None, template: str, *, status: int = 200, csp: str = CSP, **context: Any
) -> Response:
    """A page made from ``templates/<template>``. ``caller``: who sees it; None before anybody has signed in."""
    return _answer(request.url.path, caller, template, status=status, csp=csp, context=context)


def static(name: str) -> str:
    """The address of a static file, which changes with its content."""
    return f"{STATIC}/{_digest(name)}/{name}"


async def own_form(request: Request) -> None:
    """A dependency of every page: a form that a session sends must come from one of ours.

    The gate lets forms of pages through without the header that a script would send. Raises `csrf_token_wrong`.
    """
    session = request.state.caller.session if hasattr(request.state, "caller") else None
    if request.method in SAFE_METHODS or session is None:
        return
    sent = request.headers.get("x-csrf-token") or (await request.form()).get("csrf_token") or ""
    if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(), session.csrf_token.encode()):
        message = "The form is not one of this session's: open the page again, and send it from there."
        raise MergeyardError("csrf_token_wrong", message)


def page_router(prefix: str = "") -> APIRouter:
    """For routes below /ui: each checks whose form it is sent."""
    return APIRouter(prefix=f"{ROOT}{prefix}", dependencies=[Depends(own_form)], include_in_schema=False)


router = page_router("/static")


@router.get("/{digest}/{name}")
def static_file(digest: str, name: str) -> Response:
    """A file of ``static/``; kept by browsers for good where the address is that of its content."""
    path = _files().get(name)
    if path is None:
        raise MergeyardError("not_found", f"There is no static file {name[:100]!r}.")
    current = hmac.compare_digest(digest.encode(), _digest(name).encode())
    keep = "public, max-age=31536000, immutable" if current else "no-cache"
    return FileResponse(path, headers={"Cache-Control": keep})


class Pages:
    """Turns the problem documents of pages into pages, wherever they come from; who is not signed in is led there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or OF_PAGES.fullmatch(scope["path"]) is None:
            await self._app(scope, receive, send)
            return
        begun: Message | None = None
        body = b""

        async def send_page(message: Message) -> None:
            nonlocal begun, body
            if message["type"] == "http.response.start":
                if Headers(raw=message["headers"]).get("content-type") == MEDIA_TYPE:
                    begun = message
                    return
            elif begun is not None:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _failure(scope, begun, json.loads(body))(scope, receive, send)
                return
            await send(message)

        await self._app(scope, receive, send_page)


def _failure(scope: Scope, begun: Message, problem: Mapping[str, Any]) -> Response:
    path, status = scope["path"], begun["status"]
    if status == 401:
        return _lead_in(scope, problem)
    caller = scope.get("state", {}).get("caller")
    response = _answer(path, caller, "failure.html", status=status, csp=CSP, context={"problem": problem})
    kept = Headers(raw=begun["headers"])
    for name in ("x-request-id", "retry-after", "allow", "ratelimit", "ratelimit-policy"):
        if name in kept:
            response.headers[name] = kept[name]
    return response


def _lead_in(scope: Scope, problem: Mapping[str, Any]) -> Response:
    """To where one signs in, and back from there."""
    safe = scope["method"] in SAFE_METHODS
    query = scope["query_string"].decode("latin-1")
    here = (scope["path"] + (f"?{query}" if query else "")) if safe else ROOT
    if safe and Headers(scope=scope).get("sec-fetch-site") in ("cross-site", "same-site"):
        # A strict cookie is not sent where another site's link leads here. It is once the page leads to itself.
        again = HTMLResponse(_render("again.html", None, here, {"here": here}))
        again.headers.update(_headers(CSP))
        return again
    why = "" if problem["code"] == "key_required" else f"&why={problem['code']}"
    return RedirectResponse(f"{SIGN_IN}?next={quote(here, safe='')}{why}", status_code=303)


def _answer(
    path: str, caller: Caller | None, template: str, *, status: int, csp: str, context: Mapping[str, Any]
) -> Response:
    return HTMLResponse(_render(template, caller, path, context), status_code=status, headers=_headers(csp))


def _headers(csp: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": csp,
        "Referrer-Policy": "same-origin",
        "Cache-Control": "private, no-cache",
        "Vary": "Cookie",
    }


def _render(template: str, caller: Caller | None, path: str, context: Mapping[str, Any]) -> str:
    def csrf() -> Markup:
        if caller is None or caller.session is None:
            return Markup("")
        return Markup('<input type="hidden" name="csrf_token" value="{}">').format(caller.session.csrf_token)

    return (
        _templates()
        .get_template(template)
        .render(
            caller=caller,
            csrf=csrf,
            static=static,
            path=path,
            version=app.__version__,
            now=datetime.now(UTC),
            **context,
        )
    )


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _files() -> Mapping[str, Path]:
    """Ours, and Plotly's script from its wheel: nobody's code is kept here, and none of that package is imported."""
    package = find_spec("plotly")
    assert package is not None and package.origin is not None
    plotly = Path(package.origin).parent / "package_data" / "plotly.min.js"
    return {path.name: path for path in (*(HERE / "static").iterdir(), plotly)}


@cache
def _digest(name: str) -> str:
    return hashlib.sha256(_files()[name].read_bytes()).hexdigest()[:16]
