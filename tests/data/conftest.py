"""Local mirrors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from tests.mirror import Handler, Mirror


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started: list[tuple[ThreadingHTTPServer, Mirror]] = []

    def start(*faults: Any, content: bytes, **settings: Any) -> Mirror:
        mirror = Mirror(list(faults) or [""], content, **settings)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"mirror": mirror}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append((server, mirror))
        mirror.url = f"http://127.0.0.1:{server.server_address[1]}/file"
        return mirror

    yield start
    for server, mirror in started:
        mirror.released.set()
        server.shutdown()
        server.server_close()
