"""Who may ask: API keys, each an owner that sees its own jobs; without keys, this machine only."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Forbidden, Unauthorized
from app.limits import Limits

LOCAL_OWNER = "local"
_HASHED_KEY = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `owner` of what is submitted, and whose jobs are seen (None: everyone's)."""

    owner: str
    sees: str | None


class ApiKeys:
    """The keys the service knows, as sha256 digests; the keys themselves are not kept.

    A key may be given as itself or as ``sha256:`` and its digest in hex. Its owner's name is
    derived from the digest, so either spelling names the same owner.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(dict.fromkeys(_digest_of(key) for key in keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner_of(self, key: str) -> str | None:
        """Return the owner whose key this is; takes as long for a wrong key as for a right one."""
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known
        return None if found is None else f"key-{found.hex()[:16]}"


def _digest_of(key: str) -> bytes:
    hashed = _HASHED_KEY.fullmatch(key)
    return bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(key.encode()).digest()


_bearer = HTTPBearer(
    auto_error=False, description="An API key of the service, where PISSA_API_KEYS is set."
)


async def authorize(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """Return who asks.

    Raises:
        Unauthorized: keys are set and the request brings none of them.
        Forbidden: no keys are set and the request does not come from this machine.
        TooManyRequests: more than the operator allows.
    """
    keys: ApiKeys = request.app.state.api_keys
    limits: Limits = request.app.state.limits
    if not keys:
        _check_local(request)
        return Caller(LOCAL_OWNER, None)
    owner = None if credentials is None else keys.owner_of(credentials.credentials)
    if owner is None:
        limits.count_wrong_key(request.client.host if request.client else "")
        raise _unauthorized(credentials)
    limits.count_request(owner)
    return Caller(owner, owner)


Asking = Annotated[Caller, Depends(authorize)]


def _unauthorized(credentials: HTTPAuthorizationCredentials | None) -> Unauthorized:
    if credentials is None:
        return Unauthorized(
            "this service needs an API key", hint="send the header Authorization: Bearer KEY"
        )
    return Unauthorized("the API key is not one of this service's")


def _check_local(request: Request) -> None:
    """Refuse what does not come from this machine, or from another web page on it.

    Without keys anyone who reaches the socket is the owner. So it must be a loopback one; and
    the names the browser gives must be loopback too, or any page on the web could have its
    visitor's browser submit jobs here (by a form, or by a name that resolves to 127.0.0.1).
    """
    server = (request.scope.get("server") or ("localhost",))[0]
    host = request.headers.get("host", "")
    if not (server.startswith("/") or is_loopback(server)) or not is_loopback(_name_in(host)):
        raise Forbidden(
            "without API keys this service answers only to this machine, under a loopback name",
            hint="set PISSA_API_KEYS to open it to others",
        )
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(
            "without API keys this service answers only to its own web page",
            hint="set PISSA_API_KEYS to call it from another page",
        )


def _name_in(host: str) -> str:
    """Return the host in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(name: str) -> bool:
    """Say whether a host name or address means this machine itself."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
