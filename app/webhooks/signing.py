"""Signatures by Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks, v1: HMAC-SHA256).

The deployment has one secret, and each owner's is derived from it: whoever can check the signatures of their own
webhooks can forge nobody else's, and no secret has to be stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from standardwebhooks.webhooks import Webhook

SECRET = re.compile(r"whsec_([A-Za-z0-9+/]+={0,2})", re.ASCII)
LEAST_BYTES, MOST_BYTES = 24, 64  # what the specification asks of a secret


def read_secrets(text: str) -> tuple[bytes, ...]:
    """The deployment's secrets, of which the first is the current one. ValueError for what is none."""
    found = []
    for part in text.split():
        match = SECRET.fullmatch(part)
        try:
            secret = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            secret = b""
        if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
            raise ValueError(f"a webhook secret is whsec_ and {LEAST_BYTES} to {MOST_BYTES} bytes of base64")
        found.append(secret)
    return tuple(found)


def owners_secret(deployment: bytes, owner: str) -> str:
    """What ``owner`` checks signatures with."""
    derived = hmac.new(deployment, f"mergeyard webhooks of {owner}".encode(), hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(derived).decode()


def signed_headers(deployment: Sequence[bytes], owner: str, message: str, at: datetime, body: str) -> Mapping[str, str]:
    """The headers of an attempt at ``at``, with a signature by each secret: a receiver may still have the old one."""
    signatures = [Webhook(owners_secret(secret, owner)).sign(message, at, body) for secret in deployment]
    return {
        "webhook-id": message,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
