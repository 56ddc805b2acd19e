"""A student's training as it can be looked at: samples on the way, and the artifact with its figures, pictures and report."""

from stages.watching.artifact import publish_student
from stages.watching.look import StudentWatch, check_watch

__all__ = ["StudentWatch", "check_watch", "publish_student"]
