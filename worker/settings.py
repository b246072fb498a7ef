"""Settings of the service: the environment `PISSA_*`, read once, frozen.

Below the door (`Settings.from_env`) everything gets its settings as an argument. Importing this
module loads neither torch nor Celery.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pissa_core.errors import InvalidRequest
from pissa_core.wording import sentence_of

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_SCHEMES = ("redis://", "rediss://", "unix://")


def parse_size(text: object) -> object:
    """Read ``20GB``, ``1.5 GiB`` or a number of bytes; what is no text passes through."""
    if not isinstance(text, str):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 20GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _folder(value: object) -> object:
    return Path(value).expanduser().absolute() if isinstance(value, str | Path) else value


def _store_url(value: object) -> object:
    if isinstance(value, str) and value and not value.startswith(_SCHEMES):
        raise ValueError("write redis://host:port/0, rediss://… or unix:///path/to/socket")
    return value


Folder = Annotated[Path, BeforeValidator(_folder)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """What the operator chose; each field is the environment variable ``PISSA_<NAME>``."""

    model_config = SettingsConfigDict(
        env_prefix="PISSA_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    api_keys: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), repr=False, description="comma-separated; without any, this machine alone is served"
    )
    redis_url: Annotated[str | None, BeforeValidator(_store_url)] = Field(
        None, repr=False, description="redis://, rediss:// or unix://; default: embedded Valkey"
    )
    data_dir: Folder = Field(
        Path("~/.local/share/pissa"),
        validate_default=True,
        description="jobs (embedded Valkey), kept files, the generated key",
    )
    local_root: Folder | None = Field(
        None, description="the folder local references must stay below; unset: Hub only"
    )
    disk_budget: Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(parse_size)] = Field(
        None, description="disk that work in progress may take, such as 20GB"
    )
    secret_key: SecretStr | None = Field(
        None, description="encrypts Hub tokens in the store; the same for API and all workers"
    )
    lease_s: Seconds = Field(
        60, description="a task whose worker is silent this long is lost; best above 10"
    )
    renew_s: Seconds = Field(10, description="how often a worker renews its lease")
    watch_s: Seconds = Field(1, description="how often a worker looks whether it should stop")
    reap_s: Seconds = Field(2, description="how often lost and unsent tasks are looked for")
    cancel_s: Seconds = Field(
        5, description="after this long a cancelled task's process is ended from outside"
    )
    stop_s: Seconds = Field(6, description="a stopping worker hands back its task within this")
    retry_s: Seconds = Field(5, description="wait before the first retry; doubles each time")
    max_retries: int = Field(5, ge=0, description="retries of one task after retryable errors")
    max_losses: int = Field(
        3, ge=1, description="workers that one task may lose before its job fails"
    )
    max_requests_per_minute: int = Field(
        6000, ge=0, description="requests that one API key may send within a minute; 0: any number"
    )
    max_queued: int = Field(
        2000, ge=1, description="jobs that one API key may have waiting in the queue"
    )
    max_streams: int = Field(
        100, ge=1, description="event streams that one API key may have open at a time"
    )
    max_rank: int | None = Field(None, ge=1, description="the highest rank of a job or adapter")
    max_model_size: Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(parse_size)] = (
        Field(None, description="the largest checkpoint a job may name, such as 200GB")
    )
    keep_s: Seconds = Field(
        30 * 86400, description="a finished job, its kept and its staged files go after this long"
    )
    no_worker_s: Seconds = Field(
        120, description="how long a task may wait for a worker that shares its storage"
    )
    store_patience_s: Seconds = Field(
        300, description="how long a worker keeps trying to write to a store that is away"
    )

    @classmethod
    def from_env(cls) -> Settings:
        """Read the environment.

        Raises:
            InvalidRequest: naming the variable and what it should hold.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = "_".join(str(part) for part in first["loc"][:1]).upper()
            why = sentence_of(first)
            raise InvalidRequest(f"the environment variable PISSA_{name}: {why}") from None

    def as_env(self) -> dict[str, str]:
        """Return the variables that make `from_env` of a child process give these settings."""
        values = self.model_dump(exclude_none=True)
        return {f"PISSA_{name.upper()}": _spelled(value) for name, value in values.items()}

    @property
    def files_dir(self) -> Path:
        """Where results lie that were given no output."""
        return self.data_dir / "files"

    @property
    def scratch_dir(self) -> Path:
        """Where work in progress lies whose result goes to the Hub."""
        return self.data_dir / "scratch"


def _spelled(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
