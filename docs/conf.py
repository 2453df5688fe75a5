"""The site made from these pages: `make docs`. Nothing is loaded from elsewhere, and every warning is an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import app
from docs.reference import reference

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "Mergeyard"
version = release = app.__version__
copyright = "the Mergeyard authors"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = True
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Mergeyard {release}"
html_theme_options = {"top_of_page_buttons": []}
html_show_sphinx = False
html_copy_source = False

GENERATED = Path(__file__).parent / "reference.md"


def setup(sphinx: Sphinx) -> None:  # noqa: ARG001 (Sphinx hands itself over)
    """Every endpoint, from the OpenAPI document of the code that is there."""
    text = reference()
    if not GENERATED.exists() or GENERATED.read_text() != text:
        GENERATED.write_text(text)
