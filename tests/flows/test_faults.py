"""What `benchmarks.faults` counts: faults of every kind, artifacts that differ, artifacts that can be seen and are not whole."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faults import KINDS, Fault, Outcome, Watch, differences, plan_faults, summary
from benchmarks.processes import descendants
from tests.flows.conftest import ToyChain


def test_faults_are_of_every_kind_and_drawn_from_the_seed() -> None:
    faults = plan_faults(KINDS, 32, seed=1)
    assert Counter(fault.service for fault in faults) == {"worker-cpu": 4, "worker-gpu": 4, "server": 8, "store": 8, "rank": 8}
    assert plan_faults(KINDS, 32, seed=1) == faults != plan_faults(KINDS, 32, seed=2)
    assert all(0 <= fault.moment < 1 for fault in faults) and len({fault.moment for fault in faults}) == 32


def test_what_differs_is_missing_or_half_written_is_found(chain: ToyChain) -> None:
    from flows.preparation import prepare
    from stages.runner import execute

    prepared = prepare(chain.recipe(), chain.address)
    expected = {node.name: execute(prepared.plan, node, prepared.surroundings) for node in prepared.plan.nodes}
    assert differences(chain.store, expected) == [] and seen(chain, expected) == []
    chain.store.remove(expected["select"].identity)
    assert differences(chain.store, expected) == ["select"] and seen(chain, expected) == [], "what cannot be seen is not half-written"
    folder = chain.folder / "store" / "artifacts" / expected["encode"].identity
    (data,) = (path for path in (folder / "files").rglob("*") if path.is_file())
    data.chmod(0o600)
    data.write_bytes(data.read_bytes()[:-1])
    assert differences(chain.store, expected) == ["select", "encode"]
    (problem,) = seen(chain, expected)
    assert problem.startswith("encode: ")
    manifest = chain.folder / "store" / "artifacts" / expected["teacher"].identity / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text()[:100])
    assert [problem.partition(":")[0] for problem in seen(chain, expected)] == ["teacher", "encode"]


def seen(chain: ToyChain, expected: dict[str, object]) -> list[str]:
    """What a watch finds in one look."""
    watch = Watch(chain.address, expected)  # type: ignore[arg-type]
    watch.look()
    return watch.half_written


def test_what_did_not_end_well_is_counted() -> None:
    fault = Fault("store", "store", 0.5, 1.0)
    good, stuck = Outcome(fault, "Completed", 9.0), Outcome(fault, "Running after 900 s", 900.0, ("encode",), ("encode: cut short",))
    assert summary([good, stuck]) == {"trials": 2, "completed": 1, "differing": 1, "half_written": 1}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells of processes in /proc")
def test_processes_of_processes_are_found() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], 'grandchild']); sys.stdin.read()"
    ready = "import sys; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, ready], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        (grandchild,) = descendants(child.pid).values()
        assert grandchild.strip().endswith("grandchild")
