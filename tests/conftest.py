"""Shared fixtures: nothing here touches the network or a folder outside pytest's own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# The test Hub takes large files as LFS does; the client reads this once, when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the test Hub speaks LFS
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hub_fixtures import hub, open_hub, open_hub_sink  # noqa: F401
