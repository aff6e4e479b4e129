"""The command `verify`: checks every byte of packed splits; `--repair` packs again just what is broken."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import joblib
import numpy as np
import tyro

from psla_fast.commands.pack import repeat_pack
from psla_fast.files import write_atomically, write_once
from psla_fast.pack import FinishConfig, merge_parts
from psla_fast.pack.log import read_log
from psla_fast.pack.plan import read_plan
from psla_fast.recipe import parse_flags
from psla_fast.shards.spec import find_splits, shard_name
from psla_fast.shards.sums import SUMS_NAME, hash_file
from psla_fast.shards.verify import Fault, SplitReport, find_same_sounds, verify_split

LISTED = 20  # faults and notes printed of each kind
MARKS = ("index.h5", "pack.json", SUMS_NAME, "00000.tar")  # a damaged split has lost some of them
DERIVED = ("index.h5", "rejected.jsonl", SUMS_NAME)  # made from the shards' statistics


@dataclass(frozen=True)
class VerifyCommand:
    """Check every byte of packed splits against checksums and indices; exits with 1 for a fault."""

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """A split's folder, or the folder that holds the splits' folders."""
    repair: bool = False
    """Pack the broken shards again, from the source that pack.log names."""
    workers: int = joblib.cpu_count()
    """Reading threads."""


def verify(arguments: list[str]) -> None:
    """Verify, print each fault with shard and key, and repair by choice."""
    command = parse_flags(VerifyCommand, arguments, "psla-fast verify")
    if command.workers < 1:
        raise ValueError(f"--workers is {command.workers}; give 1 or more.")
    folders = find_splits(Path(os.path.abspath(command.shards)), MARKS)
    if not folders:
        raise ValueError(
            f"no packed split in {command.shards}. Pass a split's folder, or the one that holds them."
        )
    reports = [_verify_and_say(folder, command.workers) for folder in folders]
    if not any(report.faults for report in reports):
        _say_duplicates(reports)
        return
    if not command.repair:
        count = sum(len(report.faults) for report in reports)
        print(f"{_count(count)}. Run again with --repair to pack the broken shards anew.")
        raise SystemExit(1)
    _repair([report for report in reports if report.faults])
    print("verifying again")
    reports = [_verify_and_say(folder, command.workers) for folder in folders]
    if any(report.faults for report in reports):
        raise SystemExit(1)
    _say_duplicates(reports)


def _verify_and_say(folder: Path, workers: int) -> SplitReport:
    report = verify_split(folder, workers)
    report.faults += _check_logs(folder)
    size = f"{report.num_shards:,} shards, {report.num_bytes / 1e6:,.1f} MB"
    if not report.faults and report.shards is not None:
        print(f"{folder}: {len(report.shards):,} clips, {size}: every byte is as it was packed")
    else:
        print(f"{folder}: {size}, {_count(len(report.faults))}")
    for fault in report.faults[:LISTED]:
        print(f"  {folder.name}/{fault}")
    if len(report.faults) > LISTED:
        print(f"  … and {len(report.faults) - LISTED} more")
    for path in sorted(folder.glob("*.tmp")):
        print(f"  note: {path.name} is left over from a killed pack and may be deleted")
    return report


def _count(faults: int) -> str:
    return f"{faults} fault{'s' if faults != 1 else ''}"


def _check_logs(folder: Path) -> list[Fault]:
    """Check that the logs are whole and this split's; shards made without the packer have none."""
    if not (folder / "pack.json").is_file():
        return []
    faults, logs = [], sorted(folder.glob("pack*.log"))
    for path in logs:
        rows, damaged = read_log(path)
        faults += [Fault(path.name, f"line {number} is damaged") for number in damaged]
        if path.name == "pack.log" and not damaged:  # a part that was killed may be completed by others
            faults += _check_end(folder, rows)
        plans = {row.get("plan") for row in rows if row["event"] == "start"}
        with contextlib.suppress(ValueError):  # a damaged pack.json is reported by its sum
            if plans - {read_plan(folder).fingerprint}:
                faults.append(Fault(path.name, "is another split's"))
    return faults if logs else [Fault("pack.log", "is missing")]


