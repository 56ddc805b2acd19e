"""Prefect's settings as this project makes them: who is asked for user and password, and where servers listen."""

import os
from pathlib import Path

import pytest

from flows import environment, services
from flows.services import Ask
from infra.seaweedfs import PORTS, new_object_store, seaweedfs_command

CLIENT, SERVER = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, None)),
        ({CLIENT: "a:b"}, ("a:b", "a:b")),
        ({SERVER: "a:b"}, ("a:b", "a:b")),
        ({CLIENT: "", SERVER: "a:b"}, ("a:b", "a:b")),
        ({CLIENT: "of:another", SERVER: "a:b"}, ("of:another", "a:b")),
    ],
)
def test_one_setting_of_user_and_password_is_both(
    given: dict[str, str], expected: tuple[str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (CLIENT, SERVER):
        monkeypatch.setenv(name, "")  # so that what prepare() sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment.prepare()
    assert (os.environ.get(CLIENT), os.environ.get(SERVER)) == expected
    assert services._authentication() == ({CLIENT: expected[0]} if expected[0] else {})


def test_servers_listen_on_the_loopback_interface(tmp_path: Path) -> None:
    server = services.server_service(Ask(tmp_path)).command
    assert server[server.index("--host") + 1] == "127.0.0.1"
    store = new_object_store(8333)
    command = seaweedfs_command(tmp_path, store, range(PORTS))
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1"} <= set(command) and store.endpoint == "http://127.0.0.1:8333"
    assert not any(store.secret_key in word for word in command), "anybody on this machine can read the arguments of a process"
