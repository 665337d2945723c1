"""A port that is kept for the server that takes the place of a killed one."""

from __future__ import annotations

import socket

import pytest

from simulations.processes import hold_port

HOST = "127.0.0.1"


def test_nobody_answers_there_nobody_gets_it_by_chance_and_the_next_server_takes_it() -> None:
    with socket.create_server((HOST, 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            hold_port(port)
    for _ in range(2):  # a server may be killed more than once
        with hold_port(port) as held, hold_port(port):
            assert held.getsockname() == (HOST, port)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, port))
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((HOST, port))
            with socket.create_server((HOST, port)), socket.create_connection((HOST, port)):
                pass