def _check_end(folder: Path, rows: list[dict[str, Any]]) -> list[Fault]:
    """Check that pack.log goes on to the end, and that the sums are those it ended with."""
    if not rows or rows[-1]["event"] not in ("end", "stopped"):
        return [Fault("pack.log", "was cut short, or its pack was killed and not taken up again")]
    sums = [row["sums"] for row in rows if row["event"] == "complete"]
    if sums and (folder / SUMS_NAME).is_file() and hash_file(folder / SUMS_NAME) != sums[-1]:
        return [Fault(SUMS_NAME, "isn't the one that pack.log tells of")]
    return []


def _say_duplicates(reports: list[SplitReport]) -> None:
    """Report the same key in two splits, and the same sound anywhere."""
    splits = [report.shards for report in reports if report.shards is not None]
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            shared = np.intersect1d(one.index.key, other.index.key)
            if len(shared):
                where = f"{one.folder.name} and {other.folder.name}"
                print(f"note: {len(shared)} keys stand in both {where}, for instance {shared[0].decode()}")
    pairs = find_same_sounds(splits)
    if pairs:
        print(f"note: {len(pairs)} pairs of clips hold the same sound:")
        for first, second in pairs[:LISTED]:
            print(f"  {first} = {second}")
        if len(pairs) > LISTED:
            print(f"  … and {len(pairs) - LISTED} more")


def _repair(reports: list[SplitReport]) -> None:
    """Pack broken shards anew; index and checksums are made from the shards' statistics."""
    sources: dict[Path, tuple[list[str], str]] = {}
    for report in reports:
        rows = [row for path in sorted(report.folder.glob("pack*.log")) for row in _mend_log(path)]
        needs_source = [fault for fault in report.faults if not _is_derived(fault)]
        if needs_source:
            sources[report.folder] = _find_source(rows, report.folder, needs_source)
    for report in reports:
        if report.folder not in sources:
            merge_parts(report.folder, FinishConfig(max_rejected_fraction=1.0))
            print(f"{report.folder}: made the index and the checksums anew")
            continue
    with _set_aside([report for report in reports if report.folder in sources]):
        for folder, (arguments, start) in sources.items():
            print(f"{folder}: packing again what is broken: pack {' '.join(arguments)}")
            repeat_pack(arguments, start, folder)


@contextlib.contextmanager
def _set_aside(reports: list[SplitReport]) -> Iterator[None]:
    """Take away what says that broken shards are whole; what isn't made anew, after an error, comes back."""
    names = {
        (
            report.folder / f"{shard_name(fault.shard)}.json"
            if fault.shard is not None
            else report.folder / fault.file
        )
        for report in reports
        for fault in report.faults
        if fault.shard is not None or fault.file in ("pack.json", "../classes.csv")
    }
    held = {path: path.read_bytes() for path in names if path.is_file()}
    for path in held:
        path.unlink()
    try:
        yield
    finally:
        for path, content in held.items():
            write_once(path, content)


def _is_derived(fault: Fault) -> bool:
    return fault.file in DERIVED or fault.file.endswith((".log", ".png"))


def _mend_log(path: Path) -> list[dict[str, Any]]:
    """Give a log's whole lines, and leave only those in it."""
    rows, damaged = read_log(path)
    if damaged:
        lines = path.read_bytes().split(b"\n")
        kept = [line for number, line in enumerate(lines[:-1], start=1) if number not in damaged]
        write_atomically(path, b"".join(line + b"\n" for line in kept))
    return rows


def _find_source(rows: list[dict[str, Any]], folder: Path, faults: list[Fault]) -> tuple[list[str], str]:
    """Give the words of the pack command that made a split, and the folder it was typed in."""
    commands = [row["command"] for row in rows if row["event"] == "start" and row["command"]]
    if not commands:
        files = ", ".join(sorted({fault.file for fault in faults})[:3])
        raise ValueError(
            f"{folder}: pack.log doesn't say what it was packed from. Delete the .json of the broken shards "
            f"({files} …) and type the pack command again: only they are redone."
        )
    return commands[-1]["arguments"], commands[-1]["folder"]
