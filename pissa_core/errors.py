"""Every error a user can meet, as one tree; each class has a stable code.

::

    PissaError                       internal
    ├── Refused                      before anything is opened: exit status 2, HTTP 422
    │   ├── InvalidRequest           invalid_request
    │   ├── InvalidConfig            invalid_config
    │   ├── InvalidReference         invalid_reference
    │   └── OutsideLocalRoot         outside_local_root
    ├── AccessError                  the model cannot be reached
    │   ├── RepoNotFound             repo_not_found
    │   ├── RevisionNotFound         revision_not_found
    │   ├── FolderNotFound           folder_not_found
    │   ├── GatedRepo                gated_repo
    │   ├── NoReadAccess             no_read_access
    │   ├── NoWriteAccess            no_write_access
    │   ├── TokenInvalid             token_invalid
    │   ├── RateLimited              rate_limited            retryable
    │   ├── HubUnavailable           hub_unavailable         retryable
    │   ├── DownloadCorrupt          download_corrupt        retryable
    │   └── SourceChanged            source_changed          retryable
    ├── CheckpointError              the files are not what they should be
    │   ├── NoSafetensors            no_safetensors
    │   ├── IndexMissingShard        index_missing_shard
    │   ├── ShardTruncated           shard_truncated
    │   ├── HeaderInvalid            header_invalid
    │   ├── UnsafePath               unsafe_path
    │   ├── QuantizedCheckpoint      quantized_checkpoint
    │   ├── UnsupportedDtype         unsupported_dtype
    │   └── NonFiniteWeight          non_finite_weight
    ├── TargetError                  what was asked does not fit the model
    │   ├── NothingMatched           nothing_matched
    │   ├── RankTooLarge             rank_too_large
    │   ├── TiedWeight               tied_weight
    │   ├── UnsupportedModule        unsupported_module
    │   ├── UnsupportedArchitecture  unsupported_architecture
    │   └── AmbiguousName            ambiguous_name
    ├── OutputError                  the result cannot go there
    │   ├── OutputExists             output_exists
    │   ├── OutputIsSource           output_is_source
    │   └── OutputInsideSource       output_inside_source
    ├── ResourceError                the machine is too small or full
    │   ├── DiskTooSmall             disk_too_small
    │   ├── MemoryTooSmall           memory_too_small
    │   ├── OutOfMemory              out_of_memory
    │   └── DiskFull                 disk_full
    ├── WayBackError                 a trained adapter cannot be converted back
    │   ├── AdaptersDoNotMatch       adapters_do_not_match
    │   ├── UnsupportedAdapter       unsupported_adapter
    │   └── WrongBase                wrong_base
    └── RunError                     the job itself
        ├── WorkerLost               worker_lost
        ├── NoSuitableWorker         no_suitable_worker
        ├── AttemptsExhausted        attempts_exhausted
        └── Cancelled                cancelled

``message`` is one sentence for the user (what, where, which numbers); ``hint`` says what to
try. Neither may hold a secret. The cause is chained (``raise … from error``) for the log.
What HTTP alone can say (401, 404, 409, …) has its classes in ``app.errors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

LONGEST = 2000
"""Characters of a message that are kept."""


class PissaError(Exception):
    """An error with a stable ``code``, a sentence, and perhaps a hint of what to try."""

    code: str = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # What a stranger's file holds may be quoted, and have any length.
        if len(message) > LONGEST:
            message = f"{message[:LONGEST]}…"
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_dict(self) -> dict[str, str | None]:
        """Return the error as jobs and ``--json`` show it: code, message, hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class Refused(PissaError):
    """The request alone shows that it cannot be carried out; nothing was opened."""


class InvalidRequest(Refused):
    """A request that does not fit its schema, outside the PiSSA config."""

    code = "invalid_request"


class InvalidConfig(Refused):
    """A PiSSA config with an unknown field, a bad value or fields that contradict."""

    code = "invalid_config"


class InvalidReference(Refused):
    """A model reference that fits neither a Hub repo nor a local folder."""

    code = "invalid_reference"


class OutsideLocalRoot(Refused):
    """A local folder that the service may not touch."""

    code = "outside_local_root"


class AccessError(PissaError):
    """The model or the output cannot be reached."""


class RepoNotFound(AccessError):
    """No such Hub repo, or a private one that this token cannot see."""

    code = "repo_not_found"


class RevisionNotFound(AccessError):
    """The repo exists, the branch, tag or commit does not."""

    code = "revision_not_found"


class FolderNotFound(AccessError):
    """No such local folder, or no such subfolder of a repo."""

    code = "folder_not_found"


class GatedRepo(AccessError):
    """The repo's licence must be accepted on its page first."""

    code = "gated_repo"


class NoReadAccess(AccessError):
    """The source exists and may not be read."""

    code = "no_read_access"


class NoWriteAccess(AccessError):
    """The output exists or could be made, and may not be written."""

    code = "no_write_access"


class TokenInvalid(AccessError):
    """The Hub does not know the token, or it has expired."""

    code = "token_invalid"


