"""`pissa jobs`, `watch`, `cancel`, `resume`, `delete`: talking to a service."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import click

from app.cli import tables
from app.cli.errors import ExitStatus, on_interrupt
from app.cli.http import Service, job_path
from app.cli.kinds import Statuses
from app.cli.options import job_argument, json_option
from app.cli.progress import Display, Pace, Snapshot, display, pause_line
from app.cli.verification import print_first_faults
from pissa_core.errors import CheckpointError, PissaError, TargetError, error_from
from worker.terms import LONGEST_PAGE, Status

POLL_S = 0.5
PATIENCE_S = 60.0
"""How long `watch` goes on asking a service that does not answer; it may be restarting."""

PASSING = ("service_unreachable", "store_unavailable", "too_many_requests")
NO_WORKER = "queued, and no worker is there yet"
FINAL = ("succeeded", "failed", "cancelled")
_LOST = "a worker was lost, another goes on"


@click.command()
@click.option(
    "--status",
    type=Statuses(),
    metavar="S[,S…]",
    help=f"Only jobs in these states: {', '.join(Status)}.",
)
@click.option("--limit", type=click.IntRange(1, LONGEST_PAGE), default=50, show_default=True)
@click.option("--after", metavar="CURSOR", help="Go on where an earlier page ended.")
@json_option
def jobs(*, status: str | None, limit: int, after: str | None, as_json: bool) -> None:
    """List jobs, newest first."""
    params: dict[str, str | int] = {"limit": limit}
    params |= {"status": status} if status else {}
    params |= {"after": after} if after else {}
    page = Service.from_environment().get("v1/jobs", **params)
    if as_json:
        tables.print_json(page)
        return
    tables.print_jobs(page["jobs"])
    if page["next"]:
        click.echo(f"more: pissa jobs --after {page['next']}", err=True)


@click.command()
@job_argument
@json_option
def watch(*, job_id: str, as_json: bool) -> None:
    """Follow a job to its end; exit 1 if it fails or is cancelled."""
    follow_and_print(Service.from_environment(), job_id, as_json=as_json)


@click.command()
@job_argument
@click.option("--discard", is_flag=True, help="Remove sealed work too; a resume begins anew.")
@json_option
def cancel(*, job_id: str, discard: bool, as_json: bool) -> None:
    """Cancel a job; what is sealed stays for a resume."""
    service = Service.from_environment()
    _print_state(service.post(job_path(job_id, "cancel"), {"discard": discard}), as_json)


@click.command()
@job_argument
@json_option
def resume(*, job_id: str, as_json: bool) -> None:
    """Queue a failed or cancelled job again.

    It goes on from what is sealed.
    """
    service = Service.from_environment()
    _print_state(service.post(job_path(job_id, "resume"), with_hub_token=True), as_json)


@click.command()
@job_argument
def delete(*, job_id: str) -> None:
    """Forget a finished job, with the files the service kept for it.

    A result that lies elsewhere stays there.
    """
    Service.from_environment().delete(job_path(job_id))
    print(f"{job_id}  deleted")


def _print_state(job: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        tables.print_json(job)
    else:
        print(f"{job['id']}  {job['status']}")


def goes_on(job_id: str) -> str:
    """Say that only the watching is interrupted."""
    return f"interrupted: the job goes on; `pissa watch {job_id}` follows it again"


def follow_and_print(service: Service, job_id: str, *, as_json: bool) -> None:
    """Follow a job to its end and print how it ended.

    Raises:
        PissaError: if it failed or was cancelled.
        Exit: with status 1, if what was to be verified did not pass.
    """
    with on_interrupt(goes_on(job_id)), display() as shown:
        job = follow(service, job_id, shown)
    if as_json:
        tables.print_json(job)
    elif job["status"] == "succeeded":
        _print_result(job, service)
    if job["status"] != "succeeded":
        raise _failure(job)
    if job["result"].get("passed") is False:
        raise click.exceptions.Exit(ExitStatus.FAILED)


def _print_result(job: Mapping[str, Any], service: Service) -> None:
    result = job["result"]
    if result.get("passed") is not None:
        tables.print_verdict({**result, "manifest": f"{service.url}{result['manifest']}"})
        if not result["passed"]:
            print_first_faults(service.get(job_path(job["id"], "manifest")))
        return
    folded = job["kind"] == "pissa-to-base"
    tables.print_folded(result) if folded else tables.print_result(result)
    for note in result.get("notes") or ():
        click.echo(f"note: {note}", err=True)
    if not str(result["output"]).startswith("hf://"):
        print(f"\nthe files: pissa fetch {job['id']} DIR")


def follow(service: Service, job_id: str, shown: Display) -> dict[str, Any]:
    """Show a job's progress until it is final, and return it.

    It asks rather than listens: that works through every proxy, and survives a restart of the
    service without a second way of doing things.
    """
    track = Track()
    quiet_since: float | None = None
    while True:
        try:
            job = service.get(job_path(job_id))
        except PissaError as error:
            quiet_since = quiet_since or time.monotonic()
            impatient = not track.started or time.monotonic() - quiet_since > PATIENCE_S
            if error.code not in PASSING or impatient:
                raise
            shown.show(Snapshot("no answer from the service, asking again"))
        else:
            quiet_since = None
            snapshot = track.snapshot(job)
            if job["status"] == "queued" and _nobody_works(service):
                snapshot = replace(snapshot, label=NO_WORKER)
            if pause := track.fresh_pause(job):
                shown.note(pause)
            shown.show(snapshot)
            if job["status"] in FINAL:
                return job
        time.sleep(POLL_S)


def _nobody_works(service: Service) -> bool:
    """Whether no worker has told of itself; a proxy may keep the question from us."""
    try:
        return not service.get("readyz").get("workers", True)
    except PissaError:
        return False


@dataclass(slots=True)
class Track:
    """What successive looks at a job tell together: the pace, and what is not told yet."""

    started: bool = False
    pace: Pace = field(default_factory=Pace)
    _seen: int = 0
    _reason: tuple[str, int] | None = None
    _longest_s: float = 0.0

    def fresh_pause(self, job: Mapping[str, Any]) -> str | None:
        """Say what a job waits for, unless it was said and nothing is done or longer since."""
        wait = job.get("waiting")
        if job["status"] != "running" or not wait:
            return None
        message, delay_s = wait["message"] or _LOST, wait["delay_s"]
        reason = (message, job["progress"]["bytes"]["done"])
        if reason == self._reason and delay_s < 2 * self._longest_s:
            return None
        self._reason, self._longest_s = reason, max(delay_s, 1.0)
        return pause_line(delay_s, message)

    def snapshot(self, job: Mapping[str, Any]) -> Snapshot:
        """Turn a job into progress."""
        progress = job["progress"]
        nbytes = progress["bytes"]["done"]
        if not self.started or nbytes < self._seen:
            self.pace = Pace()
        else:
            self.pace.add(nbytes - self._seen)
        self.started, self._seen = True, nbytes
        return Snapshot(
            label=_label(job),
            noun="matrices",
            done=progress["matrices"]["done"],
            total=progress["matrices"]["total"],
            nbytes=nbytes,
            total_nbytes=progress["bytes"]["total"],
            rate=self.pace.rate(),
            left_s=job["eta_s"],
        )


def _label(job: Mapping[str, Any]) -> str:
    status, phase = str(job["status"]), str(job["phase"])
    return phase if status == "running" else status


def _failure(job: Mapping[str, Any]) -> PissaError:
    error = job.get("error") or {}
    how = "goes on from what is sealed" if job.get("staged", True) else "begins it anew"
    again = f"`pissa resume {job['id']}` {how}"
    if job["status"] == "cancelled":
        return error_from("cancelled", f"job {job['id']} was cancelled", again)
    told = error_from(
        error.get("code", "internal"),
        error.get("message", f"job {job['id']} failed and does not say why"),
        error.get("hint"),
    )
    # Resumed, the same request would find the same fault in the same checkpoint.
    if not told.hint and not isinstance(told, CheckpointError | TargetError):
        told.hint = again
    elif told.retryable:
        told.hint = f"{told.hint} (here: `pissa resume {job['id']}`)"
    return told
