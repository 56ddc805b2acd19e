"""Ports for services that are to be started."""

import secrets
import socket

import pytest

from infra.seaweedfs import free_ports


def test_a_port_in_use_is_passed_over_and_none_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    below, above, free, other = free_ports(4)
    drawn = iter([below - 20_000, above - 20_000, free - 20_000, free - 20_000, other - 20_000])
    monkeypatch.setattr(secrets, "randbelow", lambda _: next(drawn))
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", below))
        second.bind(("127.0.0.1", above + 10_000))
        assert free_ports(2) == [free, other]
