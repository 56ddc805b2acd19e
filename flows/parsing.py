"""One thread at a time builds a syntax tree, where Python needs it.

Python 3.11 counts the depth of the tree per interpreter, and its garbage collector may hand over to another thread in the middle of it. Two threads
that parse then fail with `SystemError: AST constructor recursion depth mismatch`. A flow run does that: pydantic parses the source of a model for its
docstrings while a stage is imported, and signatures while Prefect's threads make their own models. From 3.12 on the collector waits for the tree.
"""

import ast
import functools
import sys
import threading
from typing import Any


def parse_in_turn() -> None:
    """Let `ast.parse`, by which pydantic and `inspect` parse, be called by one thread after another. Harmless when called again."""
    if sys.version_info >= (3, 12) or hasattr(ast.parse, "__wrapped__"):
        return
    parse, turn = ast.parse, threading.RLock()  # a finalizer may parse in the middle of it

    @functools.wraps(parse)
    def in_turn(*arguments: Any, **named: Any) -> Any:
        with turn:
            return parse(*arguments, **named)

    ast.parse = in_turn
