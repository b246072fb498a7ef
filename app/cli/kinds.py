"""Kinds of values that options and arguments take: a size, a device, a job's id."""

from __future__ import annotations

import re
from typing import Any

import click

from worker.terms import Status


class Size(click.ParamType[int]):
    """A number of bytes: 4000000000, 4GB, 3.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse; a size that is none, or is zero, is a usage error."""
        from worker.settings import parse_size

        try:
            nbytes = int(str(parse_size(str(value))))
        except ValueError:
            nbytes = 0
        if nbytes == 0:
            self.fail(f"{value!r} is not a size; write 4GB, 3.5GiB or a number of bytes", param)
        return nbytes


class Device(click.ParamType[str]):
    """Where the arithmetic runs."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the spelling; whether the device is there, torch knows."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is no device; write auto, cpu, cuda or cuda:0", param)
        return str(value)


class JobId(click.ParamType[str]):
    """The id of a job, as `submit` prints it."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the letters; whether there is such a job, the service knows."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", str(value)):
            self.fail(f"{value!r} is no job id; `pissa jobs` lists them", param)
        return str(value)


class Statuses(click.ParamType[str]):
    """States of jobs, separated by commas."""

    name = "statuses"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the words."""
        known = [status.value for status in Status]
        for word in str(value).split(","):
            if word not in known:
                self.fail(f"{word!r} is no state of a job; there are {', '.join(known)}", param)
        return str(value)
