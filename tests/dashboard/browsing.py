"""A browser without scripts: cookies, redirects and forms, over httpx."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import httpx

from tests.api.serving import GuardedApi


class Browser:
    """``answer`` is the page that is open."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, follow_redirects=True)
        self.answer: httpx.Response | None = None

    def open(self, path: str, **options: Any) -> httpx.Response:
        self.answer = self.http.get(path, **options)
        return self.answer

    def send(self, path: str, **fields: str) -> httpx.Response:
        """The form with this action on the open page, its fields filled in."""
        assert self.answer is not None
        forms = Forms(self.answer.text).found
        assert path in forms, f"{path} is none of {sorted(forms)}"
        page = str(self.answer.url)
        origin = page[: page.index("/", len("https://"))]
        headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
        self.answer = self.http.post(path, data={**forms[path], **fields}, headers=headers)
        return self.answer


class Forms(HTMLParser):
    """Of a page: the hidden and filled fields of each form, by its action."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {}
        self._current: dict[str, str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form" and given.get("method") == "post":
            self._current = self.found.setdefault(given.get("action") or "", {})
        elif tag == "input" and self._current is not None and given.get("value") is not None and given.get("name"):
            self._current[given["name"] or ""] = given["value"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._current = None


def signed_in(guarded: GuardedApi, caller: str) -> Browser:
    """A browser in which somebody has given their key."""
    browser = Browser(guarded.served.url)
    browser.open("/ui")
    answer = browser.send("/ui/sign-in", key=guarded.keys[caller])
    assert answer.status_code == 200, answer.text
    return browser
