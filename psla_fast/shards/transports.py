"""Transports: one attempt to read a file, or a range of it, by http(s) or by what fsspec knows.

They raise Fault, which says what to do about what won't pass by itself.
"""

import contextlib
import importlib
import re
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import PurePath
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT_SECONDS = 30.0  # without a byte
CALL_SECONDS = 120.0  # of one fsspec call
MAX_REDIRECTS = 5
COPY_BYTES = 2**20
PERMANENT = {
    "FileNotFoundError",
    "PermissionError",
    "NoCredentialsError",
    "NotImplementedError",
    "ImportError",
}


class Fault(Exception):
    """What went wrong in one attempt.

    `wait`: seconds after which the server wants to be asked again; `advice`: what to do where another attempt
    won't help.
    """

    def __init__(self, problem: str, wait: float = 0.0, advice: str = "") -> None:
        """Say it in a few words."""
        super().__init__(problem)
        self.wait, self.advice = wait, advice


class AbsentFault(Fault):
    """A file that isn't there."""

    def __init__(self, problem: str) -> None:
        """Say where to look."""
        super().__init__(problem, advice="Pass the URL of a packed split whose files are all there.")


def is_remote(location: str | PurePath) -> bool:
    """Tell a URL (http://, s3://, …) from a folder."""
    return "://" in str(location)


def join(location: str, name: str) -> str:
    """Give the address of a file or folder in a folder or URL; the query of an http URL stays at its end."""
    if not is_remote(location):
        return str(PurePath(location) / name)
    parts = urlsplit(location) if location.startswith(("http://", "https://")) else None
    path = (parts.path if parts else location).rstrip("/")
    while name.startswith("../"):
        path, name = path.rpartition("/")[0], name[3:]
    path = f"{path}/{name}"
    return urlunsplit(parts._replace(path=path)) if parts else path


def hide_secrets(url: str) -> str:
    """Give a URL without user, password and query, for messages."""
    bare = re.sub(r"(?<=://)[^/@]*@", "", url)
    return bare.partition("?")[0] if bare.startswith("http") else bare


class StorageError(OSError):
    """A local file that can't be written: no fault of the transfer."""


def _write(file: BinaryIO, content: bytes) -> None:
    try:
        file.write(content)
    except OSError as error:
        raise StorageError(error.errno, error.strerror, file.name) from error


