"""A real Chromium, and a yard for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.chromium import PATIENCE, Chromium, executable
from tests.browser.yard import Yard, opened


@pytest.fixture(scope="module")
def started_browser() -> Iterator[Browser]:
    """Ends with the module: Playwright's event loop, while it lives, is that of every test in this process."""
    path = executable()
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def chromium(started_browser: Browser) -> Iterator[Chromium]:
    """Fails the test where a page had an error, a warning or a violation of its policy."""
    made = Chromium(started_browser)
    yield made
    made.close()
    assert not made.wrong, made.wrong


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Yard]:
    with opened(tmp_path_factory.mktemp("yard"), sqlite_template) as made:
        yield made
