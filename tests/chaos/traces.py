"""What a round must not leave: processes, records, messages, files, branches of staged work."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import hubrepo
from household import Household, store_of
from recipes import Recipe
from worker_tools import leftovers

_UNFINISHED = ("pissa:leases", "pissa:delayed", "pissa:sent:*", "pissa:turn:*", "pissa:staging:*",
               "pissa:job:*:tasks", "pissa:job:*:held", "pissa:waiting",
               "pissa:celery:plan*", "pissa:celery:work*")  # fmt: skip
# What a node had received and not acknowledged when it was killed lies under `unacked` for a day;
# then it is given back, and the lease decides, as with any message that comes twice.
_COMES_AND_GOES = ("pissa:reaper*", "pissa:draining", "pissa:over", "pissa:celery:unacked*")


class Traces:
    """What there is when nothing runs, to be held against what there is after a round."""

    def __init__(self, home: Household) -> None:
        """Look at a service that has no job."""
        self._keys = frozenset(_keys(home))
        self._files = frozenset(_files(home))

    def of_work(self, home: Household, done: Iterable[Recipe]) -> list[str]:
        """Return what of unfinished work is left: in the store, on the disk, on the Hub."""
        unfinished = [
            key
            for key in _keys(home)
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in _UNFINISHED)
        ]
        folders = [home.settings.files_dir, home.folder / "models" / "out"]
        staged = [name for folder in folders if folder.is_dir() for name in leftovers(folder)]
        scratch = [name for name in _files(home) if name.startswith("data/scratch/")]
        return [*unfinished, *staged, *scratch, *_branches(home, done)]

    def of_anything(self, home: Household) -> list[str]:
        """Return every key and file that was not there before; of deleted jobs nothing stays."""
        fresh = [key for key in _keys(home) if key not in self._keys]
        expected = [
            key
            for key in fresh
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in _COMES_AND_GOES)
        ]
        files = [name for name in _files(home) if name not in self._files]
        return [*sorted(set(fresh) - set(expected)), *files]


def _keys(home: Household) -> list[str]:
    client = store_of(home)
    found = [str(key) for key in client.scan_iter()]
    client.close()
    return found


def _files(home: Household) -> list[str]:
    """Return every file and folder of the service, but for the gates of workers that live."""
    gates = {f"pissa-worker-{worker.pid}-" for worker in home.workers if worker.alive}
    found = []
    for part in ("data", "models", "tmp", "hf"):
        for path in sorted((home.folder / part).rglob("*")):
            if not any(name.startswith(gate) for name in path.parts for gate in gates):
                found.append(str(path.relative_to(home.folder)))
    return found


def _branches(home: Household, done: Iterable[Recipe]) -> Sequence[str]:
    repos = [recipe.repo for recipe in done if recipe.repo]
    return [name for repo in repos for name in hubrepo.branches_of(home.hub_url, repo)]
