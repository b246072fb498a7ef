"""The API under load: status reads, submissions and streams while a worker computes.

A service is started on this machine (API, embedded store, one worker), jobs are queued until
1,000 wait, and then for a while 100 pollers ask for a job's status once a second each, 50 readers
follow jobs' events, and one more client submits as fast as it is answered. The clients run on the
same cores as the service and the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
from checkpoint import Shape, make_checkpoint
from measure import machine

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = Shape(8, hidden=1024, intermediate=2816, heads=16, key_value_heads=4, vocabulary=4000)
POLL_S = 1.0
SUBMITTERS = 8


@contextmanager
def service(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `pissa serve` with one worker; yield its address and the API's process."""
    told = os.environ | {"PISSA_LOCAL_ROOT": str(folder / "models"), "PISSA_MAX_QUEUED": "100000"}
    told.pop("PISSA_API_KEYS", None)
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--workers", "1"]
    log = folder / "serve.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data")], env=told, stderr=written
        )
    try:
        yield _address(process, log), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        if match := re.search(r"PiSSA service at (\S+)", log.read_text()):
            return match[1]
        time.sleep(0.1)
    raise SystemExit(log.read_text())


async def submit(client: httpx2.AsyncClient, number: int) -> str:
    # Each job is another one: equal requests would go on from each other's staged work.
    body = {"kind": "base-to-pissa", "model": "./model", "pissa": {"svd": {"seed": number}}}
    answer = await client.post("/v1/jobs", json=body)
    answer.raise_for_status()
    return answer.json()["id"]


async def fill(client: httpx2.AsyncClient, count: int) -> tuple[list[str], float]:
    """Submit `count` jobs, several at a time; return their ids and how many went in a second."""
    numbers, ids = iter(range(count)), []

    async def one_after_another() -> None:
        for number in numbers:
            ids.append(await submit(client, number))

    began = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(SUBMITTERS)))
    return ids, count / (time.perf_counter() - began)


async def poll(client: httpx2.AsyncClient, job_id: str, until: float, times: list[float]) -> None:
    while (began := time.perf_counter()) < until:
        (await client.get(f"/v1/jobs/{job_id}")).raise_for_status()
        times.append(time.perf_counter() - began)
        await asyncio.sleep(max(began + POLL_S - time.perf_counter(), 0))


async def follow(client: httpx2.AsyncClient, job_id: str, seen: list[str]) -> None:
    accept = {"Accept": "text/event-stream"}
    async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=accept) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                seen.append(line)


async def keep_submitting(client: httpx2.AsyncClient, until: float, times: list[float]) -> None:
    while (began := time.perf_counter()) < until:
        await submit(client, 10_000 + len(times))
        times.append(time.perf_counter() - began)


async def crowd(home: str, api: psutil.Process, args: argparse.Namespace) -> dict:
    """Load the service and measure it."""
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=1000)
    async with httpx2.AsyncClient(base_url=home, limits=limits, timeout=60, trust_env=False) as c:
        while not (await c.get("/readyz")).json()["workers"]:
            await asyncio.sleep(0.2)
        ids, rate = await fill(c, args.jobs)
        reads: list[float] = []
        posts: list[float] = []
        events: list[str] = []
        streams = [
            asyncio.create_task(follow(c, ids[index % len(ids)], events))
            for index in range(args.streams)
        ]
        until, spent = time.perf_counter() + args.seconds, cpu_s(api)
        await asyncio.gather(
            keep_submitting(c, until, posts),
            *(poll(c, ids[index], until, reads) for index in range(args.pollers)),
        )
        spent = cpu_s(api) - spent
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        metrics = (await c.get("/metrics")).text
    return {
        "filling_per_s": rate,
        "reads": quantiles(reads),
        "submissions": quantiles(posts),
        "submissions_per_s": len(posts) / args.seconds,
        "api_cpu_ms_per_answer": 1000 * spent / (len(reads) + len(posts)),
        "api_cpu_share": spent / args.seconds,
        "events_read": len(events),
        "queued_at_the_end": value_of(metrics, 'pissa_jobs{status="queued"}'),
        "matrices_meanwhile": value_of(metrics, 'pissa_matrices_total{how="done"}'),
    }


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time of a process, without its children's."""
    times = process.cpu_times()
    return times.user + times.system


def value_of(metrics: str, name: str) -> float:
    return next((float(x.split()[-1]) for x in metrics.splitlines() if x.startswith(name)), 0.0)


def quantiles(seconds: list[float]) -> dict:
    """Return count, median and 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"count": len(seconds), "p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--pollers", type=int, default=100)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "load-cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder / "models" / "model", MODEL, shards=4)
        with service(folder) as (home, api):
            measured = asyncio.run(crowd(home, api, args))
    asked = {name: getattr(args, name) for name in ("jobs", "pollers", "streams", "seconds")}
    # What else ran here meanwhile: on two cores, more than about 4 is somebody else's.
    result = {"machine": machine(), "load_average": os.getloadavg()[0], **asked, **measured}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
