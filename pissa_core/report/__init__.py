"""What a result says about itself: manifest, card and pictures, as pure functions of the plan.

Nothing here knows the time, the host or a path of this machine: the same job gives the same
bytes.
"""

from __future__ import annotations

from pissa_core.report.card import card
from pissa_core.report.figures import Totals, totals
from pissa_core.report.manifest import canonical_json, manifest, versions
from pissa_core.report.pictures import pictures

__all__ = ["Totals", "canonical_json", "card", "manifest", "pictures", "totals", "versions"]
