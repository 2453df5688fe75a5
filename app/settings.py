"""Settings: ``MERGEYARD_*`` environment variables, read once by whoever starts a process and passed on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

S3_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[\w./-]*))?", re.ASCII)


class Settings(BaseSettings):
    """One frozen value; the defaults are the embedded size (SQLite, a Valkey on a Unix socket, local files)."""

    model_config = SettingsConfigDict(env_prefix="MERGEYARD_", frozen=True, extra="ignore")

    data_dir: Path = Field(Path("mergeyard-data"), description="Folder for everything the service keeps")
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in the data folder")
    database_seconds: float = Field(10.0, ge=0.5, description="How long PostgreSQL may take to answer one statement")
    broker_url: str = Field("", description="Redis or Valkey URL; empty: a Valkey socket in the data folder")
    artifact_store: str = Field(
        "", description="Of the published artifacts: a folder, or s3://BUCKET/PREFIX; empty: in the data folder"
    )
    s3_endpoint: str = Field("", description="Where buckets are asked for; empty: AWS, or what AWS_ENDPOINT_URL says")
    s3_region: str = Field("", description="Of the buckets; empty: what AWS_REGION says")
    s3_access_key_id: str = Field("", description="Empty: AWS's own variables, or the role of the machine")
    s3_secret_access_key: str = Field("", repr=False, description="Beside it")
    s3_sources: str = Field("", description="What `s3:` may name: s3://BUCKET/PREFIX, …; empty: no bucket is read")
    s3_downloads: Literal["stream", "redirect"] = Field(
        "stream", description="Bytes through the API, or a redirect to a signed URL of the bucket"
    )
    accel_redirect: str = Field("", description="nginx's internal location of the store's folder; empty: there is none")
    model_roots: str = Field("", description="Colon-separated folders that `models:` references may name")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, description="Threads of one merge; 0: every core")
    lease_seconds: float = Field(60.0, gt=0, description="How long a silent worker keeps its job")
    max_attempts: int = Field(3, ge=1)
    retry_seconds: float = Field(5.0, ge=0, description="Wait before the second attempt; doubles each time, to 5 min")
    stalled_seconds: float = Field(3600.0, gt=0, description="How long a living worker keeps a job that does not move")
    deaf_seconds: float = Field(120.0, gt=0, description="How long a worker idles beside waiting jobs before it ends")
    janitor_seconds: float = Field(0.0, ge=0, description="Between janitor rounds; 0: half a lease, at most 10 s")
    max_body_bytes: int = Field(2_000_000, ge=1000, description="Largest recipe or envelope accepted")
    max_upload_bytes: int = Field(20_000_000_000, ge=1)
    quota_bytes: int | None = Field(None, ge=0, description="What artifacts, uploads and unfinished merges may take")
    quota_bytes_per_owner: int | None = Field(None, ge=0, description="The same of each owner")
    max_jobs_per_owner: int | None = Field(None, ge=0, description="Merges of one owner that have not finished")
    min_free_bytes: int = Field(100_000_000, ge=0, description="Of the disks of artifacts and uploads, never taken")
    room_seconds: float = Field(30.0, gt=0, description="Between two looks whether a merge has room in the store")
    plans_at_once: int = Field(8, ge=1, description="Recipes that one API process plans at the same time")
    plan_wait_seconds: float = Field(10.0, gt=0, description="How long a recipe waits for its turn to be planned")
    rate_requests: int = Field(1200, ge=0, description="Requests a minute with one key; 0: no limit")
    rate_writes: int = Field(240, ge=0, description="Of these, what is not GET or HEAD; 0: no limit")
    rate_failures: int = Field(30, ge=0, description="Wrong keys a minute from one address; 0: no limit")
    max_streams: int = Field(2000, ge=0, description="Event streams open at once in one API process")
    max_streams_per_key: int = Field(100, ge=0, description="Of these, with one key; without keys, from one address")
    hub_endpoint: str = Field("https://huggingface.co", description="Where `hf:` references are looked up")
    hub_token: str = Field("", repr=False, description="For repositories there that are not for everybody")
    hub_repositories: str = Field("", description="What `hf:` may name: ORG/NAME, ORG/*, *; empty: no hub is asked")
    hub_cache: Path | None = Field(None, description="Folder of what is fetched from there; empty: in the data folder")
    hub_max_bytes: int = Field(500_000_000_000, ge=0, description="Of weights, fetched for one reference")
    webhook_hosts: str = Field("", description="Hosts that webhooks may be sent to; empty: none are")
    webhook_private_hosts: str = Field("", description="Such hosts that may have addresses of private networks")
    webhook_secret: str = Field(
        "", repr=False, description="whsec_…; more than one, with spaces between: the new first"
    )
    session_hours: float = Field(12.0, gt=0, le=24 * 30, description="How long a page stays signed in")
    retention_seconds: int | None = Field(None, ge=1, description="Life of a merge without `expires_in`; empty: no end")
    queue: str = Field("default", description="The queue this worker serves")
    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON lines")

    @field_validator("artifact_store")
    @classmethod
    def _a_store(cls, value: str) -> str:
        if "://" in value and not S3_URL.fullmatch(value):
            raise ValueError("a folder is wanted, or s3://BUCKET/PREFIX")
        return value

    @field_validator("hub_endpoint", "s3_endpoint")
    @classmethod
    def _an_address(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name == "s3_endpoint":
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query:
            raise ValueError("an http:// or https:// address without user and query is wanted")
        return value.rstrip("/")

    @field_validator("accel_redirect")
    @classmethod
    def _a_location(cls, value: str) -> str:
        if value and not re.fullmatch(r"/([\w.-]+/)+", value, re.ASCII):
            raise ValueError("a location of nginx begins and ends with /, as in /_artifacts/")
        return value

    @field_validator("webhook_hosts", "webhook_private_hosts")
    @classmethod
    def _hosts(cls, value: str) -> str:
        from app.webhooks.outbound import Allowed  # noqa: PLC0415 (its import is what a client's command would wait for)

        if value:
            Allowed.read(value, "")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _secrets(cls, value: str) -> str:
        from app.webhooks.signing import read_secrets  # noqa: PLC0415

        if value:
            read_secrets(value)
        return value

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if (self.webhook_hosts or self.webhook_private_hosts) and not self.webhook_secret:
            raise ValueError("webhooks are signed: MERGEYARD_WEBHOOK_SECRET is missing")
        return self

    @model_validator(mode="after")
    def _one_way_out(self) -> Self:
        if self.accel_redirect and self.bucket is not None:
            raise ValueError("MERGEYARD_ACCEL_REDIRECT is for a store that is a folder")
        return self

    @property
    def root(self) -> Path:
        return self.data_dir.absolute()

    @property
    def database(self) -> str:
        """A folder may have any name: what means something in a URL is quoted."""
        if self.database_url:
            return self.database_url
        from sqlalchemy.engine import URL  # noqa: PLC0415 (its import is what a client's command would wait for)

        return URL.create("sqlite", database=str(self.root / "mergeyard.sqlite3")).render_as_string()

    @property
    def broker(self) -> str:
        return self.broker_url or f"redis+socket://{self.root / 'valkey.sock'}"

    @property
    def bucket(self) -> tuple[str, str] | None:
        """The bucket of the artifacts, and the prefix in it; None where they are in a folder."""
        found = S3_URL.fullmatch(self.artifact_store)
        return None if found is None else (found["bucket"], (found["prefix"] or "").strip("/"))

    @property
    def artifacts(self) -> Path:
        """The folder of the artifacts, where they are in one."""
        return Path(self.artifact_store) if self.artifact_store else self.root / "artifacts"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    @property
    def digests(self) -> Path:
        """What the files of sources hash to, from merge to merge."""
        return self.root / "digests"

    @property
    def hub_files(self) -> Path:
        """What was fetched from the hub."""
        return self.hub_cache or self.root / "hub"

    @property
    def roots(self) -> tuple[Path, ...]:
        return tuple(Path(part) for part in self.model_roots.split(":") if part)

    @property
    def janitor_interval(self) -> float:
        return self.janitor_seconds or min(10.0, self.lease_seconds / 2)
