"""Keeps Hub tokens unreadable while they lie in the store."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from pissa_core.errors import TokenInvalid
from worker.settings import Settings

_KEY_FILE = "secret.key"


class Vault:
    """Encrypts and decrypts with one key, shared by the API and all workers."""

    def __init__(self, key: str) -> None:
        """Derive the cipher from `key`, a text of any length."""
        digest = hashlib.sha256(b"pissa hub tokens:" + key.encode()).digest()
        self._cipher = Fernet(base64.urlsafe_b64encode(digest))

    def seal(self, secret: str | None) -> str | None:
        """Encrypt; None stays None."""
        return None if secret is None else self._cipher.encrypt(secret.encode()).decode()

    def open(self, sealed: str | None) -> str | None:
        """Decrypt; None stays None.

        Raises:
            TokenInvalid: if it was sealed with another key.
        """
        if sealed is None:
            return None
        try:
            return self._cipher.decrypt(sealed.encode()).decode()
        except InvalidToken as error:
            raise TokenInvalid(
                "this worker cannot read the job's Hub token: it has another PISSA_SECRET_KEY "
                "than the service that took the job",
                hint="give the API and every worker the same PISSA_SECRET_KEY, then resume",
            ) from error


def open_vault(settings: Settings) -> Vault:
    """Return the vault of `PISSA_SECRET_KEY`, or of a key generated once in the data folder."""
    if settings.secret_key is not None:
        return Vault(settings.secret_key.get_secret_value())
    return Vault(read_or_create(settings.data_dir / _KEY_FILE, Fernet.generate_key().decode()))


def read_or_create(path: Path, content: str) -> str:
    """Return the content of a small file that only its owner reads, made once by whoever is first.

    Raises:
        OSError: if it is not there and cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ours = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    if not path.exists():
        fd = os.open(ours, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        try:
            os.link(ours, path)
        except FileExistsError:
            pass
        finally:
            ours.unlink()
    return path.read_text()
