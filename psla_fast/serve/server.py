"""Server: an application on a socket, by uvicorn, with patience for slow clients that ends."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import webbrowser

import h11
from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
DROP_SECONDS = 5.0
SEND_SECONDS = 30.0
END_SECONDS = 5  # that running requests have at the end
MOST_CONNECTIONS = 512

log = logging.getLogger("psla_fast.serve")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends connections whose request doesn't come or doesn't end, or whose answer isn't taken.

    What is sent after an answer is dropped for a while: closed at once, the connection would be reset, and
    the client would never read why it was refused.
    """

    head_seconds = HEAD_SECONDS
    drop_seconds = DROP_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, or end it at once where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._end_in(self.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Take data; a request's head has to be complete a while after its first byte."""
        super().data_received(data)
        is_dropping = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if not is_dropping and self.conn.their_state is not h11.IDLE:
            self._go_on()
        elif self._deadline is None:
            self._end_in(self.drop_seconds if is_dropping else self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._go_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for a client that doesn't take its answer."""
        super().pause_writing()
        self._end_in(SEND_SECONDS)

    def resume_writing(self) -> None:
        """Go on once it has."""
        super().resume_writing()
        self._go_on()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what isn't taken of the last answer is dropped after a while."""
        super().timeout_keep_alive_handler()
        self._end_in(SEND_SECONDS)

    def _end_in(self, seconds: float) -> None:
        self._go_on()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _go_on(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(Server):
    """A server that says when it is ready."""

    def __init__(self, config: Config, ready: str, url: str) -> None:
        super().__init__(config)
        self.ready, self.url = ready, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)
        if self.url:
            webbrowser.open(self.url)


def bind(host: str, port: int) -> socket.socket:
    """Take a port, 0 for any free one, without listening yet; ValueError where it can't be had."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; give 0 (any free one) to 65535.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(f"--host {host!r} is no address of this machine ({error.strerror}).") from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            advice = "Give another --port, or 0 for any free one."
            raise ValueError(f"port {port} of {host} is in use. {advice}") from error
        raise ValueError(f"port {port} of {host} can't be taken: {os.strerror(error.errno or 0)}.") from error
    return bound


def find_url(bound: socket.socket, host: str) -> str:
    """Give the address under which a browser on this machine reaches a socket."""
    port = bound.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(
        host, f"[{host}]" if ":" in host else host
    )
    return f"http://{name}:{port}"


def build_server(app: FastAPI, ready: str = "", url: str = "") -> Server:
    """Build a server that prints `ready` once it listens, and opens a browser at `url` where one is given."""
    config = Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=END_SECONDS,
    )
    return _Server(config, ready, url)


def serve(app: FastAPI, bound: socket.socket, ready: str, url: str = "") -> None:
    """Answer requests until Ctrl-C or SIGTERM; requests that run then have five seconds."""
    server = build_server(app, ready, url)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # none comes where our parent ignores Ctrl-C
            server.run(sockets=[bound])
    finally:
        bound.close()
    print("\nstopped", flush=True)
