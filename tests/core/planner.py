"""A process that plans, one question a line, bounded as the service's planner is."""

from __future__ import annotations

import json
import resource
import sys
import time

from app.planning import _answer
from worker.bounds import bound_planning


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    memory, cpu_s = int(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        bound_planning(memory, cpu_s)
        began = time.process_time()
        answer = _answer(json.loads(line))
        answer["cpu_s"] = time.process_time() - began
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
