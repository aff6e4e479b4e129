"""HTTP servers on loopback for the tests of remote shards: with and without ranges, sound and faulty."""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HALF_A_MINUTE = 30.0


class FolderServer(ThreadingHTTPServer):
    """Serves a folder; `fault` says what goes wrong with a path's request, counted from 0."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(
            ("127.0.0.1", 0), RangeHandler if ranges else partial(PlainHandler, directory=folder)
        )
        self.folder, self.requests = folder, list[tuple[str, str]]()
        self.fault: Callable[[str, int], str] = lambda path, count: ""
        self.released, self.lock = threading.Event(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, path: str, ranged: str) -> int:
        with self.lock:
            count = sum(seen == path for seen, _ in self.requests)
            self.requests.append((path, ranged))
            return count

    def tars(self) -> list[tuple[str, str]]:
        return [(path.partition("?")[0], ranged) for path, ranged in self.requests if ".tar" in path]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class PlainHandler(SimpleHTTPRequestHandler):
    """`python -m http.server`: no ranges."""

    server: FolderServer

    def do_GET(self) -> None:
        self.server.note(self.path, self.headers.get("Range", ""))
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class RangeHandler(BaseHTTPRequestHandler):
    """Ranges, kept-alive connections, faults."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: FolderServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        ranged = self.headers.get("Range", "")
        fault = self.server.fault(self.path, self.server.note(self.path, ranged))
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if fault.isdecimal() or not path.is_file():
            self.answer(int(fault) if fault else 404, b"no")
            return
        if fault == "moved":
            self.send_response(302)
            self.send_header("Location", f"{self.path}?moved")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "hang":
            self.server.released.wait(HALF_A_MINUTE)
            self.close_connection = True
            return
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged)
        first = int(match[1]) if match else 0
        last = min(int(match[2]) if match and match[2] else size - 1, size - 1)
        with open(path, "rb") as file:
            file.seek(first)
            body = bytearray(file.read(last + 1 - first))
        if fault == "flip":
            body[len(body) // 2] ^= 1
        if fault == "short":
            body = body[: len(body) // 2]
        headers = {"Content-Range": f"bytes {first}-{last}/{size}"} if match else {}
        self.answer(206 if match else 200, bytes(body), headers, cut=fault == "drop")

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@contextlib.contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[FolderServer]:
    """Serve a folder until the block ends."""
    server = FolderServer(folder, ranges)
    thread = threading.Thread(target=partial(server.serve_forever, 0.02), name="server", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
