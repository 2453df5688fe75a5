"""/session: a cookie for pages, made from a key. A page cannot keep a key safe from its scripts; such a cookie is."""

from __future__ import annotations

from datetime import datetime, timedelta

from fastapi import APIRouter, Request, Response
from pydantic import Field

from app.api.answers import SET_COOKIE
from app.api.callers import Known, cookie_name
from app.api.schemas import Document
from app.api.service import Service, Serving
from app.errors import MergeyardError
from app.records.key import Caller, Scope, Session

router = APIRouter(prefix="/session", tags=["session"])


class SessionDocument(Document):
    """Who calls. ``expires_at`` and ``csrf_token`` are a session's; ``key_id`` is null while there are no keys."""

    owner: str
    key_id: str | None
    scopes: list[Scope]
    expires_at: datetime | None
    csrf_token: str | None = Field(description="Send it as X-CSRF-Token beside the cookie")

    @classmethod
    def of(cls, caller: Caller, session: Session | None) -> SessionDocument:
        return cls(
            owner=caller.owner,
            key_id=caller.key_id,
            scopes=sorted(caller.scopes),
            expires_at=None if session is None else session.expires_at,
            csrf_token=None if session is None else session.csrf_token,
        )


@router.post(
    "",
    status_code=201,
    response_model=SessionDocument,
    summary="Sign in",
    responses={201: {"headers": {"Set-Cookie": SET_COOKIE}}},
)
def open_session(caller: Known, serving: Serving, request: Request, response: Response) -> SessionDocument:
    """Send a key as Bearer; the answer sets a cookie with the same rights. With the cookie, whatever is not GET or HEAD
    needs the answer's `csrf_token` as `X-CSRF-Token`. It ends by time, by DELETE, or with its key.
    """
    if caller.key_id is None or caller.session is not None:
        message = "A session is made from a key: send one as `Authorization: Bearer mrg_…`."
        raise MergeyardError("key_required", message, where="header.Authorization")
    return SessionDocument.of(caller, start_session(serving, caller, request, response))


@router.get("", response_model=SessionDocument, summary="Who am I?")
def get_session(caller: Known, response: Response) -> SessionDocument:
    """The owner and scopes of the key or the session that is sent; of a session its `csrf_token`, too."""
    response.headers["Cache-Control"] = "no-store"
    return SessionDocument.of(caller, caller.session)


@router.delete("", status_code=204, response_class=Response, summary="Sign out")
def close_session(caller: Known, serving: Serving, request: Request) -> Response:
    """Ends the cookie's session. Without one there is nothing to end."""
    if caller.session is not None:
        serving.sessions.close(caller.session, by=caller)
    signed_out = Response(status_code=204)
    forget_cookie(request, signed_out)
    return signed_out


def start_session(serving: Service, caller: Caller, request: Request, response: Response) -> Session:
    """A session made from the caller's key; the response sets its cookie."""
    session = serving.sessions.open(timedelta(hours=serving.settings.session_hours), by=caller)
    response.set_cookie(
        cookie_name(request.url.scheme),
        session.text,
        expires=session.expires_at,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",  # also not for a link from elsewhere: such a page asks again, from its own origin
    )
    response.headers["Cache-Control"] = "no-store"
    return session


def forget_cookie(request: Request, response: Response) -> None:
    """The response makes a browser forget its session."""
    response.delete_cookie(
        cookie_name(request.url.scheme),
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
