"""``rank_pattern`` and ``alpha_pattern``: what an adapter's config says of one module, matched as PEFT matches it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import regex

from app.errors import MergeyardError
from app.sources.source import Scaling

MAX_PATTERNS = 1_000
MAX_PATTERN_LENGTH = 200
PATTERN_SECONDS = 1.5  # of computing, for all patterns and names together: a regular expression may never end
MAX_REPEATS = 100  # of counts multiplied, as they are where one lies in another: compiling writes them out
PLAIN = re.compile(r"[\w.]+")
ESCAPED = re.compile(r"\\.", re.DOTALL)
BRACES = re.compile(r"\{([^{}]*)\}?")
COUNT = re.compile(r"(\d{1,3})?(,(\d{1,3})?)?")
OTHER_GROUPS = re.compile(r"\(\?(?!:|=|!|<=|<!)")  # recursion, conditions, flags, and what only one library has
MAX_VALUE = 1e9  # of a rank or an alpha
ADALORA_EPSILON = 1e-5  # PEFT divides by the rank and this


class Patterns:
    """The patterns of one adapter, compiled once: the first key wins that ends a name as PEFT matches it."""

    def __init__(self, config: Mapping[str, Any], reference: str) -> None:
        """Raises MergeyardError `adapter_invalid` where a pattern is none."""
        self._config, self._reference = config, reference
        self._seconds = PATTERN_SECONDS
        self._adalora = is_adalora(config)
        # AdaLoRA's rank_pattern holds the ranks that were kept, by module, and is no pattern
        patterns = ("alpha_pattern",) if self._adalora else ("rank_pattern", "alpha_pattern")
        self._found = {field: self._compile(field, config.get(field) or {}) for field in patterns}

    def scaling(self, name: str, *, saved_rank_count: bool = False) -> Scaling:
        """Rank and scale of the module ``name`` (or the parameter, with ``target_parameters``).

        s = alpha/r, or alpha/√r with ``use_rslora``; AdaLoRA's alpha is divided by its first rank + 1e-5, or by the
        count that was saved (``saved_rank_count``). Raises MergeyardError `adapter_invalid`.
        """
        if self._adalora:
            rank = self._positive("init_r", name, self._config.get("init_r", 12))
            alpha = self._positive("alpha", name, self._config.get("lora_alpha", 8))
            return Scaling(rank=rank, scale=alpha if saved_rank_count else alpha / (rank + ADALORA_EPSILON))
        rank = self._positive("rank", name, self._value("rank_pattern", name, self._config.get("r", 8)))
        alpha = self._positive("alpha", name, self._value("alpha_pattern", name, self._config.get("lora_alpha", 8)))
        return Scaling(rank=rank, scale=alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)

    def _value(self, field: str, module: str, default: Any) -> Any:
        for pattern, ending, value in self._found[field]:
            if module.endswith(ending) and self._matches(pattern, module):
                return value
        return default

    def _positive(self, what: str, module: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_VALUE:
            raise self._invalid(f"{what} of {module} is not a positive number")
        return float(value)

    def _compile(self, field: str, patterns: Any) -> list[tuple[regex.Pattern[str], str, Any]]:
        """Each pattern, and what every name that it matches ends with: most names are told apart by that."""
        if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
            raise self._invalid(f"{field} is not a map of at most {MAX_PATTERNS} module names")
        compiled = []
        for key, value in patterns.items():
            started = time.thread_time()
            if not _bounded(key):
                raise self._invalid(f"the {field} key {key[:60]!r} is not a plain pattern of module names")
            try:
                ending = key.rpartition(".")[2] if PLAIN.fullmatch(key) else ""
                compiled.append((regex.compile(rf"(.*\.)?({key})$"), ending, value))
            except (regex.error, RecursionError, OverflowError):
                raise self._invalid(f"the {field} key {key[:60]!r} is not a pattern of module names") from None
            self._seconds -= time.thread_time() - started
            if self._seconds < 0:
                raise self._invalid(f"the patterns of {field} take too long to read")
        return compiled

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        started = time.thread_time()
        try:
            return pattern.match(module, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError:
            raise self._invalid(f"the pattern {pattern.pattern[:60]!r} takes too long to match") from None
        finally:
            self._seconds -= time.thread_time() - started

    def _invalid(self, what: str) -> MergeyardError:
        return MergeyardError("adapter_invalid", f"{self._reference}: {what}.")


def _bounded(pattern: str) -> bool:
    """Whether a pattern takes little memory, to compile and to match: no time limit guards that.

    ``((a?){99999}){99999}`` would take all there is, and so would recursion, which PEFT's own ``re`` does not have.
    """
    plain = ESCAPED.sub("", pattern)
    if len(pattern) > MAX_PATTERN_LENGTH or OTHER_GROUPS.search(plain):
        return False
    repeats = 1
    for braces in BRACES.finditer(plain):
        count = COUNT.fullmatch(braces[1])
        if count is None or not braces[0].endswith("}"):
            return False
        repeats *= max(1, *(int(number) for number in (count[1], count[3]) if number), 1)
    return repeats <= MAX_REPEATS


def is_adalora(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type") or "").upper() == "ADALORA"
