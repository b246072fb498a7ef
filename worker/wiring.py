"""What the work of a task needs, put together once in each process that works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pissa_core.adapters import open_sink, open_source, staging_digest
from pissa_core.errors import SourceChanged
from pissa_core.plan import Plan
from pissa_core.refs import LocalRef, Ref, parse_ref
from worker.connect import connect
from worker.contract import JobRequest
from worker.node import Node
from worker.places import output_ref
from worker.settings import Settings
from worker.store.tasks import Claim, TaskStore
from worker.vault import Vault, open_vault

if TYPE_CHECKING:
    from pissa_core.ports import CheckpointSink, CheckpointSource
    from pissa_core.runtime import Runtime

_request: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)


@dataclass(frozen=True, slots=True)
class Context:
    """The store, the vault, the settings and where the arithmetic runs."""

    tasks: TaskStore
    vault: Vault
    settings: Settings
    runtime: Runtime

    def request_of(self, claim: Claim) -> JobRequest:
        """Return what was asked."""
        return _request.validate_json(claim.request)

    def source(self, claim: Claim, ref: str) -> CheckpointSource:
        """Open a checkpoint with the job's own Hub token."""
        token = self.vault.open(claim.sealed_token)
        return open_source(_trusted(ref), root=self.settings.local_root, token=token)

    def planned_source(self, claim: Claim, plan: Plan) -> CheckpointSource:
        """Open the checkpoint that was planned.

        Raises:
            SourceChanged: if it is no longer in the state that the plan was made from.
        """
        source = self.source(claim, plan.source)
        request = self.request_of(claim)
        if staging_digest(source, request.pissa, self.output_name(claim)) != claim.digest:
            raise SourceChanged(
                f"the files of {plan.source} have changed since the job was planned",
                hint="it is planned again from what is there now",
            )
        return source

    def output_name(self, claim: Claim) -> str:
        """Return what names the output in the digest of the staging area."""
        return str(output_ref(self.request_of(claim), claim.job_id, self.settings)[0])

    def sink(self, claim: Claim, digest: str) -> CheckpointSink:
        """Open the place the result goes to."""
        ref, root = output_ref(self.request_of(claim), claim.job_id, self.settings)
        return open_sink(ref, digest=digest, root=root)


@cache
def context() -> Context:
    """Return this process's context, made from its environment when first asked for."""
    import torch

    from pissa_core.runtime import Runtime

    torch.set_num_threads(1)
    node, settings = Node(), Settings.from_env()
    connection = connect(settings, patience_s=settings.store_patience_s)
    return Context(
        tasks=TaskStore(connection, settings, worker=node.worker),
        vault=open_vault(settings),
        settings=settings,
        runtime=Runtime(device=node.device, slots=node.slots),
    )


def _trusted(ref: str) -> Ref:
    # A plan names a folder by its absolute path, which may begin like a reference of another kind.
    return LocalRef(ref) if ref.startswith("/") else parse_ref(ref)
