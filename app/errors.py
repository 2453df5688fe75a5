"""Every failure a user can see: one error type, a stable code, an HTTP status, a sentence that says what to do.

Codes are part of the API: they are never renamed. A new failure gets a row in ``CODES`` first.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fault = Literal["user", "system"]

MAX_MESSAGE = 2_000  # characters; messages quote what strangers wrote, which may be of any length

# The OSErrors that mean `disk_full`: no space, a quota, a file larger than the file system takes.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means: HTTP ``status``, whose ``fault`` it is, and a short ``title`` that never varies."""

    status: int
    fault: Fault
    title: str


CODES: dict[str, Code] = {
    # the recipe
    "recipe_syntax": Code(422, "user", "The recipe is not valid YAML or JSON"),
    "recipe_invalid": Code(422, "user", "The recipe does not follow the grammar"),
    "unknown_key": Code(422, "user", "The recipe has a key that does not exist"),
    "unknown_method": Code(422, "user", "The merge method does not exist"),
    "not_supported": Code(422, "user", "Valid, but not supported by this version"),
    "grid_invalid": Code(422, "user", "The grid of a sweep cannot be used"),
    "no_sources": Code(422, "user", "The recipe names nothing to merge"),
    "parameter_invalid": Code(422, "user", "A parameter's value is out of range or of the wrong type"),
    # references and files
    "reference_invalid": Code(422, "user", "A reference cannot be understood"),
    "source_not_found": Code(422, "user", "A source does not exist"),
    "path_outside_roots": Code(422, "user", "A path leads outside the model roots"),
    "hub_not_allowed": Code(422, "user", "The hub, or this repository of it, may not be used here"),
    "hub_forbidden": Code(422, "user", "The hub does not give out the repository"),
    "bucket_not_allowed": Code(422, "user", "The bucket may not be read here"),
    "source_too_large": Code(422, "user", "A source is larger than what is fetched"),
    "source_format": Code(422, "user", "A source's files are damaged or of a kind that is not accepted"),
    "pickle_refused": Code(422, "user", "Pickled weights are not accepted"),
    "adapter_unsupported": Code(422, "user", "This kind of adapter is not supported"),
    "adapter_invalid": Code(422, "user", "The adapter's files contradict each other"),
    "adapter_mismatch": Code(422, "user", "The adapter does not fit the base model"),
    "adapter_shape": Code(422, "user", "The adapter's shapes are not those of the base model"),
    "adapter_ambiguous": Code(422, "user", "The adapter fits the base model in more than one way"),
    "adapter_incomplete": Code(422, "user", "The adapter lacks tensors"),
    "adapter_leftover": Code(422, "user", "The adapter holds tensors that nothing accounts for"),
    "adapter_tied_head": Code(422, "user", "The adapter trained one half of tied embeddings"),
    "adapter_vocabulary": Code(422, "user", "The adapter's vocabulary does not fit the base model's"),
    "adapter_peft_type": Code(422, "user", "Adapters of this PEFT type cannot be merged"),
    "adapter_xlora": Code(422, "user", "X-LoRA adapters cannot be merged"),
    "adapter_alora": Code(422, "user", "Activated LoRA (aLoRA) adapters cannot be merged"),
    "adapter_arrow": Code(422, "user", "Arrow routers cannot be merged"),
    "adapter_kasa": Code(422, "user", "KaSA adapters cannot be merged"),
    "adapter_qalora": Code(422, "user", "QA-LoRA adapters cannot be merged"),
    "adapter_monteclora": Code(422, "user", "MonteCLoRA adapters cannot be merged"),
    "adapter_bdlora": Code(422, "user", "BD-LoRA adapters cannot be merged"),
    "adapter_raw_init": Code(422, "user", "The adapter belongs to a base changed by its initialisation"),
    "adapter_loftq": Code(422, "user", "LoftQ adapters cannot be merged"),
    "adapter_layer_replication": Code(422, "user", "The adapter belongs to a model with replicated layers"),
    "adapter_grouped_conv": Code(422, "user", "Adapters on grouped convolutions cannot be merged"),
    "model_quantized": Code(422, "user", "Packed or quantised weights cannot be merged"),
    "task_invalid": Code(422, "user", "A task file cannot be used"),
    "task_too_long": Code(422, "user", "A task's prompt is longer than the model's context"),
    "chat_template_missing": Code(422, "user", "The tokenizer has no chat template"),
    "tokenizer_invalid": Code(422, "user", "A tokenizer's files are damaged or contradict each other"),
    "tokenizer_unsupported": Code(422, "user", "This kind of tokenizer is not supported"),
    "tokenizer_mismatch": Code(422, "user", "The tokenizers do not fit together"),
    "token_not_found": Code(422, "user", "A model has no such token"),
    "model_mismatch": Code(422, "user", "The model does not fit the base model"),
    "module_unknown": Code(422, "user", "The checkpoint has no module of this name"),
    "source_changed": Code(409, "user", "A source changed after the merge was planned"),
    "source_not_finite": Code(422, "user", "A source holds NaN or infinity"),
    "result_not_finite": Code(422, "user", "The merge produced NaN or infinity"),
    "lora_cannot_hold": Code(422, "user", "A LoRA adapter cannot hold what the merge changes"),
    "energy_too_low": Code(422, "user", "An adapter of this rank holds too little of the merge"),
    # access
    "key_required": Code(401, "user", "A key is needed"),
    "key_invalid": Code(401, "user", "The key is not known"),
    "key_expired": Code(401, "user", "The key has expired"),
    "key_revoked": Code(401, "user", "The key was revoked"),
    "scope_merge_required": Code(403, "user", "The key lacks the scope merge"),
    "scope_read_required": Code(403, "user", "The key lacks the scope read"),
    "scope_metrics_required": Code(403, "user", "The key lacks the scope metrics"),
    "scope_admin_required": Code(403, "user", "The key lacks the scope admin"),
    "origin_refused": Code(403, "user", "A page of another site sent the request"),
    "csrf_token_wrong": Code(403, "user", "The session's CSRF token is missing or wrong"),
    "session_ended": Code(401, "user", "The session has ended"),
    "rate_limited": Code(429, "user", "Too many requests"),
    "too_many_streams": Code(429, "user", "Too many event streams are open"),
    "too_many_jobs": Code(429, "user", "Too many unfinished merges"),
    "over_quota": Code(413, "user", "The quota leaves no room for this"),
    # requests
    "request_invalid": Code(422, "user", "The request is not valid"),
    "body_too_large": Code(413, "user", "The request body is too large"),
    "unsupported_media_type": Code(415, "user", "The content type is not accepted"),
    "not_found": Code(404, "user", "Not found"),
    "method_not_allowed": Code(405, "user", "The method is not allowed here"),
    "conflict": Code(409, "user", "Its state does not allow this"),
    "merge_in_use": Code(409, "user", "Something still needs the merge"),
    "webhook_refused": Code(422, "user", "The webhook's URL is not accepted"),
    "idempotency_mismatch": Code(422, "user", "The Idempotency-Key was used for another request"),
    "range_not_satisfiable": Code(416, "user", "The range cannot be satisfied"),
    "output_exists": Code(409, "user", "The output folder already exists"),
    "digest_mismatch": Code(422, "user", "The bytes do not have the digest they should have"),
    # the system
    "cancelled": Code(409, "user", "The merge was cancelled"),
    "worker_lost": Code(500, "system", "The worker stopped and no attempt was left"),
    "busy": Code(503, "system", "The service has too much to do"),
    "storage_full": Code(507, "system", "The service has no room left for this"),
    "disk_full": Code(507, "system", "There is not enough disk space"),
    "out_of_memory": Code(507, "system", "There is not enough memory"),
    "hub_unavailable": Code(503, "system", "The hub cannot be reached"),
    "bucket_unavailable": Code(503, "system", "A bucket cannot be reached"),
    "store_unavailable": Code(503, "system", "The artifact store cannot be reached"),
    "broker_unavailable": Code(503, "system", "The queue cannot be reached"),
    "database_unavailable": Code(503, "system", "The database cannot be reached"),
    "streams_exhausted": Code(503, "system", "No event stream is free"),
    "not_ready": Code(503, "system", "The service is not ready"),
    "internal": Code(500, "system", "Something went wrong inside Mergeyard"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: ``code``, a sentence saying what and what to do, and ``where`` it is.

    ``where`` is a place in the recipe (``models[1].parameters.density``), or empty when no place applies. A message
    may quote anything: it is cut at MAX_MESSAGE characters, and names of files that are no text are escaped.
    """

    code: str
    message: str
    where: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"no row in CODES for {self.code!r}")
        text = self.message if len(self.message) <= MAX_MESSAGE else f"{self.message[: MAX_MESSAGE - 1]}…"
        object.__setattr__(self, "message", text.encode(errors="backslashreplace").decode())

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "where": self.where}


class MergeyardError(Exception):
    """A user-facing failure made of one or more problems; the first one names the code and the status.

    ``headers``: what its HTTP answer has besides, for clients that do not read problem documents.
    """

    def __init__(self, code: str, message: str, *, where: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem(code=code, message=message, where=where),)
        self.headers: Mapping[str, str] = headers or {}
        super().__init__(self.message)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> MergeyardError:
        """Raise-able form of several problems at once. ``problems`` must not be empty."""
        first = problems[0]
        error = cls(first.code, first.message, where=first.where)
        error.problems = tuple(problems)
        return error

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def message(self) -> str:
        return self.problems[0].message

    @property
    def where(self) -> str:
        return self.problems[0].where

    @property
    def status(self) -> int:
        return CODES[self.code].status

    @property
    def fault(self) -> Fault:
        return CODES[self.code].fault

    @property
    def title(self) -> str:
        return CODES[self.code].title
