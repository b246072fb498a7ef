"""What a token may do, read from the Hub's answer about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def may_create(who: Mapping[str, Any], owner: str) -> bool:
    """Say, from the Hub's answer about a token, whether it may make repos for a user or org."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return False
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        return any(
            _is(scope.get("entity") or {}, owner) and "repo.write" in scope.get("permissions", ())
            for scope in scopes
        )
    if _is(who, owner):
        return True
    org = next((org for org in who.get("orgs") or () if _is(org, owner)), None)
    return org is not None and org.get("roleInOrg") not in ("read", "no_access")


def _is(entity: Mapping[str, Any], name: str) -> bool:
    return str(entity.get("name", "")).lower() == name.lower()
