"""Figures as TensorBoard reads them: in a file of the artifact, whose bytes depend on the figures alone, and in a folder while training goes on."""

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from stages.training.metrics import Row, kept_rows

EVENTS_FILE: Final = "events.out.tfevents.0000000000.distill"
"""TensorBoard knows event files by `tfevents` in their name."""

_CONVERSION: Final = "conversion"
_VERSION: Final = "brain.Event:2"


def write_events(rows: Sequence[Row], pictures: Mapping[str, Mapping[int, bytes]], path: Path, converted: Sequence[Row] = ()) -> None:
    """Write the figures of all steps that were kept and PNG `pictures` by tag and step. In place of the time an event has a second for each step.

    `converted` are those of a training that went before, with steps of its own: all of it lies under `conversion/`.
    """
    by_step: dict[int, list[Summary.Value]] = {int(row["step"]): _scalars(row) for row in kept_rows(rows)}
    for row in kept_rows(converted):
        before = {f"{_CONVERSION}.{name}": value for name, value in row.items() if name != "step"}
        by_step.setdefault(int(row["step"]), []).extend(_scalars(before))
    for tag, steps in pictures.items():
        for step, png in steps.items():
            by_step.setdefault(step, []).append(Summary.Value(tag=tag, image=_image(png)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=0.0, file_version=_VERSION).SerializeToString(deterministic=True))
        for step, values in sorted(by_step.items()):
            event = Event(wall_time=float(step), step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString(deterministic=True))


class LiveEvents:
    """The same figures in a folder that TensorBoard watches. No part of any result; what cannot be written there stops the run."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def add(self, row: Row) -> None:
        """Write a step's figures."""
        values = _scalars(row)
        self._writer.add_event(Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values)))

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


def _scalars(row: Row) -> list[Summary.Value]:
    """By name: a row that was read back from a checkpoint has its figures in another order."""
    return [Summary.Value(tag=_tag(name), simple_value=value) for name, value in sorted(row.items()) if name != "step"]


def _tag(name: str) -> str:
    """`student.loss` as `student/loss`: TensorBoard groups by what stands before the slash."""
    return name.replace(".", "/", 1)


def _image(png: bytes) -> Summary.Image:
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
    return Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
