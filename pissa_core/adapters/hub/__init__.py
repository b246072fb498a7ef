"""The Hub as a source: everything that speaks to it goes through these rooms.

``client.py`` opens the door (the official client, timeouts, the token), ``trouble.py`` turns
what went wrong into our errors and decides how long to wait, ``source.py`` reads.
"""

from pissa_core.adapters.hub.client import HubClient
from pissa_core.adapters.hub.source import HubSource
from pissa_core.adapters.hub.waiting import OPENING, TRANSFER, Patience

__all__ = ["OPENING", "TRANSFER", "HubClient", "HubSource", "Patience"]
