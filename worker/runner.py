"""Carries out one task: claims it, holds it, does its step, and settles how it ended."""

from __future__ import annotations

import logging

from pissa_core.errors import OutOfMemory, PissaError
from worker.bounds import ABSURD
from worker.errors import StoreUnavailable
from worker.holding import Hold, Stopped
from worker.logs import about
from worker.processes import holder_id, reset_peak_memory
from worker.steps import STEPS
from worker.store.tasks import Claim, LeaseLost, is_restart
from worker.wiring import Context

logger = logging.getLogger(__name__)


def carry_out(context: Context, job_id: str, task: str) -> None:
    """Do one task, if it is still to be done and nobody else does it.

    Never raises for what goes wrong with the job: that is the job's to tell. A message that
    comes twice, or late, finds the task done or held and does nothing.
    """
    claim = context.tasks.claim(job_id, task, holder=holder_id())
    if claim is None:
        logger.info("not to be done here", extra={"job_id": job_id, "task": task})
        return
    reset_peak_memory()
    with about(**_names(claim)):
        logger.info("attempt %d begins", claim.attempts)
        try:
            _work(context, claim)
        except LeaseLost:
            logger.warning("the lease is lost; another goes on, or the job is over")
        except StoreUnavailable:
            # The lease runs out, and the task is found again by whoever sees the store.
            logger.error("the store stayed away; the task is left as it is")


def _names(claim: Claim) -> dict[str, str]:
    """Return what every line of the log that is about the task should name."""
    names = {"job_id": claim.job_id, "task": claim.task}
    return names if claim.request_id is None else {**names, "request_id": claim.request_id}


def _work(context: Context, claim: Claim) -> None:
    try:
        with Hold(context.tasks, claim, context.settings) as hold:
            STEPS[claim.task.partition(":")[0]](context, claim, hold)
    except (LeaseLost, StoreUnavailable):
        raise
    except Stopped as stopped:
        logger.info("the task is left: %s", stopped)
        context.tasks.release(claim)
    except PissaError as error:
        _settle(context, claim, error)
    except Exception as error:
        # Somebody else's fault, and the user's text must hold nothing of it: the log has it all.
        out_of_memory = _ran_out_of_memory(error)
        logger.exception("memory ran out" if out_of_memory else "an error that nobody foresaw")
        _settle(context, claim, _out_of_memory(claim) if out_of_memory else _internal(claim))


def _ran_out_of_memory(error: Exception) -> bool:
    from pissa_core.shortage import ran_out_of_memory

    return ran_out_of_memory(error)


def _settle(context: Context, claim: Claim, error: PissaError) -> None:
    """Retry what may be mended by waiting, fail the job for anything else."""
    from pissa_core.engine import is_hopeless

    logger.warning("[%s] %s", error.code, error.message)
    if claim.task != "plan" and is_restart(error):
        context.tasks.retry(claim, error, restart=True)
    elif claim.task != "plan" and error.retryable:
        context.tasks.retry(claim, error, restart=False)
    else:
        context.tasks.fail(claim, error, discard=is_hopeless(error))


def _internal(claim: Claim) -> PissaError:
    return PissaError(
        f"something went wrong inside the worker while it was at {claim.task}",
        hint=f"the worker's log tells more under {claim.job_id}",
    )


def _out_of_memory(claim: Claim) -> OutOfMemory:
    planning = claim.task in ("prepare", "plan")
    return OutOfMemory(
        f"memory ran out while the worker was at {claim.task}",
        hint=ABSURD if planning else "use fewer slots, or a machine with more memory",
    )
