"""The services of one machine: started, healthy, refused a second time, stopped; and the supervision that they are under."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import services, supervision
from flows.services import Ask
from flows.supervision import Service, Supervisor
from infra.seaweedfs import free_ports
from schemas.errors import BadInput, RunFailed
from tests.flows.conftest import ToyChain

WAIT = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).touch(); print('ready', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAIT


def service(name: str, folder: Path, code: str = WAIT) -> Service:
    return Service(name, [sys.executable, "-c", code, str(folder / name)], {}, (folder / name).exists)


def test_services_are_stopped_last_first_and_a_stubborn_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "STOP_SECONDS", 0.5)
    with Supervisor(tmp_path / "logs") as supervisor:
        for name, code in (("first", STUBBORN), ("second", WAIT)):
            supervisor.start(service(name, tmp_path, code), seconds=60)
        started = [process for _, process in supervisor._running]
        supervisor.check()
        assert (tmp_path / "logs" / "first.log").read_text() == "ready\n"
    assert [process.returncode for process in started] == [-signal.SIGKILL, -signal.SIGTERM]


def test_a_service_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor, pytest.raises(RunFailed, match=r"exit code 3; the end of .*\n.*no such database"):
        supervisor.start(service("server", tmp_path, "print('no such database'); raise SystemExit(3)"), seconds=60)
    with Supervisor(tmp_path) as supervisor, pytest.raises(RunFailed, match=r"silent: did not answer within 0\.5 s"):
        supervisor.start(Service("silent", [sys.executable, "-c", "import time; time.sleep(600)"], {}, lambda: False), seconds=0.5)
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(service("worker", tmp_path), seconds=60)
        supervisor._running[0][1].kill()
        supervisor._running[0][1].wait()
        with pytest.raises(RunFailed, match="worker: ended with exit code -9"):
            supervisor.check()


def test_what_ends_is_started_again_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RESTARTS", 1)
    with Supervisor(tmp_path / "logs") as supervisor:
        for name in ("first", "second"):
            supervisor.start(service(name, tmp_path), seconds=60)
        before, other = supervisor.pid_of("first"), supervisor.pid_of("second")
        supervisor.keep_up()
        assert supervisor.pid_of("first") == before
        os.killpg(before, signal.SIGKILL)
        supervisor._running[0][1].wait()
        supervisor.keep_up()
        assert (supervisor.pid_of("first") != before, supervisor.pid_of("second")) == (True, other)
        assert [entry.name for entry, _ in supervisor._running] == ["first", "second"], "what is stopped last is the same"
        supervisor.check()
        os.killpg(supervisor.pid_of("first"), signal.SIGKILL)
        supervisor._running[0][1].wait()
        with pytest.raises(RunFailed, match="first: ended with exit code -9"):
            supervisor.keep_up()


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BadInput, match=r"--port: port .* is in use"):
            services.run_services(Ask(tmp_path, port=other.getsockname()[1]), lambda: None)


def test_what_is_not_up_is_neither_looked_at_nor_stopped(tmp_path: Path) -> None:
    for folder in (tmp_path / "never", tmp_path):
        for ask in (services.health, services.stop_services):
            with pytest.raises(BadInput, match="no services are up"):
                ask(folder)
    (tmp_path / "state.json").write_text(json.dumps({"pid": os.getpid()}))  # of services that were killed: nobody holds the lock
    with pytest.raises(BadInput, match="no services are up"):
        services.stop_services(tmp_path)


@pytest.mark.service
@pytest.mark.slow
def test_server_store_and_worker_of_one_machine(chain: ToyChain) -> None:
    port = free_ports(1)[0]
    folder = chain.folder / "services"
    up = chain.command("services", "up", "--folder", str(folder), "--port", str(port), "--pool", "cpu")
    try:
        end = time.monotonic() + 600
        while not services.is_up(folder):
            assert up.poll() is None and time.monotonic() < end, up.communicate()
            time.sleep(0.2)
        code, output, errors = chain.run("services", "status", "--folder", str(folder))
        assert (code, output) == (0, "server: healthy\nstore: healthy\nworker-cpu: healthy\n"), errors
        with pytest.raises(BadInput, match="its services are up"):
            services.forget_ended(folder)
        reach = json.loads((folder / "state.json").read_text())["environment"]
        assert reach["PREFECT_API_URL"] == f"http://127.0.0.1:{port}/api"
        assert {path.stem for path in (folder / "logs").iterdir()} == {"server", "store", "worker-cpu"}
        secrets = [folder / "environment", folder / "state.json", folder / "store" / "s3.json", folder / "store" / "known.json"]
        assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
        services.stop_services(folder)
        output, errors = up.communicate(timeout=60)
    finally:
        up.kill()
        up.wait()
    assert up.returncode == 143 and f"http://127.0.0.1:{port}\n" in output, errors
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    assert not subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
