"""PackLog: pack.log of a split, who packed what when and where; all that differs between runs stays in it.

A line is the crc32 of its text in hex, a blank, and a JSON object.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psla_fast.pack.config import WorkConfig
from psla_fast.pack.plan import Plan


class PackLog:
    """An open log; it is locked, so that two packs of the same part can't run at once."""

    def __init__(self, folder: Path, work: WorkConfig) -> None:
        """Open FOLDER/pack.log, or pack-IofN.log for a part; raises ValueError where a pack is at work."""
        name = f"pack-{work.part.replace('/', 'of')}.log" if work.is_part else "pack.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"another pack is at work in {folder}. Wait for it, or stop it.") from None
        self._drop_torn_line()

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Note how the pack ended, and close."""
        try:
            if kind is None:
                self.write("end")
            else:
                self.write("stopped", reason=f"{kind.__name__}: {error}")
        except OSError:
            if kind is None:
                raise  # else the full disk that was the error just says it again
        finally:
            os.close(self._file)

    def write(self, event: str, **fields: object) -> None:
        """Append an event."""
        row = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        text = json.dumps(row)
        os.lseek(self._file, 0, os.SEEK_END)
        os.write(self._file, f"{zlib.crc32(text.encode()):08x} {text}\n".encode())

    def write_start(self, command: Mapping[str, object], plan: Plan, part: str) -> None:
        """Note the command, where it runs, and on what."""
        from psla_fast import __version__

        self.write(
            "start",
            command=dict(command),
            host=socket.gethostname(),
            process=os.getpid(),
            python=sys.version.split()[0],
            psla_fast=__version__,
            plan=plan.fingerprint,
            rows=plan.rows,
            shards=plan.num_shards,
            part=part,
        )

    def write_complete(self, num_clips: int, sums: str) -> None:
        """Note that the split is complete, and the hash of its SHA256SUMS."""
        self.write("complete", clips=num_clips, sums=sums)

    def _drop_torn_line(self) -> None:
        """Cut off what a killed pack had half written."""
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        if content and not content.endswith(b"\n"):
            os.ftruncate(self._file, content.rfind(b"\n") + 1)


@contextlib.contextmanager
def lock_split(folder: Path, shared: bool) -> Iterator[None]:
    """Hold the lock of a begun split: parts share it, a whole pack and a merge have it alone.

    Raises ValueError where others hold it.
    """
    with open(folder / "pack.json", "r+b") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another pack is at work in {folder}. Wait for it, or stop it.") from None
        yield


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a pack.log: its whole lines, and the numbers of those that are damaged."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        digest, _, text = line.partition(b" ")
        if digest == b"%08x" % zlib.crc32(text):
            rows.append(json.loads(text))
        else:
            damaged.append(number)
    if not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        damaged.append(len(rows) + len(damaged) + 1)
    return rows, damaged
