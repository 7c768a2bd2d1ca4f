"""A local web server that fails in the ways that servers do."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any


@dataclass
class Mirror:
    """A local server; each request takes the next of its faults, the last one for ever.

    A fault is an HTTP status, ``"cut"`` (the connection ends half-way through what is left), ``"stall"`` (it does not
    end), ``"deaf"`` (Range is ignored), ``"shifted"`` (another range is sent) or ``""``.
    """

    faults: list[Any] = field(default_factory=lambda: [""])
    content: bytes = b""
    version: str = '"one"'
    length: bool = True
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def next_fault(self) -> Any:
        return self.faults.pop(0) if len(self.faults) > 1 else self.faults[0]


class Handler(BaseHTTPRequestHandler):
    mirror: Mirror

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        mirror, fault, asked = self.mirror, self.mirror.next_fault(), self.headers.get("Range")
        mirror.ranges.append(asked)
        if isinstance(fault, int):
            self.send_error(fault)
            return
        current = self.headers.get("If-Range") in (None, mirror.version)
        resumes = re.fullmatch(r"bytes=(\d+)-", asked or "") if current and fault != "deaf" else None
        start = int(resumes[1]) if resumes else 0
        if resumes and start >= len(mirror.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(mirror.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = mirror.content[start:]
        self.send_response(206 if resumes else 200)
        if resumes:
            first = start + (1 if fault == "shifted" else 0)
            self.send_header("Content-Range", f"bytes {first}-{len(mirror.content) - 1}/{len(mirror.content)}")
        if mirror.length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", mirror.version)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall") else body)
        if fault == "stall":
            self.wfile.flush()
            mirror.released.wait(10)
