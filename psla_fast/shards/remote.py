"""Remote folders: names and ranges -> bytes, tried again a bounded number of times."""

import random
import threading
from collections.abc import Callable, Sequence
from typing import BinaryIO, TypeVar

from psla_fast.shards.spec import ShardError
from psla_fast.shards.transports import (
    AbsentFault,
    Fault,
    FsspecTransport,
    HttpTransport,
    Transport,
    hide_secrets,
    join,
)

ATTEMPTS = 5
BACKOFF_SECONDS = 0.5  # before the second attempt; doubled before each further one, with jitter
LOST_FILES = 3  # so many given up: the server is gone
MOST_WAIT_SECONDS = 30.0  # also where a server asks for more by Retry-After
DOWNLOAD_BYTES = 16 * 2**20  # of a whole file at a time
Result = TypeVar("Result")


class AbsentError(ShardError):
    """A file that isn't there."""


class Fetcher:
    """Reads files of a remote folder; several threads may use it."""

    def __init__(self, url: str, ranges: bool = True) -> None:
        """Take the folder's URL; raises ValueError where no library for it is installed."""
        self.url, self.ranges = url.rstrip("/"), ranges
        is_http = url.startswith(("http://", "https://"))
        self._transport: Transport = HttpTransport(self.url) if is_http else FsspecTransport(self.url)
        self._closed = threading.Event()
        self._gave_up: set[str] = set()

    def describe(self, name: str) -> str:
        """Give a file's URL for messages."""
        return hide_secrets(join(self.url, name))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Give `size` bytes of a file from `start` on; raises ShardError where they can't be had."""
        content = bytearray(size)
        self.read_into(name, start, [memoryview(content)])
        return bytes(content)

    def read_into(
        self,
        name: str,
        start: int,
        buffers: Sequence[memoryview],
        check: Callable[[], None] | None = None,
        where: str = "",
    ) -> None:
        """Fill buffers with a file's bytes from `start` on, by one request.

        What `check` raises is taken for a fault of the transfer at first; ShardErrors begin with `where`.
        """
        where = where or f"{self.describe(name)}, offset {start}"

        def check_buffers(_: None) -> None:
            if check:
                check()

        self._try(name, where, lambda: self._transport.fill(name, start, buffers), check_buffers)

    def read_file(
        self, name: str, probe: bool = False, check: Callable[[bytes], None] | None = None
    ) -> bytes:
        """Give a small file, or raise AbsentError; a probe finds out whether the server knows ranges."""

        def check_content(reply: tuple[bytes, bool]) -> None:
            if check:
                check(reply[0])

        content, ranges = self._try(name, "", lambda: self._transport.read(name), check_content)
        if probe:
            self.ranges = ranges
        return content

    def download(self, name: str, file: BinaryIO, size: int, where: str = "") -> None:
        """Write a file of so many bytes to `file`; ShardErrors begin with `where`."""
        if not self.ranges:
            self._try(name, where, lambda: self._transport.copy(name, file))
            return
        content = memoryview(bytearray(min(size, DOWNLOAD_BYTES)))
        for start in range(0, size, DOWNLOAD_BYTES):
            part = content[: min(DOWNLOAD_BYTES, size - start)]
            self.read_into(name, start, [part], where=where)
            file.write(part)

    def pause(self, seconds: float) -> None:
        """Wait; raises InterruptedError as soon as the fetcher is closed."""
        if self._closed.wait(seconds):
            raise InterruptedError("closed while reading")

    def close(self) -> None:
        """Break off all requests: whoever waits for one gets InterruptedError, now or at its next attempt."""
        self._closed.set()
        self._transport.close()

    def _try(
        self,
        name: str,
        where: str,
        action: Callable[[], Result],
        check: Callable[[Result], None] = lambda _: None,
    ) -> Result:
        """Attempt an action until it succeeds; what was given up before gets one attempt."""
        where = where or self.describe(name)
        attempts = 1 if name in self._gave_up or len(self._gave_up) >= LOST_FILES else ATTEMPTS
        for attempt in range(1, attempts + 1):
            self.pause(0)
            wait, damage = 0.0, None
            try:
                result = action()
                self._gave_up.discard(name)
                check(result)
                return result
            except ShardError as error:
                damage = error
            except Fault as fault:
                problem, wait = str(fault), fault.wait
                if fault.advice:
                    self.pause(0)
                    kind = AbsentError if isinstance(fault, AbsentFault) else ShardError
                    raise kind(f"{where}: {problem}. {fault.advice}") from fault
            if attempt < attempts:
                backoff = BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                self.pause(min(max(wait, backoff), MOST_WAIT_SECONDS))
        self.pause(0)
        times = f"{attempts} attempts" if attempts > 1 else "tried again after other requests had failed"
        if damage is not None:
            raise ShardError(f"{damage} ({times})")
        self._gave_up.add(name)
        raise ShardError(f"{where}: {problem} ({times}). Check the server and the network, then go on.")
