"""/docs: the OpenAPI document as a page whose examples run, by curl or by a button.

Our own and not Swagger UI, which FastAPI loads from another company's server: this page works without a network, and no
foreign script ever runs where the service can be reached.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre, textarea { background: #f4f4f4; padding: .7rem; overflow: auto; font: 14px/1.4 ui-monospace, monospace; }
textarea { width: 100%; box-sizing: border-box; border: 0; } section { border-top: 1px solid #ddd; margin-top: 2rem; }
code, .method { font-family: ui-monospace, monospace; } .method { color: #06c; } td { padding-right: 1.5rem; }
"""

SCRIPT = """
const suggested = {path: "config.json", namespace: "merges", revision: "main"};
for (const form of document.forms) form.onsubmit = async (event) => {
  event.preventDefault();
  const {method, path, type} = form.dataset, answer = form.querySelector("output pre");
  let target = path;
  for (const [part, name] of path.matchAll(/{(.*?)}/g)) {
    const value = prompt(name, suggested[name] || "");
    if (value === null) return;
    target = target.replace(part, name === "path" ? value : encodeURIComponent(value));
  }
  const body = form.body && form.body.value, headers = body ? {"Content-Type": type} : {};
  const key = document.getElementById("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(target, {method, headers, body: body || undefined});
  const kind = response.headers.get("content-type") || "";
  const size = response.headers.get("content-length") || "";
  const text = /json|text/.test(kind) ? await response.text() : `${kind} ${size}`;
  let shown = text;
  try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { }
  answer.textContent = `${response.status} ${response.statusText}\\n${shown}`;
};
"""

# What stands in commands for the parts of a path; a hub client's repository is a merge at its only revision.
PLACES = {
    "id": "$ID",
    "path": "$FILE",
    "alias": "$ALIAS",
    "namespace": "merges",
    "name": "$ID",
    "revision": "main",
}

# Kept in the field alone: nothing that other scripts of this origin could read later.
KEY_FIELD = (
    '<p><label>Key, where the service has keys: <input id="key" type="password" autocomplete="off"></label> '
    'Commands take it as <code>-H "authorization: Bearer $MERGEYARD_API_KEY"</code>.</p>'
)

router = APIRouter(include_in_schema=False)


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """Every endpoint with its parameters and examples."""
    page = render(request.app.openapi(), str(request.base_url).rstrip("/"))
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


def render(document: Mapping[str, Any], base_url: str) -> str:
    """The page of an OpenAPI document; commands in it call ``base_url``."""
    info = document["info"]
    sections = "".join(
        _operation(path, method, operation, base_url)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API</title>'
        f"<style>{STYLE}</style><h1>{escape(info['title'])} API {escape(info['version'])}</h1>"
        f'<p>{escape(info["description"])} <a href="openapi.json">openapi.json</a></p>'
        f"{KEY_FIELD}"
        f"{sections}<script>{SCRIPT}</script></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any], base_url: str) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(parameter['name'])}</code><td>{escape(parameter['in'])}"
        f"<td>{escape(parameter.get('description', ''))}"
        for parameter in operation.get("parameters", [])
    )
    answers = ", ".join(f"{status} {answer['description']}" for status, answer in operation["responses"].items())
    examples = "".join(
        _example(path, method, media_type, title, text, curl(path, method, base_url, media_type, text))
        for media_type, title, text in _bodies(operation.get("requestBody", {}))
    )
    return (
        f'<section id="{escape(operation["operationId"])}"><h2><span class="method">{method.upper()}</span> '
        f"<code>{escape(path)}</code></h2><p><b>{escape(operation['summary'])}.</b> "
        f"{escape(operation.get('description', ''))}</p><table>{rows}</table>{examples}"
        f"<p>Answers: {escape(answers)}</p></section>"
    )


def _bodies(request_body: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(media type, title, text) of every way to send an operation's body; one without a body where it takes none."""
    for media_type, content in request_body.get("content", {"": {}}).items():
        if media_type == "multipart/form-data":
            yield media_type, "Files", ""
        for example in content.get("examples", {}).values():
            value = example["value"]
            yield media_type, example["summary"], value if isinstance(value, str) else json.dumps(value, indent=2)
        if not media_type:
            yield "", "", ""


def _example(path: str, method: str, media_type: str, title: str, text: str, command: str) -> str:
    form = ""
    if media_type != "multipart/form-data":  # a page cannot name files
        area = f'<textarea name="body" rows="{text.count(chr(10)) + 2}">{escape(text)}</textarea>' if text else ""
        form = (
            f'<form data-method="{method.upper()}" data-path="{escape(path.lstrip("/"))}" data-type="{media_type}">'
            f"{area}<button>Run</button><output><pre></pre></output></form>"
        )
    return f"<p>{escape(title)}</p><pre>{escape(command)}</pre>{form}"


def curl(path: str, method: str, base_url: str, media_type: str, text: str) -> str:
    """The command that sends an example. ``$ID``, ``$FILE``, ``$ALIAS`` are the reader's."""
    for name, value in PLACES.items():
        path = path.replace(f"{{{name}}}", value)
    url = base_url + path
    if media_type == "multipart/form-data":
        return f'curl {url} -F "files=@adapter_config.json" -F "files=@adapter_model.safetensors"'
    option = {"get": "", "head": "-I "}.get(method, f"-X {method.upper()} ")
    if text:
        option = "" if method == "post" else option
        return f"curl {option}{url} -H 'content-type: {media_type}' --data-binary {shlex.quote(text)}"
    return f"curl {option}{url}"
