"""Files on their way to the Hub: what is sent, and what stops it, in terms of the client alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo

from pissa_core.adapters.hub.trouble import TROUBLES
from pissa_core.errors import NoWriteAccess


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to be sent: its path in the repo, its content, its checksum where it is known."""

    path: str
    content: Path | bytes
    sha256: str | None = None


def is_sent(addition: CommitOperationAdd) -> bool:
    """Whether a file's bytes are on the Hub, so that the local ones are of no more use."""
    return addition.path_or_fileobj == b"" and addition.upload_info.size > 0


def addition_of(file: Outgoing) -> CommitOperationAdd:
    """Return the operation that adds a file."""
    content = str(file.content) if isinstance(file.content, Path) else file.content
    addition = CommitOperationAdd(file.path, content)
    if file.sha256 is not None:  # saves a pass over the file
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition


def sent_addition(
    path: str, *, sha256: str, size: int, content: bytes | None
) -> CommitOperationAdd:
    """Return the operation for a file that somebody else has sent ahead.

    Args:
        path: in the repo.
        sha256: of the content.
        size: of the content, in bytes.
        content: of a small file, which goes along with the commit; None for a large one.
    """
    addition = CommitOperationAdd(path, content or b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(sha256), size=size, sample=b"")
    addition._upload_mode = "lfs" if content is None else "regular"
    addition._is_uploaded = content is None
    addition._should_ignore = False
    return addition


@contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """Raise what stopped an upload: the client, and the Xet protocol's, wrap it."""
    try:
        yield
    except RuntimeError as error:
        if _is_about_one_sending(error.__cause__):
            raise httpx2.NetworkError("the storage refused what arrived") from error
        if isinstance(error.__cause__, (*TROUBLES, OSError)):
            raise error.__cause__ from error
        raise httpx2.NetworkError(_first_line(error)) from error
    except (ConnectionError, TimeoutError) as error:
        raise httpx2.NetworkError(_first_line(error)) from error
    except PermissionError as error:
        if not type(error).__name__.startswith("Xet"):
            raise
        raise NoWriteAccess(
            f"the Hub's storage forbids writing to {repo_id} ({_first_line(error)})",
            hint="the token may have ended meanwhile: run the same again with a new one",
        ) from error


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error is about, if it is about one."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _is_about_one_sending(error: BaseException | None) -> bool:
    """Whether the storage refused bytes damaged on the way, or an address that has run out."""
    if not isinstance(error, HfHubHTTPError) or status_of(error) not in (400, 403):
        return False
    return bool(error.response.request.method == "PUT")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
