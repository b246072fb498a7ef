"""How often seals are committed: no more often than the Hub takes, and no wait a long one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from hub_tools import OUT
from places import named_seal_in

from pissa_core.adapters.hub import Pause
from pissa_core.adapters.hub.pacing import Pace

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_no_hour_sees_more_commits_than_wanted_and_no_wait_is_long():
    """Three lanes that are always ready: 131 shards, and a thousand."""
    pace, times, now, waits = Pace(), [], NOW, []
    while len(times) < 400:
        now += timedelta(seconds=4)
        wait_s = pace.wait_s(times, now)
        waits.append(wait_s)
        now += timedelta(seconds=wait_s)
        times.insert(0, now)
    in_an_hour = [sum(0 <= (at - start).total_seconds() < 3600 for at in times) for start in times]
    assert max(in_an_hour) <= pace.most < 128
    assert max(waits) < 120
    assert not any(waits[: pace.at_once])
    carried = pace.at_once + 3 * (len([at for at in times if at < NOW + timedelta(hours=1)]) - 50)
    assert carried > 131


def test_seals_wait_together_once_the_pace_makes_them_wait(hub, open_hub_sink, machine):
    """Two commits a window: the first two at once, all the others in the third."""
    told: list[Pause | None] = []
    token = hub.create_token("somebody")
    pace = Pace(most=4, at_once=4, window=timedelta(seconds=4))
    sink = open_hub_sink(OUT, token, on_wait=told.append, pace=pace)
    for n in range(4):
        named_seal_in(sink, f"first-{n}")
    shards = [f"{n}.safetensors" for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda shard: named_seal_in(sink, shard), shards))
    assert machine.sealed(shards) == set(shards)
    assert len(machine.titles()) <= 4 + 4
    assert {pause.error.code for pause in told if pause} == {"rate_limited"}
