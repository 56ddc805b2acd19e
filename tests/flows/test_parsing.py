"""Two threads that parse at once: the garbage collector hands over to the other in the middle of a tree."""

import subprocess
import sys

import pytest

THREADS = """
import ast, gc, inspect, threading
{before}
source = inspect.getsource(ast)
begin, parsed, collections = threading.Event(), threading.Event(), []

def parse_deeper(depth):
    if depth:
        return parse_deeper(depth - 1)
    begin.wait()
    ast.parse("1")
    parsed.set()

def hand_over(phase, _):
    collections.append(phase)
    if len(collections) == 20:
        begin.set()
        parsed.wait(1)

other = threading.Thread(target=parse_deeper, args=(50,))
other.start()
gc.callbacks.append(hand_over)
gc.set_threshold(100)
try:
    ast.parse(source)
    print("parsed")
except SystemError as error:
    print(error)
gc.callbacks.clear()
begin.set()
other.join()
assert len(collections) > 20, "handed over in the middle"
"""


def outcome(before: str) -> str:
    return subprocess.run([sys.executable, "-c", THREADS.format(before=before)], check=True, capture_output=True, text=True).stdout


def test_threads_parse_in_turn() -> None:
    assert outcome("import flows") == "parsed\n"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the collector waits for the tree")
def test_they_would_fail_otherwise() -> None:
    assert "recursion depth mismatch" in outcome("")
