"""The test Hub as a program: prints its address, and serves until it is ended.

``python tests/hub --root DIR`` serves every folder ORG/NAME below DIR as a public model repo;
``--giant ORG/NAME`` a Llama 3 70B of noise that takes no room. Whoever has a ``--token NAME=hf_…``
may write as NAME. ``GET /_counts`` says what was sent, received and committed so far.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.giants import Checksums, Llama
from hub.repos import Token
from hub.server import running
from hub.state import Hub


def main() -> None:
    options = arguments()
    hub = Hub(
        folder=options.storage,
        part_size=options.part_size,
        swallow_from=options.swallow_from,
        cross_repo=options.cross_repo,
    )
    for folder in sorted(options.root.glob("*/*")) if options.root else ():
        if folder.is_dir():
            hub.create_repo(folder.relative_to(options.root).as_posix(), folder)
    if options.giant:
        checksums = Checksums(options.checksums) if options.checksums else None
        hub.create_repo(options.giant, files=Llama().scaled(options.scale).files(checksums))
    for named in options.token:
        user, _, token = named.partition("=")
        hub.tokens[token] = Token(user)
    ended = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with running(hub, port=options.port):
        print(hub.endpoint, flush=True)
        signal.sigwait(ended)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, help="holds folders ORG/NAME")
    add("--port", type=int, default=0, help="0 picks a free one")
    add("--token", action="append", default=[], metavar="NAME=TOKEN", help="may write as NAME")
    add("--storage", type=Path, help="where large files go that are sent; default: temporary")
    add("--part-size", type=int, default=64 << 20, help="larger files are sent in such parts")
    add("--swallow-from", type=int, help="hash files of so many bytes, but do not keep them")
    add("--cross-repo", action="store_true", help="large files can be copied from repo to repo")
    add("--giant", metavar="ORG/NAME", help="serve a Llama 3 70B of noise under this name")
    add("--scale", type=int, default=1, help="make every side of the giant so many times shorter")
    add("--checksums", type=Path, help="keeps the giant's checksums, which take a while to take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
