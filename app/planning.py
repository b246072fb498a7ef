"""Be the process that plans: read what to plan from stdin, answer with the plan or the error.

One line of JSON each way. That stdin closes tells it that the parent has died. It stands outside
the command's package, whose imports it has no use for.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from app.lean import (
    ONE_THREAD,
    import_everything,
    import_for_a_plan,
    import_kernels,
    import_torch,
)
from pissa_core.errors import OutOfMemory, PissaError, UnsupportedArchitecture, UnsupportedModule
from pissa_core.plan import Plan
from pissa_core.refs import parse_ref
from pissa_core.spec import parse_config
from pissa_core.verify.case import Case


def main() -> None:
    """Answer one question."""
    # A short life needs no collector; going through a million objects again and again while
    # 3000 modules are imported takes a quarter of the time.
    gc.disable()
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    os.environ.setdefault(*ONE_THREAD)
    asked: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    import_torch()  # while the parent finds out what to ask
    from worker.bounds import bound_planning

    question = json.loads(asked.get())
    bound_planning()
    with answer_to:
        json.dump(_answer(question), answer_to)
    # The libraries' own clearing up takes a second, and nobody waits for anything of theirs.
    os._exit(0)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"plan": _make(asked).to_json()}
    except PissaError as error:
        traceback.print_exc()
        return {"error": error.as_dict()}
    except (MemoryError, RuntimeError) as error:
        from pissa_core.shortage import ran_out_of_memory
        from worker.bounds import ABSURD

        if not ran_out_of_memory(error):
            raise
        return {"error": OutOfMemory("memory ran out while planning", hint=ABSURD).as_dict()}


def _make(asked: dict[str, Any]) -> Plan | Case:
    return _MAKERS[asked.get("kind", "base-to-pissa")](asked)


def _conversion(asked: dict[str, Any]) -> Plan:
    from pissa_core.adapters import open_source
    from pissa_core.admission import check_budgets
    from pissa_core.layout import read_layout
    from pissa_core.planning import make_plan

    source = open_source(parse_ref(asked["model"]))
    layout = read_layout(source)  # what is wrong with the files is told before seconds of imports
    import_for_a_plan()
    limits = _limits(asked)
    config = parse_config(asked["config"])
    plan = _with_what_it_takes(lambda: make_plan(source, config, layout=layout, **limits))
    check_budgets(plan, source, **_budgets(limits))
    return plan


def _with_what_it_takes(make: Callable[[], Plan]) -> Plan:
    """Make a plan; what refuses it is perhaps no more than the want of what was not imported."""
    try:
        return make()
    except (UnsupportedArchitecture, UnsupportedModule) as error:
        if not isinstance(error.__cause__, NotImplementedError):
            return _with_everything(make, error)
    import_kernels()
    try:
        return make()
    except UnsupportedArchitecture as error:
        return _with_everything(make, error)


def _with_everything(make: Callable[[], Plan], error: PissaError) -> Plan:
    if isinstance(error, UnsupportedModule):  # a class that was built is whole
        raise error
    import_everything()
    return make()


def _fold(asked: dict[str, Any]) -> Plan:
    import_kernels()
    from pissa_core.adapters import open_source
    from pissa_core.admission import check_budgets
    from pissa_core.fold.planning import make_fold_plan

    residual, adapter = (open_source(parse_ref(asked[name])) for name in ("residual", "adapter"))
    limits = _limits(asked)
    plan = make_fold_plan(residual, adapter, open_source, **limits)
    check_budgets(plan, residual, **_budgets(limits))
    return plan


def _limits(asked: dict[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = asked["limits"]
    return limits | ({"scratch": Path(limits["scratch"])} if "scratch" in limits else {})


def _budgets(limits: dict[str, Any]) -> dict[str, Any]:
    names = ("disk_budget", "memory_budget", "scratch")
    return {name: limits[name] for name in names if name in limits}


def _case(asked: dict[str, Any]) -> Case:
    import_kernels()
    from pissa_core.adapters import open_source
    from pissa_core.verify.asking import make_case

    original, converted = (
        open_source(parse_ref(asked[name])) for name in ("original", "converted")
    )
    return make_case(original, converted)


_MAKERS: dict[str, Callable[[dict[str, Any]], Plan | Case]] = {
    "base-to-pissa": _conversion,
    "pissa-to-base": _fold,
    "verify": _case,
}


def _listen(asked: SimpleQueue[bytes]) -> None:
    """Hand on the question, if one comes, and end with the parent."""
    # Not by `sys.stdin`: its lock, held as the interpreter ends, would make a crash of any error.
    question = b""
    while piece := os.read(0, 1 << 16):
        question += piece
        if piece.endswith(b"\n"):
            asked.put(question)
    os._exit(1)


if __name__ == "__main__":
    main()