class RateLimited(AccessError):
    """The Hub asks to wait."""

    code = "rate_limited"
    retryable = True


class HubUnavailable(AccessError):
    """The Hub does not answer, or answers with a server error."""

    code = "hub_unavailable"
    retryable = True


class DownloadCorrupt(AccessError):
    """The bytes that arrived do not have the promised checksum."""

    code = "download_corrupt"
    retryable = True


class SourceChanged(AccessError):
    """The source's files changed while it was being read."""

    code = "source_changed"
    retryable = True


class CheckpointError(PissaError):
    """The checkpoint's files are not what they should be."""


class NoSafetensors(CheckpointError):
    """The model has no safetensors weights."""

    code = "no_safetensors"


class IndexMissingShard(CheckpointError):
    """The index names a shard, or a tensor in a shard, that is not there."""

    code = "index_missing_shard"


class ShardTruncated(CheckpointError):
    """A shard is shorter than its header promises."""

    code = "shard_truncated"


class HeaderInvalid(CheckpointError):
    """A safetensors header, or a JSON file of the checkpoint, that breaks its format."""

    code = "header_invalid"


class UnsafePath(CheckpointError):
    """A file name in the checkpoint that points outside its folder, or is no text."""

    code = "unsafe_path"


class QuantizedCheckpoint(CheckpointError):
    """The weights are quantised; PiSSA needs the full-precision model."""

    code = "quantized_checkpoint"


class UnsupportedDtype(CheckpointError):
    """A target's dtype is none of float32, float16, bfloat16."""

    code = "unsupported_dtype"


class NonFiniteWeight(CheckpointError):
    """A target matrix holds NaN or Inf."""

    code = "non_finite_weight"


class TargetError(PissaError):
    """What was asked does not fit the model."""


class NothingMatched(TargetError):
    """No module of the model is a target."""

    code = "nothing_matched"


class RankTooLarge(TargetError):
    """The rank exceeds min(m, n) of a target."""

    code = "rank_too_large"


class TiedWeight(TargetError):
    """The target's weight is shared with another module, which would change too."""

    code = "tied_weight"


class UnsupportedModule(TargetError):
    """The target is of a kind that PiSSA has no residual for."""

    code = "unsupported_module"


class UnsupportedArchitecture(TargetError):
    """The model's class cannot be converted correctly."""

    code = "unsupported_architecture"


class AmbiguousName(TargetError):
    """A module's weight cannot be tied to exactly one tensor of the checkpoint."""

    code = "ambiguous_name"


class OutputError(PissaError):
    """The result cannot go where it was asked to go."""


class OutputExists(OutputError):
    """There is something already, and it is not ours to replace."""

    code = "output_exists"


class OutputIsSource(OutputError):
    """Source and output are the same place."""

    code = "output_is_source"


class OutputInsideSource(OutputError):
    """The output lies inside the source."""

    code = "output_inside_source"


class ResourceError(PissaError):
    """The machine is too small, or full."""


class DiskTooSmall(ResourceError):
    """The plan needs more disk than there is; found before work starts."""

    code = "disk_too_small"


class MemoryTooSmall(ResourceError):
    """The largest matrix does not fit the memory budget; found before work starts."""

    code = "memory_too_small"


class OutOfMemory(ResourceError):
    """Memory ran out while working."""

    code = "out_of_memory"


class DiskFull(ResourceError):
    """The disk filled up while working."""

    code = "disk_full"


class WayBackError(PissaError):
    """A trained adapter cannot be converted back."""


class AdaptersDoNotMatch(WayBackError):
    """Trained and initial adapter do not belong together."""

    code = "adapters_do_not_match"


class UnsupportedAdapter(WayBackError):
    """The adapter uses something that cannot be converted correctly."""

    code = "unsupported_adapter"


class WrongBase(WayBackError):
    """The adapter was trained on another base."""

    code = "wrong_base"


class RunError(PissaError):
    """Something about the job itself, not about the model."""


class WorkerLost(RunError):
    """The worker that held the job died or stopped answering."""

    code = "worker_lost"


class NoSuitableWorker(RunError):
    """No worker shares the storage the job needs."""

    code = "no_suitable_worker"


class AttemptsExhausted(RunError):
    """The job was tried as often as allowed."""

    code = "attempts_exhausted"


class Cancelled(RunError):
    """The job was cancelled."""

    code = "cancelled"


def all_errors(root: type[PissaError] = PissaError) -> Iterator[type[PissaError]]:
    """Yield `root` and every class below it, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from all_errors(child)


def error_from(code: str, message: str, hint: str | None = None) -> PissaError:
    """Rebuild an error that crossed a process or the wire as code, sentence and hint.

    The class is the one with that code among those imported here; a code this process does not
    know (a newer service's, or one of HTTP alone) keeps its name on a plain `PissaError`.
    """
    for known in all_errors():
        if known.code == code:
            return known(message, hint=hint)
    foreign = PissaError(message, hint=hint)
    foreign.code = code
    return foreign
