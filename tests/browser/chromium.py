"""Debian's Chromium, driven by Playwright: pages that may not write an error to their console, and what axe finds."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

PATIENCE = 30_000.0  # milliseconds: a busy machine's
SCREENSHOTS = "MERGEYARD_TEST_SCREENSHOTS"  # a folder that keeps them; else they are not kept


@dataclass
class Chromium:
    browser: Browser
    wrong: list[str] = field(default_factory=list)

    def page(self, **options: Any) -> Page:
        """A page of a context of its own. What is wrong on it goes into ``wrong``."""
        page = self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        return page

    def screenshot(self, page: Page, name: str) -> None:
        if folder := os.environ.get(SCREENSHOTS):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def close(self) -> None:
        for context in self.browser.contexts:
            context.close()

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") or "Content Security Policy" in text:
            self.wrong.append(text)


def check_accessible(page: Page) -> None:
    """Nothing that axe calls serious or critical."""
    found = Axe().run(page).response["violations"]
    serious = [
        f"{item['id']}: {item['help']}: {[node['html'][:200] for node in item['nodes'][:3]]}"
        for item in found
        if item["impact"] in ("serious", "critical")
    ]
    assert not serious, "\n".join(serious)


def executable() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
