"""The Hub as source and sink: everything that speaks to it goes through these rooms.

``client.py`` opens the door (the official client, timeouts, the token), ``trouble.py`` turns
what went wrong into our errors, ``waiting.py`` decides how long to go on, ``source.py`` reads.
``writer.py`` makes each call that changes a repo (``changes.py`` says what a commit changes,
``uploading.py`` what is sent ahead of it), ``staging.py`` keeps what is done on a branch
(``sealing.py`` and ``pending.py`` in few commits, ``pacing.py`` not too often, ``sweeping.py``
until nobody comes back for it), ``publishing.py`` puts the last commit together, ``sink.py`` is
what the engine sees of them.
"""

from pissa_core.adapters.hub.client import HubClient
from pissa_core.adapters.hub.sink import HubSink
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.waiting import (
    COMMIT,
    OPENING,
    PATIENT_OPENING,
    TRANSFER,
    Notice,
    Patience,
    Pause,
)

__all__ = [
    "COMMIT",
    "OPENING",
    "PATIENT_OPENING",
    "TRANSFER",
    "HubClient",
    "HubSink",
    "HubSource",
    "Notice",
    "Patience",
    "Pause",
]
