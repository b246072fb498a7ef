"""Local folders as source and sink."""

from __future__ import annotations

from pissa_core.adapters.local.sink import LocalSink
from pissa_core.adapters.local.source import LocalSource

__all__ = ["LocalSink", "LocalSource"]
