"""How a job's time falls with more workers, and what a thousand jobs cost the store.

Workers: a model of many small shards on the test Hub, whose storage sends each at a set pace, so
that a shard takes seconds of waiting and next to no arithmetic. The store: jobs queued and shards
told of by hand, without workers, while its commands, bytes and answers are measured. Writes
`benchmarks/results/scale.json`; `benchmarks/summary.py` makes tables of it.

    python benchmarks/scale.py             about two minutes on 2 cores
    python benchmarks/scale.py --quick     a tenth of it, for trying out
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import machine

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE.parent / "tests" / "worker")]

from hub.faults import Fault  # noqa: E402
from hub.server import running  # noqa: E402
from hub.state import Hub  # noqa: E402
from service_fixtures import quick_settings  # noqa: E402
from store_tools import DIGEST, make_plan, row, take  # noqa: E402
from worker_tools import running_worker, wait_for, wait_for_end, write_llama  # noqa: E402

from worker.connect import open_store  # noqa: E402
from worker.contract import BaseToPissa  # noqa: E402
from worker.embedded import embedded_valkey  # noqa: E402
from worker.store import JobStore, TaskStore  # noqa: E402
from worker.store.reaper import Reaper  # noqa: E402

WORKERS = (1, 2, 4)
PIECE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scale.json")
    args = parser.parse_args()
    shards, pause_s = (4, 1.0) if args.quick else (8, 3.0)
    jobs, many = (100, 1000) if args.quick else (1000, 10_000)
    with tempfile.TemporaryDirectory() as name:
        scale = scale_out(Path(name), shards, pause_s)
        store = load_the_store(Path(name) / "store", jobs, many)
    result = {
        "machine": machine(),
        "load": os.getloadavg()[0],
        "workers": scale,
        "store": store,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"workers": scale, "store": store}, indent=1))


def scale_out(work: Path, shards: int, shard_s: float) -> dict[str, Any]:
    """Convert the same slow model with 1, 2 and 4 workers, each time from the beginning."""
    with running(Hub()) as hub:
        model = write_llama(work / "model", layers=shards, hidden=64, shards=shards)
        hub.create_repo("org/m", model)
        size = max(path.stat().st_size for path in model.glob("*.safetensors"))
        # Each answer of the storage, with a shard in it, goes out in pieces that take this long.
        drip_s = shard_s / (size / PIECE)
        hub.faults.add(Fault(r"/blobs/", drip=PIECE, drip_s=drip_s, times=10**9))
        seconds = {n: _run_with(work / f"with-{n}", n, hub) for n in WORKERS}
    return {
        "shards": shards,
        "shard_bytes": size,
        "transfer_s_a_shard": shard_s,
        "seconds": seconds,
    }


def _run_with(folder: Path, workers: int, hub: Hub) -> float:
    """Return the seconds of one job, begun when every worker is ready."""
    root = folder / "models"
    root.mkdir(parents=True)
    with ExitStack() as stack:
        url = stack.enter_context(embedded_valkey(folder / "data"))
        settings = quick_settings(url, folder / "data", root).model_copy(
            update={"lease_s": 60.0, "renew_s": 5.0, "watch_s": 1.0}
        )
        store = open_store(settings)
        stack.callback(store.close)
        logs = [folder / f"worker-{number}.log" for number in range(workers)]
        for log in logs:
            stack.enter_context(running_worker(settings, log, hub=hub.endpoint))
        for log in logs:
            wait_for(lambda log=log: log.read_text().count("ready.") == 2, "both nodes", 180)
        # One round of the reaper later the queue has room for all of them.
        time.sleep(1)
        body = BaseToPissa.model_validate({"model": "org/m", "pissa": {"rank": 4}})
        job = wait_for_end(store, store.submit(body, owner="me")[0].id)
        assert job.result is not None, job.error
        return float(job.result["phase_seconds"]["shards"])


def load_the_store(folder: Path, jobs: int, shards: int) -> dict[str, Any]:
    """Queue jobs, plan one of very many shards, do some of them; watch what it costs."""
    root = folder / "models"
    root.mkdir(parents=True)
    with embedded_valkey(folder / "data") as url:
        settings = quick_settings(url, folder / "data", root)
        store = open_store(settings)
        tasks = TaskStore(store.connection, settings, worker="hand@here")
        steps = {
            f"{jobs:,} jobs submitted": lambda: _submit(store, jobs),
            f"one planned: {shards:,} shards": lambda: _plan(tasks, store, shards),
            "a hundred of its shards done": lambda: _work(tasks, store, 100),
            "ten rounds of the reaper": lambda: _rounds(Reaper(store.connection, settings), 10),
        }
        told = [{"step": "before", "status_read_ms": _reads(store)}]
        for name, step in steps.items():
            told.append({"step": name, **_measured(store, step)})
        store.close()
    return {"jobs": jobs, "shards": shards, "steps": told}


def _measured(store: JobStore, step: Any) -> dict[str, Any]:
    """Run a step while another thread reads a job's state; say what the store did meanwhile."""
    ended, latencies = threading.Event(), []
    reader = threading.Thread(target=_read_on, args=(store, ended, latencies))
    before, began = _counters(store), time.perf_counter()
    reader.start()
    operations = step()
    seconds = time.perf_counter() - began
    ended.set()
    reader.join()
    after = _counters(store)
    return {
        "operations": operations,
        "seconds": seconds,
        "operations_per_s": operations / seconds,
        "commands_per_s": (after["calls"] - before["calls"]) / seconds,
        "bytes_in": after["in"] - before["in"],
        "bytes_out": after["out"] - before["out"],
        "memory_bytes": after["memory"],
        "status_read_ms": _percentiles(latencies),
    }


