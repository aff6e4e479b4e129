"""Mirror: a remote split's URL -> a folder of its index and classes, and bytes of its shards."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from psla_fast.files import write_once
from psla_fast.shards.remote import AbsentError, Fetcher
from psla_fast.shards.spec import ShardError, shard_name
from psla_fast.shards.sums import CLASSES_NAME, SUMS_NAME, hash_file, parse_sums
from psla_fast.shards.transports import hide_secrets, is_remote

DOWNLOADS = 3  # of a file whose sum doesn't come out
LOCK_POLL_SECONDS = 0.05
BUFFERS_A_CALL = 512  # the kernel takes 1024


@dataclass
class Mirror:
    """What was fetched of a remote split, in `folder`, and the means to fetch more; threads may share it.

    sums gives each file's sha256, shard_bytes (shards,) the sizes. `keep`: shards are fetched whole, once for
    all processes of the machine, and read in the folder; so they are where the server knows no ranges.
    """

    fetcher: Fetcher
    folder: Path
    sums: dict[str, str]
    keep: bool = False
    shard_bytes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    remove: Callable[[], object] | None = None

    @property
    def location(self) -> str:
        """The split's URL, for messages."""
        return hide_secrets(self.fetcher.url)

    @property
    def reads_whole(self) -> bool:
        """Tell whether shards are read in the folder."""
        return self.keep or not self.fetcher.ranges

    def again(self) -> "Mirror":
        """Give the same mirror with requests of its own, which closing it breaks off."""
        return replace(self, fetcher=Fetcher(self.fetcher.url, self.fetcher.ranges), remove=None)

    def close(self) -> None:
        """Break off all requests; remove the folder where it is a temporary one."""
        self.fetcher.close()
        if self.remove:
            self.remove()

    def read(
        self,
        shard: int,
        start: int,
        buffers: Sequence[memoryview],
        check: Callable[[], None] | None = None,
        where: str = "",
    ) -> None:
        """Fill buffers with a shard's bytes from `start` on; ShardErrors begin with `where`.

        What `check` raises is taken for a fault of the transfer, or of the kept file, at first.
        """
        name = f"{shard_name(shard)}.tar"
        where = where or f"{self.fetcher.describe(name)}, offset {start}"
        if not self.reads_whole and not (self.folder / name).exists():
            self.fetcher.read_into(name, start, buffers, check, where)
            return
        for doubt in (False, True):
            self.fetch_shard(shard, doubt=doubt, where=where)
            try:
                with open(self.folder / name, "rb") as file:
                    fill_from_file(file.fileno(), start, buffers)
                if check:
                    check()
                return
            except (EOFError, OSError, ShardError) as error:
                problem = error
        if isinstance(problem, ShardError):
            raise problem
        raise ShardError(f"{where}: {self.folder / name} can't be read ({problem}). Check the disk.")

    def fetch_shard(self, shard: int, wait: bool = True, doubt: bool = False, where: str = "") -> bool:
        """Have a shard in the folder, checked by its size, or where that is in doubt by its sum.

        Of several threads and processes one fetches; the others wait, or are told False. Raises ShardError,
        which begins with `where`.
        """
        name, size = f"{shard_name(shard)}.tar", int(self.shard_bytes[shard])
        path = self.folder / name
        if not doubt and path.is_file() and path.stat().st_size == size:
            return True
        return self.fetch(name, size, wait, where or self.fetcher.describe(name))

    def fetch(self, name: str, size: int = 0, wait: bool = True, where: str = "") -> bool:
        """Have a file in the folder, checked by its sum; one of unknown size is taken to be small."""
        path = Path(os.path.normpath(self.folder / name))
        temporary = path.with_name(path.name + ".tmp")
        try:
            file = self._lock(temporary, wait)
            if file is None:
                return False
            with file:
                there = path.is_file() and hash_file(path) == self.sums.get(name)
                if there:
                    temporary.unlink()
                    return True
                try:
                    self._download(name, file, size, where)
                    os.fsync(file.fileno())
                    os.replace(temporary, path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except InterruptedError:
            raise
        except OSError as error:
            raise ShardError(
                f"{temporary}: {error.strerror}. Give the cache a folder with room for whole shards."
            ) from error
        return True

    def _lock(self, temporary: Path, wait: bool) -> BinaryIO | None:
        """Open a temporary file for this thread alone; of a killed process it may hold something."""
        while True:
            file = open(temporary, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if temporary.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                    return file
            except FileNotFoundError:  # renamed between the two looks at it
                pass
            except BlockingIOError:
                if not wait:
                    file.close()
                    return None
            file.close()
            self.fetcher.pause(LOCK_POLL_SECONDS)

    def _download(self, name: str, file: BinaryIO, size: int, where: str) -> None:
        for _ in range(DOWNLOADS):
            file.seek(0)
            file.truncate()
            if size:
                self.fetcher.download(name, file, size, where)
            else:
                file.write(self.fetcher.read_file(name))
            file.flush()
            if hash_file(Path(file.name)) == self.sums.get(name):
                return
        raise ShardError(
            f"{where or self.fetcher.describe(name)}: the file differs from its sum ({DOWNLOADS} downloads). "
            "Copy the split there again."
        )


def open_mirror(url: str, cache: str) -> Mirror:
    """Fetch a split's sums, index and classes into a folder of `cache`, or a temporary one without shards.

    Raises ShardError where they can't be had, AbsentError where no split is there.
    """
    fetcher = Fetcher(url)

    def check(content: bytes) -> None:
        sums, damaged = parse_sums(content)
        if damaged or not {"index.h5", CLASSES_NAME} <= sums.keys():
            said = f"{fetcher.describe(SUMS_NAME)} lists no packed split"
            raise ShardError(f"{said}. Pass the URL of one's folder.")

    try:
        content = fetcher.read_file(SUMS_NAME, probe=True, check=check)
    except BaseException:
        fetcher.close()
        raise
    root = Path(cache).expanduser().absolute() if cache else Path(tempfile.mkdtemp(prefix="psla-fast-"))
    name = hide_secrets(fetcher.url).rpartition("/")[2].replace(":", "_")
    folder = root / hashlib.sha256(content).hexdigest()[:16] / name
    mirror = Mirror(fetcher, folder, parse_sums(content)[0], keep=bool(cache))
    if not cache:
        mirror.remove = weakref.finalize(mirror, _remove_folder, root, os.getpid())
    try:
        listed = mirror.folder / SUMS_NAME
        if listed.is_file() and listed.read_bytes() != content:
            listed.unlink()
        write_once(listed, content)
        for wanted in (CLASSES_NAME, "index.h5", "rejected.jsonl"):
            if wanted in mirror.sums:
                mirror.fetch(wanted)
    except BaseException:
        mirror.close()
        raise
    return mirror


def exists_split(location: str | Path) -> bool:
    """Tell whether a folder is there, or at a URL a packed split; raises ShardError where nobody can tell."""
    if not is_remote(location):
        return Path(location).is_dir()
    fetcher = Fetcher(str(location))
    try:
        fetcher.read_file(SUMS_NAME)
    except AbsentError:
        return False
    finally:
        fetcher.close()
    return True


def fill_from_file(file: int, start: int, buffers: Sequence[memoryview]) -> None:
    """Fill buffers in turn with a file's bytes from `start` on; EOFError where it ends before."""
    left = deque(buffer for buffer in buffers if len(buffer))
    while left:
        num_read = os.preadv(file, list(islice(left, BUFFERS_A_CALL)), start)
        if not num_read:
            raise EOFError(f"it ends at {start}")
        start += num_read
        while left and num_read >= len(left[0]):
            num_read -= len(left.popleft())
        if num_read:
            left[0] = left[0][num_read:]


def _remove_folder(folder: Path, process: int) -> None:
    """Remove a temporary folder, in the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
