"""A student's training as it can be looked at: samples on the way, and the artifact with its figures, pictures and report."""

from stages.watching.artifact import publish_student, save_report
from stages.watching.look import StudentWatch, check_watch
from stages.watching.report import Training

__all__ = ["StudentWatch", "Training", "check_watch", "publish_student", "save_report"]
