"""How the server's sockets are set up."""

from __future__ import annotations

import contextlib
import socket

from hhdeploy.runtime.serving.listening import listen


def test_an_answer_s_body_does_not_wait_for_its_head_to_be_acknowledged():
    with listen("127.0.0.1", 0, "http_port")[0] as listening:
        address = listening.getsockname()
        with socket.create_connection(address), contextlib.closing(listening.accept()[0]) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
