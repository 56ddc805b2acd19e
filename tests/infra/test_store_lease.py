import threading
import time

import pytest

from infra.store import ArtifactStore, lease
from infra.store.lease import LeaseRecord
from schemas.base import digest
from tests.infra.conftest import CONTENT, LINEAGE, Write

ID = digest("leased")


def record_of_another_host(**changes: object) -> LeaseRecord:
    fields = {"holder": "elsewhere:1:x", "host": "elsewhere", "pid": 1, "process_started": "1", "boot": "other", "seconds": 60.0}
    return LeaseRecord.model_validate(fields | changes)


def put(store: ArtifactStore, record: LeaseRecord, generation: int = 1) -> None:
    store._storage.put(f"leases/{ID}/{generation:08d}.json", record.model_dump_json().encode())


def test_one_holds_and_the_other_waits(store: ArtifactStore) -> None:
    waited_for: list[str] = []
    order: list[str] = []

    def second() -> None:
        with store.lease(ID, poll_seconds=0.05, on_wait=waited_for.append) as held:
            order.append("second")
            assert not held.already_done

    with store.lease(ID) as first:
        assert first.generation == 1
        thread = threading.Thread(target=second)
        thread.start()
        while not waited_for:
            time.sleep(0.01)
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"]
    assert len(waited_for) == 1


def test_waiting_ends_when_the_artifact_is_there(store: ArtifactStore, write: Write) -> None:
    put(store, record_of_another_host())
    waiting = threading.Event()

    def other() -> None:
        waiting.wait()
        store.publish(write("one", {"a": b"1"}), identity=ID, content=CONTENT, lineage=LINEAGE)

    thread = threading.Thread(target=other)
    thread.start()
    with store.lease(ID, poll_seconds=0.05, on_wait=lambda _: waiting.set()) as held:
        assert held.already_done
    thread.join()


def test_nothing_is_left_after_the_work(store: ArtifactStore, write: Write) -> None:
    with store.lease(ID) as held:
        assert not held.already_done
        store.publish(write("one", {"a": b"1"}), identity=ID, content=CONTENT, lineage=LINEAGE)
    assert list(store._storage.objects("leases/")) == []


def test_a_failed_run_gives_the_lease_back(store: ArtifactStore) -> None:
    with pytest.raises(ZeroDivisionError), store.lease(ID):
        raise ZeroDivisionError
    began = time.monotonic()
    with store.lease(ID, poll_seconds=5) as held:
        assert held.generation == 2
    assert time.monotonic() - began < 4


def test_expired_lease_of_another_host_is_taken_over(store: ArtifactStore) -> None:
    put(store, record_of_another_host(seconds=1.5))
    with store.lease(ID, poll_seconds=0.1) as held:
        assert held.generation == 2
        assert not held.already_done


def test_a_renewed_lease_is_not_taken(store: ArtifactStore) -> None:
    took_over = threading.Event()

    def second() -> None:
        with store.lease(ID, poll_seconds=0.1):
            took_over.set()

    with store.lease(ID, seconds=1.5) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert not took_over.wait(3.5)  # more than twice the lease
        assert not first.lost
    thread.join(timeout=20)
    assert took_over.is_set()


def test_a_silent_holder_is_stuck_even_when_the_store_has_no_clock(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time stamps of the store say the lease is fresh for ever: our own watch decides."""
    put(store, record_of_another_host(seconds=0.5))
    monkeypatch.setattr(type(store._storage), "now", lambda _: 0.0)
    with store.lease(ID, poll_seconds=0.1) as held:
        assert held.generation == 2


def test_one_of_many_takers_wins(store: ArtifactStore) -> None:
    put(store, record_of_another_host(released=True))
    held_at_once: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def taker() -> None:
        with store.lease(ID, poll_seconds=0.02) as held:
            with lock:
                held_at_once.append(held.generation)
                most.append(len(held_at_once))
            time.sleep(0.02)
            with lock:
                held_at_once.remove(held.generation)

    threads = [threading.Thread(target=taker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 6


def test_the_lease_of_a_killed_process_is_taken_at_once(store: ArtifactStore, address: str, other_process) -> None:
    process = other_process("hold", address, ID)
    assert process.stdout.readline() == "held\n"
    process.kill()  # and not waited for: a process that is only waiting to be reaped is gone too
    began = time.monotonic()
    with store.lease(ID, poll_seconds=0.1) as held:
        assert held.generation == 2
    assert time.monotonic() - began < 10  # the lease was for 60 s


def test_a_holder_that_was_taken_over_knows(store: ArtifactStore) -> None:
    with store.lease(ID, seconds=0.6) as held:
        put(store, record_of_another_host(), generation=2)
        deadline = time.monotonic() + 10
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held.lost
    assert [info.key for info in store._storage.objects(f"leases/{ID}/00000002")] == [f"leases/{ID}/00000002.json"]


def test_a_used_again_process_id_is_not_the_holder() -> None:
    mine = lease._new_record(60)
    assert not lease._process_is_gone(mine)
    assert lease._process_is_gone(mine.model_copy(update={"process_started": "1"}))
    assert not lease._process_is_gone(mine.model_copy(update={"process_started": "1", "boot": "another"}))
    assert not lease._process_is_gone(mine.model_copy(update={"process_started": "1", "host": "another"}))
