"""Signatures are those of Standard Webhooks."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest
from standardwebhooks.webhooks import Webhook

from app.webhooks import signing
from app.webhooks.signing import owners_secret, read_secrets, signed_headers

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def test_the_specifications_example_has_the_specifications_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    monkeypatch.setattr(signing, "owners_secret", lambda *_: secret)
    at = datetime.fromtimestamp(1614265330, UTC)
    found = signed_headers([b""], "me", "msg_p5jXN8AQM9LWM0D4loKWxJek", at, '{"test": 2432232314}')
    assert found == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_while_a_secret_is_replaced_receivers_of_both_can_check() -> None:
    headers = dict(signed_headers([NEW, OLD], "me", "msg_1", datetime.now(UTC), "{}"))
    for secret in (NEW, OLD):
        Webhook(owners_secret(secret, "me")).verify("{}", headers)


def test_no_owner_can_sign_for_another() -> None:
    assert owners_secret(OLD, "alice") != owners_secret(OLD, "bob")
    assert len(base64.b64decode(owners_secret(OLD, "alice").removeprefix("whsec_"))) == 32


@pytest.mark.parametrize("text", ["whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_!!!!", "x"])
def test_what_is_no_secret_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whsec_"):
        read_secrets(text)


def test_several_secrets_are_read_in_order() -> None:
    texts = ["whsec_" + base64.b64encode(secret).decode() for secret in (NEW, OLD)]
    assert read_secrets(" ".join(texts)) == (NEW, OLD)
