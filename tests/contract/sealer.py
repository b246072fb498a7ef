"""One attempt in a process of its own: makes two files, sends them and seals them.

Called with the Hub's address, a token, a scratch folder and the name of a shard.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hub_tools import OUT
from places import named_seal_in

from pissa_core.adapters.hub import HubClient, HubSink
from pissa_core.refs import HubRef

if __name__ == "__main__":
    endpoint, token, scratch, shard = sys.argv[1:]
    client = HubClient(token=token, endpoint=endpoint)
    named_seal_in(HubSink(HubRef(OUT), digest="d1", scratch=Path(scratch), client=client), shard)
    print("sealed", flush=True)
