"""The test Hub as a program: every folder ORG/NAME below a root is a public model repo.

``python tests/hub --root DIR [--port PORT]`` prints its address and serves until it is ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.server import running
from hub.state import Hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="holds folders ORG/NAME")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    options = parser.parse_args()
    hub = Hub()
    for folder in sorted(options.root.glob("*/*")):
        if folder.is_dir():
            hub.create_repo(folder.relative_to(options.root).as_posix(), folder)
    ended = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with running(hub, port=options.port):
        print(hub.endpoint, flush=True)
        signal.sigwait(ended)


if __name__ == "__main__":
    main()
