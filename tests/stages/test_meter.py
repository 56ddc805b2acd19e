"""What a stage run costs: bytes over the store by all its processes, attempts added up, peaks of its own."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from infra.store import Traffic
from schemas.base import digest
from schemas.manifest import Cost, ImageShards
from stages.meter import Meter
from stages.parallel import map_processes
from tests.workspaces import make_workspace, open_store

CONTENT = ImageShards(rows_in_table=1, images=1, shards=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def count(traffic: Traffic, sizes: tuple[int, int]) -> None:
    traffic.add(read=sizes[0], written=sizes[1])


def test_bytes_of_all_processes_are_counted(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "traffic")
    assert traffic.total() == (0, 0)
    traffic.add(read=1)
    pickle.loads(pickle.dumps(traffic)).add(written=20)
    traffic.add(read=2, written=3)
    assert traffic.total() == (3, 23)


@pytest.mark.slow
def test_bytes_of_spawned_processes_are_counted(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "traffic")
    list(map_processes(partial(count, traffic), [(1, 10), (2, 20), (3, 30)], 2))
    assert traffic.total() == (6, 60)


def test_what_goes_over_the_store_is_counted_by_its_bytes(tmp_path: Path) -> None:
    plain, traffic = open_store(tmp_path), Traffic(tmp_path / "traffic")
    workspace = make_workspace(tmp_path, plain.metered(traffic))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(bytes(1000))
    part = workspace.save_part("piece", tmp_path / "data")
    note = plain._storage.read(f"parts/{workspace.identity}/piece/part.json")
    assert traffic.total() == (0, 1000 + len(note))

    workspace.load_part(part, tmp_path / "back")
    assert traffic.total()[0] == 1000
    made = workspace.publish(tmp_path / "data", CONTENT)
    manifest = plain._storage.read(f"artifacts/{made.identity}/manifest.json")
    assert traffic.total()[1] == 1000 + len(note) + 1000 + len(manifest)

    read = traffic.total()[0]
    assert workspace.read_range(made, "a.bin", 10, 30) == bytes(20)
    workspace.fetch(made)
    assert traffic.total()[0] == read + 20 + 1000
    workspace.fetch(made)  # from this machine's cache
    assert traffic.total()[0] == read + 20 + 1000


def test_attempts_that_ended_early_are_part_of_the_cost_and_not_of_the_parts(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    workspace = make_workspace(tmp_path, store)
    for seconds, memory in ((100.0, 2**50), (20.0, 1)):
        store.note_spent(
            workspace.identity, Cost(wall_seconds=seconds, gpu_hours=2.0, peak_memory_bytes=memory, bytes_read=7, bytes_written=5)
        )
    assert store.parts(workspace.identity) == []
    (tmp_path / "data").mkdir()
    cost = workspace.publish(tmp_path / "data", CONTENT).lineage.cost
    assert 120 < cost.wall_seconds < 180
    assert (cost.attempts, cost.gpu_hours, cost.peak_memory_bytes, cost.bytes_read, cost.bytes_written) == (3, 4.0, 2**50, 14, 10)
    store.delete_parts(workspace.identity)
    assert store.spent(workspace.identity) == []


def test_a_damaged_note_costs_nothing_else(tmp_path: Path) -> None:
    store, identity = open_store(tmp_path), digest("x")
    store.note_spent(identity, Cost(wall_seconds=1.0))
    store._storage.put(f"parts/{identity}/spent/torn.json", b"{")
    assert [cost.wall_seconds for cost in store.spent(identity)] == [1.0]


def test_gpu_hours_are_hours_times_devices_and_none_on_a_cpu(tmp_path: Path) -> None:
    meter = Meter(gpus=4)
    assert Meter.start("cpu", 4, Traffic(tmp_path)).gpus == 0
    found = Meter(gpus=4, started=meter.started - 3600).cost()
    assert found.gpu_hours == pytest.approx(4.0, rel=0.01)
    assert found.gpu_hours == pytest.approx(4 * found.wall_seconds / 3600)


def test_costs_add_up() -> None:
    both = Cost(wall_seconds=1, peak_memory_bytes=5, bytes_read=1).plus(Cost(wall_seconds=2, peak_memory_bytes=3, peak_device_bytes=9))
    assert both == Cost(wall_seconds=3, peak_memory_bytes=5, peak_device_bytes=9, bytes_read=1, attempts=2)
    assert Cost().plus(Cost()).peak_device_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_the_stages_own() -> None:
    """Not that of the stages which the same process ran before, nor of a child that it had before."""
    script = """
import subprocess, sys, tempfile
from pathlib import Path
from infra.store import Traffic
from stages.meter import Meter
def child(megabytes):
    subprocess.run([sys.executable, "-c", f"bytearray({megabytes} << 20)"], check=True)
first = Meter.start("cpu", 1, Traffic(Path(tempfile.mkdtemp())))
held = bytearray(400 << 20); del held
child(300)
peak = first.cost().peak_memory_bytes
second = Meter.start("cpu", 1, Traffic(Path(tempfile.mkdtemp())))
alone = second.cost().peak_memory_bytes
child(600)
print(peak >> 20, alone >> 20, second.cost().peak_memory_bytes >> 20)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    peak, alone, with_child = map(int, shown.split())
    assert peak >= 400 and alone < 300 and with_child >= 600
