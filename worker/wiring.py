"""What the work of a task needs, put together once in each process that works."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from pissa_core.adapters import open_sink, open_source
from pissa_core.errors import InvalidRequest, OutsideLocalRoot
from pissa_core.ports import PublishOptions
from pissa_core.refs import HubRef, LocalRef, Ref, parse_ref, resolve_local
from worker.connect import connect
from worker.contract import JobRequest, Output, Verify, WithOutput
from worker.errors import StoreUnavailable
from worker.node import Node
from worker.places import output_ref
from worker.settings import Settings
from worker.store.tasks import Claim, LeaseLost, TaskStore
from worker.vault import Vault, open_vault

if TYPE_CHECKING:
    from pathlib import Path

    from pissa_core.adapters.hub import Notice, Pause
    from pissa_core.plan import Plan
    from pissa_core.ports import CheckpointSink, CheckpointSource
    from pissa_core.runtime import Runtime

logger = logging.getLogger(__name__)
_request: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)
Request = TypeVar("Request", bound=WithOutput | Verify)


@dataclass(frozen=True, slots=True)
class Context:
    """The store, the vault, the settings and where the arithmetic runs."""

    tasks: TaskStore
    vault: Vault
    settings: Settings
    runtime: Runtime

    def request_of(self, claim: Claim, kind: type[Request]) -> Request:
        """Return what was asked, which the caller knows to be of a certain kind.

        Raises:
            TypeError: if it is not.
        """
        request = _request.validate_json(claim.request)
        if not isinstance(request, kind):
            raise TypeError(f"{claim.job_id} is {request.kind}, not {kind.__name__}")
        return request

    def limits(self, request: WithOutput) -> dict[str, Any]:
        """Return what bounds a plan: this worker's slots and disk, the request's shard size."""
        limits: dict[str, Any] = {"slots": self.runtime.slots}
        limits["disk_budget"] = self.settings.disk_budget
        if request.output is not None:
            limits["max_shard_size"] = request.output.max_shard_size
            if isinstance(parse_ref(request.output.ref), HubRef):
                limits["scratch"] = self.settings.scratch_dir
        return limits

    def source(self, claim: Claim, ref: str | Ref) -> CheckpointSource:
        """Open a checkpoint with the job's own Hub token.

        Raises:
            OutsideLocalRoot: for a folder that the service may not touch. Requests are checked
                when they come; an adapter may name any path as its base.
        """
        found = trusted_ref(ref) if isinstance(ref, str) else ref
        if isinstance(found, LocalRef) and self.settings.local_root is None:
            raise OutsideLocalRoot(
                f"{found.path!r} is a local folder, and this service takes Hub references only",
                hint="the operator can allow one folder with PISSA_LOCAL_ROOT",
            )
        return open_source(
            found,
            root=self.settings.local_root,
            token=self.vault.open(claim.sealed_token),
            patient=claim.task != "plan",
            on_wait=self._telling(claim),
        )

    def check_size(self, ref: str, nbytes: int) -> None:
        """Refuse a checkpoint of which more is read than the operator allows.

        Raises:
            InvalidRequest: with both numbers.
        """
        ceiling = self.settings.max_model_size
        if ceiling is not None and nbytes > ceiling:
            raise InvalidRequest(
                f"{ref} has {nbytes} bytes to be read, more than the {ceiling} that this service "
                "takes",
                hint="work on it with `pissa` on a machine of your own",
            )

    def check_plan_size(self, plan: Plan, source: CheckpointSource) -> None:
        """Refuse a plan that reads more than the operator allows: shards, and what goes along."""
        sizes = source.files()
        along = sum(sizes[path].size for path in plan.copied)
        self.check_size(plan.source, along + sum(shard.fetched for shard in plan.shards))

    def check_ranks(self, ref: str, ranks: Iterable[int]) -> None:
        """Refuse an adapter of a higher rank than the operator allows.

        Raises:
            InvalidRequest: with both numbers.
        """
        ceiling, highest = self.settings.max_rank, max(ranks, default=0)
        if ceiling is not None and highest > ceiling:
            raise InvalidRequest(
                f"the adapter of {ref} has rank {highest}, above {ceiling}, the highest that this "
                "service takes",
                hint="work on it with `pissa` on a machine of your own",
            )

    def output_name(self, claim: Claim) -> str:
        """Return what names the output in the digest of the staging area."""
        request = self.request_of(claim, WithOutput)
        return str(output_ref(request, claim.job_id, self.settings)[0])

    def sink(self, claim: Claim, digest: str | None = None) -> CheckpointSink:
        """Open the place the result goes to; the digest is the job's own once it is planned."""
        digest = digest or claim.digest
        if digest is None:
            raise LeaseLost(claim.job_id)
        request = self.request_of(claim, WithOutput)
        ref, root = output_ref(request, claim.job_id, self.settings)
        return open_sink(
            ref,
            digest=digest,
            root=root,
            token=self.vault.open(claim.sealed_token),
            scratch=self.settings.scratch_dir,
            options=_options_of(request.output),
            on_wait=self._telling(claim),
        )

    def _telling(self, claim: Claim) -> Notice:
        """Return what tells the store of the Hub's pauses."""

        def tell(pause: Pause | None) -> None:
            if pause is not None:
                error = pause.error
                logger.warning("waiting %.0f s: [%s] %s", pause.seconds, error.code, error.message)
            # A lost lease, or a store that is away, is for the work itself to find out.
            with suppress(LeaseLost, StoreUnavailable):
                if pause is None:
                    self.tasks.going_on(claim)
                else:
                    self.tasks.waiting(claim, pause.error, pause.seconds)

        return tell


def _options_of(output: Output | None) -> PublishOptions | None:
    if output is None:
        return None
    return PublishOptions(output.private, output.overwrite, output.commit_message)


@cache
def context() -> Context:
    """Return this process's context, made from its environment when first asked for."""
    import torch

    from pissa_core.adapters.ledger import Ledger
    from pissa_core.runtime import Runtime
    from pissa_core.traffic import FileGate, Traffic

    torch.set_num_threads(1)
    node, settings = Node(), Settings.from_env()
    connection = connect(settings, patience_s=settings.store_patience_s)
    line, arithmetic = (
        None if node.gates is None else FileGate(node.gates / name) for name in ("line", "device")
    )
    ledger = Ledger(settings.scratch_dir, settings.disk_budget)
    return Context(
        tasks=TaskStore(connection, settings, worker=node.worker),
        vault=open_vault(settings),
        settings=settings,
        runtime=Runtime(
            device=node.device,
            slots=node.slots,
            disk_budget=settings.disk_budget,
            traffic=Traffic(line, arithmetic, ledger),
        ),
    )


def trusted_ref(ref: str) -> Ref:
    """Read a reference that was accepted before, or that we wrote ourselves."""
    # A plan names a folder by its absolute path, which may begin like a reference of another kind.
    return LocalRef(ref) if ref.startswith("/") else parse_ref(ref)


def placed_ref(ref: str, root: Path | None) -> Ref:
    """Read a reference that was accepted before, a folder by its absolute path.

    What is looked for beside a folder, or in it, is named by paths made from its own.
    """
    found = trusted_ref(ref)
    if isinstance(found, LocalRef) and root is not None:
        return LocalRef(str(resolve_local(found, root)))
    return found
