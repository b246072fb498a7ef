"""Tables about the running service: more workers, the store, chaos, the API under load."""

from __future__ import annotations


def scale(result: dict) -> str:
    """Tell how time falls with workers, and what many jobs and shards cost the store."""
    machine, workers = result["machine"], result["workers"]
    times = workers["seconds"]
    store = result["store"]
    return "\n\n".join(
        [
            f"## More workers, more jobs: {machine['cores']} cores of {machine['processor']}",
            f"`python benchmarks/scale.py`; the load of the machine was {result['load']:.1f}. "
            f"{workers['shards']} shards from a Hub that takes "
            f"{workers['transfer_s_a_shard']:g} s to send each, next to no arithmetic:",
            "| workers | shards done in | as fast as one |\n|---:|---:|---:|\n"
            + "\n".join(
                f"| {count} | {seconds:.1f} s | {times['1'] / seconds:.1f}× |"
                for count, seconds in times.items()
            ),
            "The store (embedded Valkey, every write synced) while one client does each step and "
            "another reads the state of a job, over and over:",
            "| step | operations a second | commands a second | bytes in | bytes out | memory "
            "| reading a state, p50 | p99 |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
            + "\n".join(_step(step) for step in store["steps"]),
        ]
    ) + "\n"  # fmt: skip


def _step(step: dict) -> str:
    read = step["status_read_ms"]
    latency = f"{read['p50']:.2f} ms | {read['p99']:.1f} ms |"
    if "operations" not in step:
        return f"| {step['step']} | – | – | – | – | – | {latency}"
    return (
        f"| {step['step']} | {step['operations_per_s']:.1f} | {step['commands_per_s']:,.0f} "
        f"| {step['bytes_in'] / 1e6:.2f} MB | {step['bytes_out'] / 1e6:.2f} MB "
        f"| {step['memory_bytes'] / 1e6:.1f} MB | {latency}"
    )


def chaos(result: dict) -> str:
    """Tell how many rounds of chaos were played, with what, and how they ended."""
    faults, jobs, seconds = dict(result["faults"]), result["jobs"], result["seconds_a_round"]
    kinds, places = (_listed(result[name]) for name in ("kinds", "places"))
    return "\n\n".join(
        [
            "## Chaos",
            f"`make test-chaos` ([what it does](../docs/faults.md)): {result['rounds']} rounds, "
            f"{_endings(result)}. {jobs['all']} jobs ({kinds}), {result['cancelled']} to be "
            f"cancelled and {result['resumed']} resumed; {faults.pop('all')} faults; "
            f"{result['streams_broken_and_gone_on']} streams of events that broke off and were "
            f"taken up again. Where results went: {places}. A round took {seconds['median']:.0f} s "
            f"(median of {seconds['rounds']} while the machine did nothing else).",
            "| fault | times |\n|---|---:|\n"
            + "\n".join(f"| {kind} | {times} |" for kind, times in faults.items()),
        ]
    ) + "\n"  # fmt: skip


def _endings(result: dict) -> str:
    failed, mended = result["failed_rounds"], result["failed_and_passed_since"]
    told = f"{len(failed)} failed: {failed}" if failed else "all ended as they should"
    if not mended:
        return told
    return (
        f"{told}, but for {len(mended)} that failed first and pass since what they found is mended"
    )


def load(result: dict) -> str:
    """Tell of the API under load."""
    rows = [
        "| asked | answers | median | 99th percentile |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {r['count']} | {r['p50_ms']:.0f} ms | {r['p99_ms']:.0f} ms |"
            for name, r in (("status", result["reads"]), ("submission", result["submissions"]))
        ),
    ]
    lines = [
        f"## The API under load: {result['machine']['cores']} cores of "
        f"{result['machine']['processor']}",
        f"`load.py`: {result['jobs']} jobs queued, one worker computing, and for "
        f"{result['seconds']:g} s {result['pollers']} pollers that ask once a second, "
        f"{result['streams']} streams of events and one client that submits without a pause; all "
        "on the same cores.",
        "\n".join(rows),
        f"Submissions a second: {result['filling_per_s']:.0f} by eight clients at once while "
        f"nobody polls, {result['submissions_per_s']:.1f} by one client under the load. Processor "
        f"time of the API: {result['api_cpu_ms_per_answer']:.1f} ms an answer, "
        f"{result['api_cpu_share']:.0%} of one core. The machine's load average afterwards was "
        f"{result['load_average']:.0f}: above 4, others had a share of it, and times waited are "
        "theirs, too.",
    ]
    return "\n\n".join(lines) + "\n"


def _listed(counts: dict) -> str:
    return ", ".join(f"{name} {times}" for name, times in counts.items() if name != "all")
