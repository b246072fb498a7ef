"""What the tests of the worker share."""

from __future__ import annotations

from service_fixtures import *  # noqa: F403
