"""When a recipe is run by itself."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from schemas.base import Field, Mistake, Model


class Schedule(Model):
    """`schedule`: `distill deploy --schedule RECIPE` has the chain run at these times. Stages whose inputs are the same are found, so that a run
    costs what has changed: a longer table, another teacher."""

    cron: str | None = None
    """Minute, hour, day of the month, month, day of the week, such as `0 2 * * *`. Either this or `every_hours`."""
    every_hours: Annotated[float, Field(ge=0.25)] | None = None
    timezone: str = "UTC"
    """IANA name, such as `Europe/Berlin`: of `cron`."""
    until: str | None = None
    """Stage run to end with, such as `encode`, for a refresh of the data alone. null: the whole chain."""
    overlap: Literal["skip", "wait"] = "skip"
    """What becomes of a run whose time comes while the one before still runs. `skip`: it is cancelled; `wait`: it is begun afterwards."""


_CRON_FIELD = re.compile(r"^[0-9A-Za-z*/,#-]+$")


def _one_of_two(schedule: Schedule) -> Iterator[Mistake]:
    if (schedule.cron is None) == (schedule.every_hours is None):
        yield ("cron",), schedule.cron, "expected exactly one of cron and every_hours"
    fields = (schedule.cron or "* * * * *").split()
    if len(fields) != 5 or not all(_CRON_FIELD.match(field) for field in fields):
        yield ("cron",), schedule.cron, "expected five fields, such as 0 2 * * *"


def _zone_is_known(schedule: Schedule) -> Iterator[Mistake]:
    try:
        ZoneInfo(schedule.timezone)
    except (OSError, ValueError, KeyError):  # the last for a name that is not found
        yield ("timezone",), schedule.timezone, "expected an IANA name, such as Europe/Berlin"


Schedule.cross_checks = (_one_of_two, _zone_is_known)
