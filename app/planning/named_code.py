"""What makes a loader run code that a model's files name: it is left out of everything that a merge writes.

Loaders ask before they follow `auto_map`, and have been talked into not asking (CVE-2025-66448: vLLM followed the one
inside ``vision_config``). The code itself never comes in, so nothing of use is lost.
"""

from __future__ import annotations

from typing import Any

KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
# A name here is one of the library's own; with a slash in it, a repository whose kernels are fetched and run.
IMPLEMENTATIONS = frozenset({"attn_implementation", "experts_implementation"})
OWN_MODULES = "sentence_transformers."


def without_code(value: Any) -> Any:
    """A config, or a part of one, without what names code, at any depth."""
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if not _names_code(key, item)}
    if isinstance(value, list):
        return [without_code(item) for item in value]
    return value


def imports_code(modules: Any) -> bool:
    """Whether sentence-transformers' ``modules.json`` names classes to import from anywhere but that library."""
    return not isinstance(modules, list) or not all(
        isinstance(module, dict) and str(module.get("type")).startswith(OWN_MODULES) for module in modules
    )


def _names_code(key: str, item: Any) -> bool:
    if key.removeprefix("_").removesuffix("_internal") in IMPLEMENTATIONS:
        return any("/" in str(name) for name in (item.values() if isinstance(item, dict) else [item]))
    return key in KEYS
