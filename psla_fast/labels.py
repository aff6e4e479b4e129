"""Label tables: a list of keys and mids -> the labels of clips, which training may take in the shards' stead.

Either a CSV of key and mids (a1B2,"/m/09x0r,/m/04rlf"), with the header key,mids or none, or a PSLA datafile,
whose key is the stem of its wav.
"""

# N clips, C classes

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes, shorten
from psla_fast.files import replacing
from psla_fast.shards import Shards
from psla_fast.shards.spec import make_key
from psla_fast.sources import read_label_rows
from psla_fast.sources.rows import get_stem, read_columns, read_rows


@dataclass(frozen=True)
class LabelTable:
    """Labels of N clips by key, in CSR form: clip i has the classes indices[indptr[i] : indptr[i + 1]]."""

    path: Path
    keys: list[str]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """Give the number of clips N."""
        return len(self.keys)

    def labels(self, row: int) -> npt.NDArray[np.int32]:
        """Give a clip's class indices."""
        return self.indices[self.indptr[row] : self.indptr[row + 1]]


def read_labels(path: Path, classes: Classes) -> LabelTable:
    """Read a label table; a clip may have no label.

    Keys that the packer would have changed (make_key) are changed alike. Raises ValueError that names file
    and key where it is no such table, a mid is no class, or a key stands twice.
    """
    index_by_mid = classes.index_by_mid()
    keys: list[str] = []
    indices: list[int] = []
    lengths: list[int] = [0]
    for name, mids in _read_rows(path):
        unknown = [mid for mid in mids if mid not in index_by_mid]
        if unknown:
            raise ValueError(
                f"{path}: {shorten(name)!r} has the label {shorten(unknown[0])!r}, which isn't in the class "
                "list. Give the class list it belongs to."
            )
        labels = sorted({index_by_mid[mid] for mid in mids})
        keys.append(make_key(name))
        indices += labels
        lengths.append(len(labels))
    if len(set(keys)) < len(keys):
        _, first = np.unique(keys, return_index=True)
        twice = keys[min(set(range(len(keys))) - set(first.tolist()))]
        raise ValueError(f"{path}: key {twice!r} stands twice. Keep one row a clip.")
    return LabelTable(path, keys, np.cumsum(lengths, dtype=np.int64), np.array(indices, dtype=np.int32))


def _rejected_keys(folder: Path) -> set[str]:
    path = folder / "rejected.jsonl"
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["key"] for line in file}


def _read_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    if path.suffix.lower() == ".json":
        yield from read_label_rows(path)
        return
    _, first = next(read_rows(path), (0, [""]))
    bare = len(first) == 2 and not {"key", "mids"} & {cell.strip() for cell in first}
    rows = read_rows(path) if bare else read_columns(path, ("key", "mids"))
    for line, cells in rows:
        if len(cells) != 2:
            raise ValueError(f"{path}, line {line}: got {len(cells)} cells, expected a key and its mids.")
        yield cells[0].strip(), [mid.strip() for mid in cells[1].split(",") if mid.strip()]


def write_labels(path: Path, table: LabelTable, classes: Classes) -> None:
    """Write a label table as CSV (key,mids), which `read_labels` reads back."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", "mids"])
        for row, key in enumerate(table.keys):
            writer.writerow([key, ",".join(classes.mids[label] for label in table.labels(row))])


def write_datafile(path: Path, table: LabelTable, classes: Classes, wavs: Iterable[str]) -> None:
    """Write a label table as a PSLA datafile, of which wavs are the paths.

    A wav whose stem isn't its clip's key, by which `read_labels` knows it, is written as KEY and its suffix.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"data": [')
        for row, (key, wav) in enumerate(zip(table.keys, wavs, strict=True)):
            named = wav if make_key(get_stem(wav)) == key else key + Path(wav).suffix
            mids = ",".join(classes.mids[label] for label in table.labels(row))
            file.write(("," if row else "") + "\n" + json.dumps({"wav": named, "labels": mids}))
        file.write("\n]}\n")


def replace_labels(shards: Shards, table: LabelTable) -> None:
    """Give an open split the labels of a table, matched by key.

    Rows of clips that the packer rejected are passed over. Raises ValueError, and changes nothing, where a
    clip has no row or another row no clip.
    """
    row = {key: number for number, key in enumerate(table.keys)}
    missing = [key for key in shards.keys if key not in row]
    unknown = sorted(row.keys() - set(shards.keys) - _rejected_keys(shards.folder))
    if missing or unknown:
        example = f"{missing[0]} has no row" if missing else f"{unknown[0]} is no clip of it"
        raise ValueError(
            f"{table.path}: {len(missing)} of {len(shards)} clips of {shards.location} have no row, "
            f"{len(unknown)} rows are of other clips ({example}). Give a table of just these clips."
        )
    order = np.array([row[key] for key in shards.keys], dtype=np.int64)
    lengths = np.diff(table.indptr)[order]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    starts = np.repeat(table.indptr[order] - indptr[:-1], lengths)
    shards.set_labels(indptr, table.indices[starts + np.arange(indptr[-1])])
