"""ClipTable: the rows of a split, compact, so that a list of 2M clips doesn't take gigabytes."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from psla_fast.clip import Clip, Rejected
from psla_fast.shards.spec import make_key
from psla_fast.sources import Split

Row = Clip | Rejected


class ClipTable:
    """A split's rows in order, encoded; a name that stood before makes a row a rejected one.

    fingerprint covers what is asked for (names, labels, cuts, rejections), not where the audio lies.
    """

    def __init__(self, split: Split) -> None:
        """Read the split's list."""
        self.split = split
        self.rejected = Counter[str]()
        self.num_missing = 0
        self._arena, self._ends = bytearray(), array("Q", [0])
        digest, heard = hashlib.sha256(), set[bytes]()
        for row in split.read():
            kept = _reject_repeated(row, heard)
            if isinstance(kept, Rejected):
                self.rejected[kept.reason.split(":")[0]] += 1
            self.num_missing += isinstance(kept, Clip) and not kept.found
            asked, source = _encode(kept)
            digest.update(asked)
            self._arena += asked + b"\n" + source
            self._ends.append(len(self._arena))
        self.fingerprint = digest.hexdigest()

    @property
    def num_rejected(self) -> int:
        """Rows that are no clips."""
        return self.rejected.total()

    def rejected_rows(self) -> Iterator[dict[str, str]]:
        """Give what rejected.jsonl says of the rows that are no clips, or whose audio wasn't found."""
        for row in (self[number] for number in range(len(self))):
            if isinstance(row, Rejected):
                yield {"key": make_key(row.name), "source": row.source, "reason": row.reason}
            elif not row.found:
                reason = f"missing_audio: {row.source} is not there"
                yield {"key": make_key(row.name), "source": row.source, "reason": reason}

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self._ends) - 1

    def encoded(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> list[bytes]:
        """Give rows in the form that `decode_row` reads, to be sent to a worker."""
        return [bytes(self._arena[self._ends[i] : self._ends[i + 1]]) for i in map(int, ids)]

    def __getitem__(self, row: int) -> Row:
        """Give one row."""
        return decode_row(self.encoded([range(len(self))[row]])[0])


def _reject_repeated(row: Row, heard: set[bytes]) -> Row:
    if isinstance(row, Rejected):
        return row
    name = row.name.encode(errors="surrogateescape")
    if name in heard:
        return Rejected(row.name, row.source, f"duplicate_name: {row.name} stands more than once")
    heard.add(name)
    return row


def _encode(row: Row) -> tuple[bytes, bytes]:
    """Give what is asked for as JSON, and where it is (a byte says whether it was found)."""
    if isinstance(row, Rejected):
        return json.dumps([row.name, row.reason]).encode(), b"0" + row.source.encode(errors="surrogateescape")
    asked = [row.name, row.labels, row.row, row.start_seconds, row.end_seconds]
    where = (b"1" if row.found else b"0") + row.source.encode(errors="surrogateescape")
    return json.dumps(asked).encode(), where


def asked_for(encoded: bytes) -> bytes:
    """Give the part of an encoded row that says what is asked for."""
    return encoded.partition(b"\n")[0]


def decode_row(encoded: bytes) -> Row:
    """Read back a row that `ClipTable.encoded` gave."""
    asked, _, where = encoded.partition(b"\n")
    fields, source = json.loads(asked), where[1:].decode(errors="surrogateescape")
    if len(fields) == 2:
        return Rejected(fields[0], source, fields[1])
    name, labels, row, start, end = fields
    return Clip(name, source, tuple(labels), row, start, end, found=where[:1] == b"1")
