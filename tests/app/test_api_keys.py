"""API keys: which owner a key names, in which spelling."""

from __future__ import annotations

import hashlib

import pytest

from app.auth import ApiKeys, is_loopback


def test_no_keys_are_false():
    assert not ApiKeys([])
    assert ApiKeys(["secret-one"])


def test_a_key_names_its_own_owner_and_no_other():
    keys = ApiKeys(["secret-one", "secret-two"])
    one, two = keys.owner_of("secret-one"), keys.owner_of("secret-two")
    assert one
    assert two
    assert one != two
    assert keys.owner_of("secret-three") is None
    assert keys.owner_of("") is None


def test_a_key_given_as_its_digest_names_the_same_owner():
    digest = hashlib.sha256(b"secret-one").hexdigest()
    hashed = ApiKeys([f"sha256:{digest}"])
    assert hashed.owner_of("secret-one") == ApiKeys(["secret-one"]).owner_of("secret-one")
    assert hashed.owner_of(f"sha256:{digest}") is None


def test_nothing_of_the_key_is_kept_or_shown():
    keys = ApiKeys(["secret-one"])
    assert "secret" not in repr(vars(keys))
    assert "secret" not in str(keys.owner_of("secret-one"))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "a.localhost"])
def test_loopback_names(name):
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["", "0.0.0.0", "example.org", "10.0.0.1", "localhost.evil.org"])
def test_other_names(name):
    assert not is_loopback(name)
