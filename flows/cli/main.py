"""The list of commands, and what all share: logging, signals, and errors turned into one sentence and an exit code."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from flows.cli import artifacts, comparing, composing, deploying, publishing, recipes, running, sampling, services
from flows.cli.console import Stopped, errors, set_up_logging
from schemas.errors import BadInput, DistillError

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
RESUME = "what was finished is kept, and the same command goes on from there"
SHARED_FLAGS = ("--debug", "--verbose", "-v", "-vv")

app = typer.Typer(
    name="distill",
    help="From any text-to-image diffusion teacher and a table of image URLs to students of few steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (running, deploying, services, recipes, artifacts, comparing, publishing, sampling, composing):
    group.register(app)


@app.callback()
def shared(
    verbose: int = typer.Option(0, "--verbose", "-v", count=True, help="Say more; twice: also what libraries say."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
) -> None:
    """From any text-to-image diffusion teacher and a table of image URLs to students of few steps."""
    set_up_logging(verbose, debug=debug)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with 0, 1 (failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM).

    An error that is not one of ours is a mistake of the program: it goes through, with its traceback, and the exit code is 1 as well.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = [argument for argument in given if argument in SHARED_FLAGS]  # they may stand after the command as well
    rest = [argument for argument in given if argument not in SHARED_FLAGS]
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(_exit_code([*flags, *rest], debug="--debug" in flags))


def _exit_code(arguments: list[str], *, debug: bool) -> int:
    try:
        app(arguments, prog_name="distill")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else FAILED
        if code == INTERRUPTED:
            errors.print(f"interrupted: {RESUME}")
        return code
    except KeyboardInterrupt:
        errors.print(f"interrupted: {RESUME}")
        return INTERRUPTED
    except Stopped:
        errors.print(f"terminated: {RESUME}")
        return TERMINATED
    except DistillError as error:
        if debug:
            errors.print_exception()
        errors.print(f"error: {error}", style="bold red")
        return BAD_INPUT if isinstance(error, BadInput) else FAILED
    return 0


def _stop(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would stop the saving of the checkpoint
    raise Stopped