class Transport(Protocol):
    """One attempt each, which raises Fault, or StorageError where `file` can't be written."""

    def fill(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after the other, with a file's bytes from `start` on."""

    def read(self, name: str) -> tuple[bytes, bool]:
        """Give a whole file, and whether ranges of it can be asked for."""

    def copy(self, name: str, file: BinaryIO) -> None:
        """Write a whole file to `file`, from its beginning."""

    def close(self) -> None:
        """Break off what is under way."""


class HttpTransport:
    """http(s) by the standard library: kept-alive connections, redirects, proxies of the environment."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet."""
        self._url, self._lock, self._closed = url, threading.Lock(), False
        self._idle: dict[tuple[str, str], list[HTTPConnection]] = {}
        self._sockets: dict[HTTPConnection, socket.socket] = {}
        self._tls: ssl.SSLContext | None = None

    def fill(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Ask for one range; a reply that isn't just that range is known before its body is read."""
        size = sum(map(len, buffers))
        with self._get(name, {"Range": f"bytes={start}-{start + size - 1}"}) as reply:
            if reply.status != 206:
                raise Fault(f"the server answered {reply.status} to a request for a range")
            if not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Fault(f"the server sent the range {reply.headers.get('Content-Range')!r}")
            if reply.length is not None and reply.length != size:
                raise Fault(f"{reply.length} of {size} bytes offered")
            done = 0
            for buffer in buffers:
                while len(buffer):
                    num_read = reply.readinto(buffer)
                    if not num_read:
                        raise Fault(f"{done} of {size} bytes came")
                    done, buffer = done + num_read, buffer[num_read:]

    def read(self, name: str) -> tuple[bytes, bool]:
        """Ask for all bytes, as a range, to see what the server makes of it."""
        with self._get(name, {"Range": "bytes=0-"}) as reply:
            return reply.read(), reply.status == 206

    def copy(self, name: str, file: BinaryIO) -> None:
        """Read a whole body a MB at a time."""
        file.seek(0)
        file.truncate()
        with self._get(name, {}) as reply:
            while content := reply.read(COPY_BYTES):
                _write(file, content)
            if reply.length:
                raise Fault(f"{file.tell()} of {file.tell() + reply.length} bytes came")

    def close(self) -> None:
        """Shut the sockets down, so that no thread waits at them."""
        with self._lock:
            self._closed = True
            for sock in self._sockets.values():
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for connections in self._idle.values():
                for connection in connections:
                    self._sockets.pop(connection, None)
                    connection.close()
            self._idle.clear()

    @contextlib.contextmanager
    def _get(self, name: str, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        """Give the reply to a GET, redirects followed; a connection whose reply was read whole is kept."""
        url = join(self._url, name)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                key, connection, reply = self._send(url, headers)
                try:
                    target = reply.headers.get("Location")
                    if reply.status in (301, 302, 303, 307, 308) and target:
                        url = urljoin(url, target)
                        reply.read()
                        continue
                    _check_status(reply)
                    yield reply
                    return
                finally:
                    self._put_back(key, connection, reply)
            raise Fault(f"more than {MAX_REDIRECTS} redirects", advice="Check the address.")
        except StorageError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise Fault(error.verify_message, advice="Check the server's certificate.") from error
        except (OSError, HTTPException, ValueError) as error:
            raise Fault(_problem(error)) from error

    def _send(
        self, url: str, headers: dict[str, str]
    ) -> tuple[tuple[str, str], HTTPConnection, HTTPResponse]:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        key = parts.scheme, host
        headers = {"Accept-Encoding": "identity", "User-Agent": "psla-fast", "Host": host} | headers
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
        if proxy and parts.scheme == "http":
            target = urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))
        while True:
            with self._lock:
                idle = self._idle.get(key, [])
                kept = idle.pop() if idle else None
            connection = kept or self._connect(*key, proxy)
            try:
                connection.request("GET", target, headers=headers)
                return key, connection, connection.getresponse()
            except (OSError, HTTPException):
                self._drop(connection)
                if kept is None or self._closed:  # else the server had closed it meanwhile
                    raise

    def _connect(self, scheme: str, host: str, proxy: str | None) -> HTTPConnection:
        """Open a connection, by the environment's proxy where there is one."""
        netloc = (urlsplit(proxy).netloc or proxy) if proxy else host
        if scheme == "https":
            self._tls = self._tls or ssl.create_default_context()
            connection: HTTPConnection = HTTPSConnection(netloc, timeout=TIMEOUT_SECONDS, context=self._tls)
            if proxy:
                connection.set_tunnel(host)
        else:
            connection = HTTPConnection(netloc, timeout=TIMEOUT_SECONDS)
        connection.connect()
        with self._lock:
            if self._closed:
                connection.close()
                raise InterruptedError("closed while connecting")
            self._sockets[connection] = connection.sock
        return connection

    def _put_back(self, key: tuple[str, str], connection: HTTPConnection, reply: HTTPResponse) -> None:
        """Keep a connection for the next request, or close it where the reply wasn't read to its end."""
        whole = reply.isclosed() and not reply.will_close
        reply.close()
        with self._lock:
            if whole and not self._closed:
                self._idle.setdefault(key, []).append(connection)
                return
        self._drop(connection)

    def _drop(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._sockets.pop(connection, None)
        connection.close()


class FsspecTransport:
    """s3://, gs:// and all else that fsspec reads, with its own configuration and credentials."""

    def __init__(self, url: str) -> None:
        """Find the file system; raises ValueError where its library isn't installed."""
        self._url = url
        try:
            self._files, _ = importlib.import_module("fsspec.core").url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{url} can't be opened: {error}. pip install 'psla-fast[remote]' for s3://; other kinds of "
                "storage have their own fsspec packages."
            ) from error
        self._limit = {"timeout": CALL_SECONDS} if self._files.async_impl else {}

    def fill(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Have the range as bytes, and share it out."""
        size = sum(map(len, buffers))
        content = memoryview(self._cat(name, start=start, end=start + size))
        if len(content) != size:
            raise Fault(f"{len(content)} of {size} bytes came")
        done = 0
        for buffer in buffers:
            buffer[:] = content[done : done + len(buffer)]
            done += len(buffer)

    def read(self, name: str) -> tuple[bytes, bool]:
        """Give a whole file; ranges are always there."""
        return self._cat(name), True

    def copy(self, name: str, file: BinaryIO) -> None:
        """Write a whole file."""
        file.seek(0)
        file.truncate()
        _write(file, self._cat(name))

    def close(self) -> None:
        """Calls under way end by themselves, after CALL_SECONDS at most."""

    def _cat(self, name: str, **wanted: int) -> bytes:
        url = join(self._url, name)
        try:
            content: bytes = self._files.cat_file(url, **wanted, **self._limit)
        except Exception as error:  # the libraries behind fsspec have errors of their own
            problem = _problem(error)
            if isinstance(error, FileNotFoundError):
                raise AbsentFault("not found") from error
            if PERMANENT & {kind.__name__ for kind in type(error).__mro__}:
                raise Fault(problem, advice="Check address and credentials.") from error
            raise Fault(problem) from error
        return content


def _check_status(reply: HTTPResponse) -> None:
    """Raise Fault for a reply without the wanted content."""
    status, said = reply.status, f"{reply.status} {reply.reason}"
    if status in (404, 410):
        raise AbsentFault(said)
    if status >= 500 or status in (408, 425, 429):
        asked = reply.headers.get("Retry-After", "")
        raise Fault(said, float(asked) if asked.isdecimal() else 0.0)
    if status == 416:
        raise Fault(f"{said}: it is shorter than its index says", advice="Copy it there again.")
    if status >= 300:
        raise Fault(said, advice="Check address and permissions.")


def _problem(error: Exception) -> str:
    """Say a library's error in one line."""
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "timed out"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
