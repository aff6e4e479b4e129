"""SHA256SUMS: the checksums of every file of a packed split, in sha256sum's own format, written last.

`sha256sum -c SHA256SUMS` in the split's folder checks them without this package.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from psla_fast.files import write_atomically
from psla_fast.shards.spec import shard_name

SUMS_NAME = "SHA256SUMS"
CLASSES_NAME = "../classes.csv"
SPLIT_FILES = (CLASSES_NAME, "index.h5", "pack.json", "rejected.jsonl")
PLOTS = ("class_counts.png", "clip_lengths.png")


def hash_file(path: Path) -> str:
    """Give the sha256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path, num_shards: int) -> list[str]:
    """Name the files that a split of so many shards has, relative to its folder, those that are there or not.

    pack.json and rejected.jsonl (which only the packer writes) and plots are named where they are there.
    """
    names = [f"{shard_name(n)}.{ending}" for n in range(num_shards) for ending in ("idx", "json", "tar")]
    always = (CLASSES_NAME, "index.h5")
    names += [name for name in (*SPLIT_FILES, *PLOTS) if name in always or (folder / name).is_file()]
    return sorted(names)


def write_sums(folder: Path, num_shards: int, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS over a split's files; `known` gives the sums that needn't be computed, by name."""
    names = list_files(folder, num_shards)
    sums = {name: known.get(name) or hash_file(folder / name) for name in names}
    write_atomically(folder / SUMS_NAME, format_sums(sums).encode())


def format_sums(sums: Mapping[str, str]) -> str:
    """Give the text of SHA256SUMS."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS as name -> sum; raises ValueError for a missing or damaged one."""
    path = folder / SUMS_NAME
    if not path.is_file():
        raise ValueError(f"{path} is not there: the split isn't packed to its end. Pack (or merge) again.")
    sums, damaged = parse_sums(path.read_bytes())
    if damaged:
        raise ValueError(f"{path}, line {damaged[0]} is damaged. Run verify_shards.py --repair.")
    return sums


def parse_sums(content: bytes) -> tuple[dict[str, str], list[int]]:
    """Read the text of a SHA256SUMS as name -> sum, and the numbers of its damaged lines."""
    sums: dict[str, str] = {}
    damaged = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  ((?:\.\./)?[\w.-]+)", line)
        if match is None:
            damaged.append(number)
        else:
            sums[match[2]] = match[1]
    return sums, damaged
