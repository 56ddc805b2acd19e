"""Threads that parse at once, with a garbage collector that hands over to the next in the middle of a tree."""

import subprocess
import sys

import pytest

THREADS = """
import ast, gc, inspect, threading, time
{before}
source, failed = inspect.getsource(ast), []
gc.callbacks.append(lambda *_: time.sleep(1e-5))
gc.set_threshold(100)

def parse():
    for _ in range(5):
        try:
            ast.parse(source)
        except SystemError as error:
            failed.append(error)

def deeper(depth):
    return deeper(depth - 1) if depth else parse()

threads = [threading.Thread(target=deeper, args=(10 * number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(failed))
"""


def failures(before: str) -> int:
    return int(subprocess.run([sys.executable, "-c", THREADS.format(before=before)], check=True, capture_output=True, text=True).stdout)


def test_threads_parse_in_turn() -> None:
    assert failures("import flows") == 0


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the collector waits for the tree")
def test_they_would_fail_otherwise() -> None:
    assert failures("") > 0
