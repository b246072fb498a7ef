"""Convert a model from one repo of a Hub to another, as a worker does; prints one JSON object.

HF_ENDPOINT=… HF_TOKEN=… python benchmarks/hub_to_hub.py SOURCE OUTPUT --scratch DIR
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STARTED = time.perf_counter()


def main() -> None:
    args = arguments()
    import peft  # noqa: F401  a worker has these before its first job, and a plan needs them
    import transformers  # noqa: F401

    from pissa_core.adapters import staging_digest
    from pissa_core.adapters.hub import HubSink, HubSource
    from pissa_core.adapters.hub.pacing import Pace
    from pissa_core.engine import convert
    from pissa_core.planning import make_plan
    from pissa_core.refs import HubRef
    from pissa_core.runtime import Runtime
    from pissa_core.spec import parse_config

    seconds = {"import": time.perf_counter() - STARTED}
    source = HubSource(HubRef(args.source))
    asked = {"rank": args.rank, "layers_to_transform": args.layers, "target_modules": TARGETS}
    config = parse_config(asked)
    plan = make_plan(source, config, disk_budget=args.disk_budget)
    seconds["plan"] = time.perf_counter() - STARTED - seconds["import"]
    digest = staging_digest(source, config, args.output, plan.division)
    # This Hub refuses no commit, however many there are: what shards cost is to be seen.
    pace = Pace(most=10_000, at_once=10_000)
    sink = HubSink(HubRef(args.output), digest=digest, scratch=args.scratch, pace=pace)
    runtime = Runtime(device=args.device, disk_budget=args.disk_budget)
    for _ in convert(source, sink, config, runtime, plan=plan):
        pass
    seconds["convert"] = time.perf_counter() - STARTED - sum(seconds.values())
    print(json.dumps({"seconds": seconds, "ref": sink.ref, "matrices": len(plan.matrices)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="ORG/NAME")
    parser.add_argument("output", help="ORG/NAME")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--disk-budget", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
