"""The command `report`: run folders -> one HTML page of curves, results, classes, confusions and examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page that shows runs beside each other; it needs no other file and no network."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that psla_fast.train wrote; an unfinished run is shown as far as it is."""
    out: Path = Path("report.html")
    """Page to write."""
    split: Literal["auto", "eval", "val"] = "auto"
    """Split whose results are shown; auto: eval where every run has it, else val."""
    shards: str = ""
    """Folder of the packed splits, for clips' counts and pictures; none: the runs' own --data.shards."""
    examples: int = 12
    """Clips shown with their fbank and scores, 0 to 60."""
    score: bool = False
    """Score the averaged weights first, which their AP by class needs; kept as RUN/scores/SPLIT_wa.h5."""
    title: str = ""
    """Title of the page; none: the runs' names."""


def report(arguments: list[str]) -> None:
    """Write the page, and say what it shows."""
    command = parse_flags(ReportCommand, arguments, "psla-fast report")
    from psla_fast.files import write_atomically
    from psla_fast.report import ReportOptions, build_report, render_page

    if command.out.is_dir() or not command.out.resolve().parent.is_dir():
        raise ValueError(f"--out {command.out} can't be written: give a file in a folder that is there.")
    options = ReportOptions(command.split, command.shards, command.examples, command.score, command.title)
    content = build_report(command.runs, options)
    page = render_page(content).encode("utf-8", "replace")
    write_atomically(command.out, page)
    for note in content["notes"]:
        print(f"note: {note}")
    many = "1 run" if len(command.runs) == 1 else f"{len(command.runs)} runs"
    classes, examples = len(content["data"]["classes"]), len(content["data"]["examples"])
    print(
        f"{command.out}: {many} on {content['split_name']}, {classes} classes, {examples} examples, "
        f"{len(page) / 1e6:.1f} MB"
    )