def _counters(store: JobStore) -> dict[str, int]:
    info: dict[str, Any] = store.connection.client.info()  # type: ignore[assignment]
    return {
        "calls": info["total_commands_processed"],
        "in": info["total_net_input_bytes"],
        "out": info["total_net_output_bytes"],
        "memory": info["used_memory"],
    }


def _reads(store: JobStore) -> dict[str, float]:
    job_id, latencies = _submit_one(store), []
    for _ in range(200):
        began = time.perf_counter()
        store.get(job_id)
        latencies.append(time.perf_counter() - began)
    return _percentiles(latencies)


def _read_on(store: JobStore, ended: threading.Event, latencies: list[float]) -> None:
    job_id = store.list(owner=None, limit=1)[0][0].id
    while not ended.wait(0.005) or not latencies:
        began = time.perf_counter()
        store.get(job_id)
        latencies.append(time.perf_counter() - began)


def _percentiles(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * value for value in latencies)
    last = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    return {"p50": statistics.median(ordered), "p99": last, "reads": len(ordered)}


def _submit_one(store: JobStore) -> str:
    body = BaseToPissa.model_validate({"model": "org/m", "output": "hf://me/out"})
    return store.submit(body, owner="me")[0].id


def _submit(store: JobStore, count: int) -> int:
    for _ in range(count):
        _submit_one(store)
    return count


def _plan(tasks: TaskStore, store: JobStore, shards: int) -> int:
    tasks.planned(take(tasks, _oldest(store), "prepare"), make_plan(shards=shards), DIGEST)
    return 1


def _work(tasks: TaskStore, store: JobStore, count: int) -> int:
    """Do shards of two matrices each, as a worker tells of them: six calls a shard."""
    job_id = _oldest(store)
    for index in range(count):
        claim = take(tasks, job_id, f"shard:{index}")
        tasks.shard_started(claim, f"s{index}", 2, 0)
        tasks.plan_text(job_id)
        for number in range(2):
            told = row(f"s{index}", number)
            tasks.matrix_done(claim, told, nbytes=64, seconds=0.1, resumed=False)
        tasks.shard_done(claim, f"s{index}", nbytes=1000, matrices=2, resumed=False, peak=1)
    return 6 * count


def _oldest(store: JobStore) -> str:
    return str(store.connection.client.zrange("pissa:jobs", 0, 0)[0])  # type: ignore[index]


def _rounds(reaper: Reaper, count: int) -> int:
    done = 0
    while done < count:
        done += reaper.round()
        time.sleep(0.01)
    return count


if __name__ == "__main__":
    main()
