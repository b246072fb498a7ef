"""How many bytes the split of one matrix needs while it is in flight; arithmetic only."""

from __future__ import annotations

from pissa_core.svd.forms import Plain
from pissa_core.svd.narrow import fits_narrow, narrow_capacity
from pissa_core.svd.operator import GPU_PANEL_BYTES, GRAM_PANEL, PANEL_BYTES
from pissa_core.svd.routes import fits_krylov, krylov_shape, oversampling
from pissa_core.svd.space import FRESH

_SLACK = 16 << 20  # kernels oneDNN compiles, buffers of BLAS, what the allocator holds back


def working_bytes(
    m: int,
    n: int,
    rank: int,
    dtype_bytes: int,
    method: str,
    rounding: str = "faithful",
    *,
    device: str = "cpu",
) -> int:
    """Return an upper bound of the bytes that splitting one matrix keeps alive at once.

    W (m, n) as stored, in which R is formed, and A, B are counted in. With d = min(m, n),
    D = max(m, n), r = rank, s = dtype_bytes, in bytes:

    * always: s m n + 16 (m + n) r for W, the triplets and the factors, and three panels.
    * ``auto`` by Krylov, k vectors in a full basis (`narrow_capacity`, where that is taken, and
      the few that look outside), b = r + max(8, 16 - r, r / 8): 4 d (k + 8 b) + 48 k^2, or
      16 b (m + n) for the vectors of both sides, and 4 d^2 + 8192 d more if a Gram matrix may be
      formed.
    * ``auto`` where r is large against d: 64 d^2 up to d = 512, 32 d^2 above.
    * ``lowrank``: 8 m n for W in float32 (4 if it is stored so), 24 (m + n) r, and what its
      certificate takes, which is a Krylov run of four steps.
    * ``exact``: 4 m n twice, 4 (m + n) d for all singular vectors, 24 d^2 for LAPACK;
      the vectors stay while R is formed.
    * ``peft`` rounding: s m n for R, and 20 m n for its chain of float32 matrices, after the SVD.
    * on a GPU: panels are larger, three of 256 MB or of W in float32, whichever is less, through
      the search as well; and 4 d^2 for what a panel adds to a Gram matrix. There this is memory of
      the device; the host needs 2 s m n of it, page-locked: torch rounds that up to a power of two
      and keeps it for the next matrix.
    """
    d, r = min(m, n), min(rank, m, n)
    stored = dtype_bytes * m * n + 16 * (m + n) * r
    search = _SEARCH[method](m, n, r, dtype_bytes)
    finish = 3 * max(PANEL_BYTES, 64 * max(m, n)) + 24 * (m + n) * r
    if rounding == "peft":
        finish = (20 + dtype_bytes) * m * n + 16 * (m + n) * r
    if method == "exact":
        finish += 4 * (m + n) * d
    on_gpu = 3 * min(GPU_PANEL_BYTES, 4 * m * n) + 4 * d * d if device == "cuda" else 0
    return stored + max(search, finish) + on_gpu + _SLACK + 64 * d


def _auto(m: int, n: int, r: int, dtype_bytes: int) -> int:
    d, D = min(m, n), max(m, n)
    lift = 16 * (r + oversampling(r)) * (D + d) + 3 * PANEL_BYTES
    if not fits_krylov(d, r):
        return max(_gram(d, D) + (64 if d <= 512 else 32) * d * d, lift)
    shape = krylov_shape(d, r)
    basis = 4 * d * (shape.capacity + 8 * shape.block) + 48 * shape.capacity**2
    if fits_narrow(d, r):
        k = narrow_capacity(d, r)
        basis = max(basis, 4 * d * (k + FRESH * Plain.look + 8 * shape.block) + 48 * k * k)
    return max(basis + _gram(d, D), lift)


def _gram(d: int, D: int) -> int:
    return 4 * d * d + 8 * min(D, GRAM_PANEL) * d + 4 * 256 * d


def _lowrank(m: int, n: int, r: int, dtype_bytes: int) -> int:
    d, D, b = min(m, n), max(m, n), r + oversampling(r)
    widened = (8 if dtype_bytes < 4 else 4) * m * n
    iterate = widened + 24 * (m + n) * r
    certify = 4 * d * 13 * b + 48 * (4 * b) ** 2
    if d <= 5 * b:
        certify = _gram(d, D) + 64 * d * d
    return max(iterate, certify)


def _exact(m: int, n: int, r: int, dtype_bytes: int) -> int:
    d = min(m, n)
    return 8 * m * n + 4 * (m + n) * d + 24 * d * d


_SEARCH = {"auto": _auto, "lowrank": _lowrank, "exact": _exact}
