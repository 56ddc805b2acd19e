"""What the command line writes: results to stdout, everything else to stderr."""

import logging
from copy import copy

from rich.console import Console
from rich.logging import RichHandler

from flows.environment import server_is_configured
from schemas.errors import DistillError

# No markup: a path or a sentence with [brackets] in it, such as the extras of a package, is text.
output = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


class Stopped(BaseException):
    """SIGTERM arrived. Raised in the main thread, so that a training loop saves its checkpoint on the way out."""


class _Named(logging.Formatter):
    """Says which task or flow run a record of Prefect's is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        name = getattr(record, "task_run_name", None) or getattr(record, "flow_run_name", None)
        return f"{name}: {record.message}" if name and record.name.startswith("prefect") else record.message


class _Quiet(_Named):
    """Leaves out tracebacks of errors that say all in their one sentence. The run's page in Prefect keeps them."""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and isinstance(record.exc_info[1], DistillError | KeyboardInterrupt | Stopped):
            record = copy(record)  # other handlers get the same one
            record.exc_info = record.exc_text = None
        return super().format(record)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Prefect says of the error that the command itself ends with. The run's page in Prefect keeps it."""
    repeated = ("Encountered exception during execution", "Finished in state Failed(")
    return not (record.name.startswith("prefect") and record.getMessage().startswith(repeated))


def set_up_logging(verbose: int, *, debug: bool) -> None:
    """Send all logging to stderr, our own from INFO, with `verbose` 1 from DEBUG, with 2 also that of libraries."""
    handler = RichHandler(console=errors, show_path=False, markup=False, log_time_format="%H:%M:%S")
    handler.setFormatter(_Named() if debug else _Quiet())
    if not debug:
        handler.addFilter(_is_news)
    if not server_is_configured():  # the embedded server has no pages, and ends with the command
        handler.addFilter(lambda record: not str(record.msg).startswith("View at "))
    logging.basicConfig(level=logging.DEBUG if verbose > 1 else logging.WARNING, handlers=[handler], force=True)
    for room in ("flows", "stages", "infra"):
        logging.getLogger(room).setLevel(logging.DEBUG if verbose else logging.INFO)
