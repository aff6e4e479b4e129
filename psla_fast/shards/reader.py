"""Read shards: a split's folder -> its index in memory, and each clip's fbank by random access."""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes, read_classes
from psla_fast.fbank import FbankConfig
from psla_fast.shards.mirror import Mirror, open_mirror
from psla_fast.shards.spec import FORMAT_VERSION, TAR_BLOCK, ShardError, Storage, shard_name
from psla_fast.shards.sums import hash_file, read_sums
from psla_fast.shards.transports import is_remote, join

SOURCES_AT_ONCE = 65_536
ATTRIBUTES = {"fbank", "dtype", "scale", "offset", "mean", "std", "classes", "fingerprint"}


@dataclass(frozen=True)
class Index:
    """index.h5 in memory, one entry a clip; labels in CSR form (indptr, indices)."""

    key: npt.NDArray[np.bytes_]
    shard: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.int64]
    num_frames: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    shard_bytes: npt.NDArray[np.int64]


class Shards:
    """An open split: len, `keys`, `labels(i)`, `fbank(i)` by clip id; several threads may read it.

    `location` is its folder or URL, for messages; a remote split has a `mirror`, and `folder` is the local
    folder of what was fetched.
    """

    def __init__(
        self,
        folder: Path,
        index: Index,
        attributes: dict[str, Any],
        classes: Classes,
        mirror: Mirror | None = None,
    ) -> None:
        """Take what `open_shards` read."""
        self.folder, self.mirror = folder, mirror
        self.location = mirror.location if mirror else str(folder)
        self.index = index
        self.classes = classes
        self.fbank_config = FbankConfig(**json.loads(str(attributes["fbank"])))
        self.storage = Storage(attributes["dtype"], float(attributes["scale"]), float(attributes["offset"]))
        self.mean, self.std = float(attributes["mean"]), float(attributes["std"])
        self.fingerprint = str(attributes["fingerprint"])
        self.frame_bytes = self.fbank_config.num_mels * self.storage.numpy.itemsize
        self._soft_targets: tuple[npt.NDArray[np.float16], float] | None = None
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Give the number of clips N."""
        return len(self.index.offset)

    def __enter__(self) -> Self:
        """Return the open split."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close the tars."""
        self.close()

    def close(self) -> None:
        """Close the tars; reading again opens them again, but those of a remote split."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
        if self.mirror:
            self.mirror.close()

    @property
    def remote(self) -> bool:
        """Tell a split at a URL from one in a folder."""
        return self.mirror is not None

    @cached_property
    def keys(self) -> list[str]:
        """All keys in the order of the clip ids."""
        return [key.decode() for key in self.index.key.tolist()]

    def read_origin(self, clip_id: int) -> tuple[str, str]:
        """Read a clip's original name and where its audio lay, relative to the data set."""
        clip_id = range(len(self))[clip_id]
        with h5py.File(self.folder / "index.h5", "r") as file:
            texts = []
            for column in ("name", "source"):
                first, end = file[f"{column}_indptr"][clip_id : clip_id + 2]
                texts.append(file[column][first:end].tobytes().decode(errors="replace"))
        return texts[0], texts[1]

    def read_sources(self) -> Iterator[str]:
        """Read where each clip's audio lay, relative to the data set, in the order of the clip ids."""
        with h5py.File(self.folder / "index.h5", "r") as file:
            bounds = file["source_indptr"][:].tolist()
            for start in range(0, len(self), SOURCES_AT_ONCE):
                piece = bounds[start : start + SOURCES_AT_ONCE + 1]
                text = file["source"][piece[0] : piece[-1]].tobytes()
                for first, end in itertools.pairwise(piece):
                    yield text[first - piece[0] : end - piece[0]].decode(errors="replace")

    def labels(self, clip_id: int) -> npt.NDArray[np.int32]:
        """Give the class indices of a clip, ascending."""
        clip_id = range(len(self))[clip_id]
        return self.index.indices[self.index.indptr[clip_id] : self.index.indptr[clip_id + 1]]

    def set_labels(self, indptr: npt.NDArray[np.int64], indices: npt.NDArray[np.int32]) -> None:
        """Put other labels (CSR form) in the place of the packed ones; the fingerprint tells them apart."""
        self.index = replace(self.index, indptr=indptr, indices=indices)
        content = self.fingerprint.encode() + indptr.tobytes() + indices.tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def set_soft_targets(self, table: npt.NDArray[np.float16], weight: float) -> None:
        """Make all targets (1 - weight)·multi-hot + weight·table (N, C); the fingerprint tells them apart."""
        self._soft_targets = table, weight
        content = hashlib.sha256(f"{self.fingerprint} {weight!r}".encode())
        content.update(np.ascontiguousarray(table).data.cast("B"))
        self.fingerprint = content.hexdigest()

    def targets(self, clip_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Give the targets (B, C) of clips: multi-hot, unless `set_soft_targets` has changed them."""
        starts, ends = self.index.indptr[clip_ids], self.index.indptr[clip_ids + 1]
        counts = ends - starts
        rows = np.repeat(np.arange(len(clip_ids)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.zeros((len(clip_ids), len(self.classes)), dtype=np.float32)
        targets[rows, self.index.indices[np.repeat(starts, counts) + within]] = 1
        if self._soft_targets is not None:
            table, weight = self._soft_targets
            targets = (1 - weight) * targets + weight * table[clip_ids].astype(np.float32)
        return targets

    def fbank(self, clip_id: int) -> npt.NDArray[np.float32]:
        """Read a clip's log-mels (num_frames, num_mels), checked against its crc32; raises ShardError."""
        clip_id = range(len(self))[clip_id]
        shape = (int(self.index.num_frames[clip_id]), self.fbank_config.num_mels)
        stored = np.empty(shape, dtype=self.storage.numpy)
        if self.mirror:
            self.fetch_into(clip_id, stored.data.cast("B"), self.mirror)
        else:
            self.read_into(clip_id, stored.data.cast("B"), check_crc=True)
        return self.storage.decode(stored)

    def fetch_into(self, clip_id: int, stored: memoryview, mirror: Mirror) -> None:
        """Fetch a whole clip of a remote split, checked against its crc32, several times before it fails."""
        header = bytearray(TAR_BLOCK)
        mirror.read(
            int(self.index.shard[clip_id]),
            int(self.index.offset[clip_id]) - TAR_BLOCK,
            [memoryview(header), stored],
            lambda: self.check_clip(clip_id, header, stored, check_crc=True),
            self._where(clip_id),
        )

    def read_into(self, clip_id: int, target: memoryview, check_crc: bool) -> None:
        """Read a clip's first stored bytes, as many as `target` holds, straight into it.

        The tar header before them is read and compared, too; the checksum only where `target` takes the whole
        clip. Raises ShardError naming shard, key and offset for a short read, another member or a wrong
        checksum.
        """
        if self.mirror:
            raise ShardError(f"{self.location} is remote: use --stream.kind webdataset.")
        shard, offset = int(self.index.shard[clip_id]), int(self.index.offset[clip_id])
        header, wanted = bytearray(TAR_BLOCK), TAR_BLOCK + len(target)
        try:
            file = self.descriptor(shard)
        except ShardError as error:
            key = self.index.key[clip_id].decode()
            raise ShardError(f"{error} (asked for key {key}, offset {offset})") from error
        try:
            num_read = os.preadv(file, [header, target], offset - TAR_BLOCK)
            while TAR_BLOCK <= num_read < wanted:  # a signal or a network file system may cut a read
                more = os.preadv(file, [target[num_read - TAR_BLOCK :]], offset + num_read - TAR_BLOCK)
                if more == 0:
                    break
                num_read += more
        except OSError as error:
            raise ShardError(f"{self._where(clip_id)}: {error.strerror}. Check the disk.") from error
        if num_read != wanted:
            got = f"{max(0, num_read - TAR_BLOCK)} of {len(target)} bytes"
            raise ShardError(f"{self._where(clip_id)}: read {got}. The shard was cut: pack it again.")
        self.check_clip(clip_id, header, target, check_crc)

    def check_clip(
        self, clip_id: int, header: bytes | bytearray, stored: memoryview, check_crc: bool
    ) -> None:
        """Raise ShardError where a member's tar header or, by choice, its whole content isn't the clip's."""
        name = self.index.key[clip_id] + b".fbank\0"
        if not header.startswith(name):
            found = bytes(header[:100]).split(b"\0")[0].decode(errors="replace")
            raise ShardError(
                f"{self._where(clip_id)}: the tar has {found[:80]!r} there, it isn't the one that was "
                "indexed: pack it again."
            )
        whole = len(stored) == int(self.index.num_frames[clip_id]) * self.frame_bytes
        if check_crc and whole and zlib.crc32(stored) != self.index.crc32[clip_id]:
            raise ShardError(f"{self._where(clip_id)}: crc32 differs. The shard was changed: pack it again.")

    def descriptor(self, shard: int) -> int:
        """Return the open file of a shard; its size is checked against the index when it is opened."""
        descriptor = self._files.get(shard)
        if descriptor is not None:
            return descriptor
        with self._lock:
            if shard in self._files:
                return self._files[shard]
            with self._told(shard):
                descriptor = os.open(self.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.check_size(shard, descriptor)
            except ShardError:
                os.close(descriptor)
                raise
            self._files[shard] = descriptor
            return descriptor

    def check_size(self, shard: int, file: int | None = None) -> None:
        """Raise ShardError where a shard, or its open file, is missing or has another size than the index."""
        path, wanted = self.shard_path(shard), int(self.index.shard_bytes[shard])
        with self._told(shard):
            size = os.stat(path if file is None else file).st_size
        if size != wanted:
            raise ShardError(f"{path} has {size} bytes, its index says {wanted}. Pack it again.")

    @contextlib.contextmanager
    def _told(self, shard: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self.shard_path(shard)
            raise ShardError(f"{path}: {error.strerror}. Pack again: only this shard is redone.") from error

    def shard_path(self, shard: int) -> Path:
        """Give the tar of a shard."""
        return self.folder / f"{shard_name(shard)}.tar"

    def _where(self, clip_id: int) -> str:
        shard, offset = int(self.index.shard[clip_id]), int(self.index.offset[clip_id])
        path = join(self.location, f"{shard_name(shard)}.tar")
        return f"{path}, key {self.index.key[clip_id].decode()}, offset {offset}"


def open_shards(path: str | Path, cache: str = "") -> Shards:
    """Open a split's folder or URL, for instance SHARDS/train or s3://bucket/shards/train.

    The index and the classes of a remote one are fetched into a folder of `cache`, in which its shards are
    kept, too, as they are read; without a cache into a temporary one that goes with the split's closing.
    Raises ShardError that says what is wrong.
    """
    if not is_remote(path):
        return _open_folder(Path(os.path.abspath(path)))  # "." has no parent that holds classes.csv
    mirror = open_mirror(str(path), cache)
    try:
        return _open_folder(mirror.folder, mirror)
    except BaseException:
        mirror.close()
        raise


def _open_folder(folder: Path, mirror: Mirror | None = None) -> Shards:
    index_path = folder / "index.h5"
    if not index_path.is_file():
        raise ShardError(f"index.h5 not found in {folder}. {_hint(folder)}")
    try:
        wanted = read_sums(folder).get("index.h5")
    except ValueError as error:
        raise ShardError(str(error)) from error
    if hash_file(index_path) != wanted:
        raise ShardError(
            f"{index_path} differs from its sum in SHA256SUMS. Run verify_shards.py {folder} --repair."
        )
    index, attributes = _read_index(index_path)
    classes = read_classes(folder.parent / "classes.csv")
    if classes.fingerprint != attributes["classes"]:
        raise ShardError(
            f"{folder.parent / 'classes.csv'} lists other classes, or in another order, than {folder} was "
            "packed with. Restore that class list."
        )
    if mirror:
        mirror.shard_bytes = index.shard_bytes
    else:
        _allow_open_files(2 * len(index.shard_bytes) + 256)
    return Shards(folder, index, attributes, classes, mirror)


def _hint(folder: Path) -> str:
    """Say what to do about a folder that isn't a packed split."""
    inside = [sub.name for sub in sorted(folder.glob("*")) if (sub / "index.h5").is_file()]
    if inside:
        return f"Pass one of its splits: {', '.join(inside)}."
    if (folder / "pack.json").is_file():
        return "It isn't packed to its end: pack again, or merge its parts."
    return "Pass a packed split, or pack first."


def _read_index(path: Path) -> tuple[Index, dict[str, Any]]:
    """Read index.h5 and check that it fits together; memory is taken for what the file holds, not claims."""
    names = Index.__dataclass_fields__
    try:
        with h5py.File(path, "r") as file:
            attributes = dict(file.attrs.items())
            version = attributes.get("format_version")
            if version != FORMAT_VERSION:
                raise ShardError(
                    f"{path} has format version {version}, this code reads {FORMAT_VERSION}. Pack again."
                )
            for name in names:
                if file[name].ndim != 1 or file[name].id.get_storage_size() < file[name].nbytes:
                    raise KeyError(f"{name} is not whole")
            columns = {name: file[name][:] for name in names}
    except (OSError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ShardError(
            f"{path} can't be read ({error}). Run verify_shards.py --repair: only the index is redone."
        ) from error
    missing = ATTRIBUTES - attributes.keys()
    lengths = {name: len(column) for name, column in columns.items()}
    num_clips = lengths["key"]
    fits = all(lengths[name] == num_clips for name in ("shard", "offset", "num_frames", "crc32"))
    if missing or not fits or lengths["indptr"] != num_clips + 1:
        raise ShardError(
            f"{path} is no index of a split: {', '.join(sorted(missing)) or 'columns'} don't fit. Pack again."
        )
    return Index(**columns), attributes


def _allow_open_files(wanted: int) -> None:
    """Raise this process's limit of open files, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
