"""Build: run folders -> a report's content: what the template shows, and the data that its script draws."""

# C classes

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from psla_fast.classes import Classes
from psla_fast.report.clips import SplitCounts, check_classes, count_split, find_shards
from psla_fast.report.gallery import Example, build_gallery, choose_clips, view_clips
from psla_fast.report.groups import MISSING, Group, common_settings, differing_settings, group_runs
from psla_fast.report.log import describe_event
from psla_fast.report.published import compare_with_psla
from psla_fast.report.runs import KINDS, Run, read_runs
from psla_fast.report.scored import Scored, read_scored, score_missing
from psla_fast.report.tables import build_results, build_tiles
from psla_fast.report.views import view_run
from psla_fast.shards import join, open_shards

MOST_EXAMPLES = 60


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows; `split` auto: eval where every run has results of it, else val.

    shards: where the clips are, in the place of the runs' own; score: averaged weights are scored where that
    isn't done; a title of its own where one is given.
    """

    split: Literal["auto", "eval", "val"] = "auto"
    shards: str = ""
    examples: int = 12
    score: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.examples <= MOST_EXAMPLES:
            raise ValueError(f"--examples is {self.examples}; give 0 to {MOST_EXAMPLES}.")


@dataclass
class Material:
    """What was read of the runs, and what is to be said about it; scores are dropped once they are viewed."""

    runs: list[Run]
    groups: list[Group]
    role: str
    shards: list[str]
    classes: Classes | None
    notes: list[str] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    first: tuple[Run, Scored] | None = None  # whose clips the others are compared with, without its scores
    sizes: set[int] = field(default_factory=set)  # numbers of clips that the runs were scored on
    clips: list[Example] = field(default_factory=list)
    clip_views: list[list[dict[str, Any] | None]] = field(default_factory=list)  # by run and clip
    counts: dict[str, SplitCounts] = field(default_factory=dict)
    source: tuple[Run, str] | None = None  # whose shards, and where they are


def build_report(paths: Sequence[Path], options: ReportOptions) -> dict[str, Any]:
    """Read runs and give all that a page shows, as plain values; `data` of it is for the page's script.

    The same runs give the same values. Raises ValueError where a folder is no run, or runs don't go together.
    """
    material = _read(paths, options)
    runs, groups, role = material.runs, material.groups, material.role
    _count(material, options)
    gallery, note = build_gallery(material.clips, material.clip_views, material.source, role)
    material.notes += note
    positives = _positives(material)
    published = compare_with_psla(material.classes, role, _scored_on(material), _trained_on(material))
    title = options.title or ", ".join(group.name for group in groups)
    measured = int((positives[role] > 0).sum()) if role in positives else 0
    return {
        "title": title,
        "role": role,
        "split_name": runs[0].split_name(role),
        "kinds": {kind: name for kind, (name, _) in KINDS.items()},
        "tiles": build_tiles(runs, groups, role, measured, material.classes, _sizes(material)),
        "results": build_results(runs, groups, role),
        "published": published,
        "notes": material.notes,
        "differing": (differing := differing_settings(runs, groups)),
        "has_older": any(MISSING in cells for _, cells in differing),
        "about": _about(material),
        "common": common_settings(runs),
        "groups": [group.name for group in groups],
        "environments": _environments(runs),
        "events": [(run.name, describe_event(row)) for run in runs for row in run.log.events],
        "has_scores": material.first is not None,
        "has_examples": bool(gallery),
        "data": {
            "role": role,
            "kinds": {kind: name for kind, (name, _) in KINDS.items()},
            "classes": _name_classes(material),
            "positives": {name: counts.tolist() for name, counts in positives.items()},
            "groups": [{"name": group.name, "members": group.members} for group in groups],
            "runs": material.views,
            "published": [row for row in published if not row["reason"]],
            "examples": gallery,
        },
    }


def _read(paths: Sequence[Path], options: ReportOptions) -> Material:
    runs = read_runs(paths)
    role = _choose_role(runs, options.split)
    shards = [find_shards(run, options.shards) for run in runs]
    if options.score:
        for run, location in zip(runs, shards, strict=True):
            if not location:
                raise ValueError(f"--score: the shards of {run.path} aren't there. Pass them by --shards.")
            for file in score_missing(run, role, join(location, run.split_name(role))):
                print(f"scored {file}", flush=True)
    classes = next((run.classes for run in runs if run.classes), None)
    material = Material(runs, group_runs(runs), role, shards, classes)
    compared = [note for number in range(len(runs)) for note in _view_scored(material, number, options)]
    material.notes += compared
    return material


def _view_scored(material: Material, number: int, options: ReportOptions) -> list[str]:
    """Read a run's scores, and keep what is shown of them; says whether they are of other clips.

    Raises ValueError for another number of classes than the first run's.
    """
    run, role = material.runs[number], material.role
    if not run.num_epochs:
        material.notes.append(
            f"{run.name}: config.toml has no optim.epochs: whether it is finished isn't known"
        )
    elif not run.is_finished:
        material.notes.append(f"{run.name}: unfinished, {len(run.table)} of {run.num_epochs} epochs done")
    scored, left_out = read_scored(run, role)
    material.notes += left_out
    notes = []
    if scored:
        material.sizes.add(len(scored.keys))
        if material.first:
            notes = _compare_scored(run, scored, *material.first)
        else:
            material.first = run, replace(scored, scores={})
            material.clips = choose_clips(scored, options.examples)
    group = next(n for n, group in enumerate(material.groups) if number in group.members)
    material.views.append(view_run(run, scored, role, group))
    material.clip_views.append(view_clips(scored, material.clips))
    return notes


def _choose_role(runs: Sequence[Run], wanted: str) -> str:
    """Choose the split shown; raises ValueError where a run hasn't the one that is wanted."""
    measured = [run for run in runs if run.results]
    if wanted == "auto":
        return "eval" if measured and all(run.has_split("eval") for run in measured) else "val"
    for run in measured:
        if not run.has_split(wanted):
            raise ValueError(f"--split {wanted}: {run.path} has no results of it. Use --split val.")
    return wanted


def _compare_scored(run: Run, scored: Scored, first: Run, reference: Scored) -> list[str]:
    """Say where a run was scored on other clips; raises ValueError for another number of classes."""
    if scored.targets.shape[1] != reference.targets.shape[1]:
        raise ValueError(
            f"{run.path} has {scored.targets.shape[1]} classes, {first.path} has "
            f"{reference.targets.shape[1]}. Report them on pages of their own."
        )
    if sorted(scored.keys) != sorted(reference.keys):
        return [f"{run.name} was scored on other clips than {first.name}: their figures aren't of one set"]
    return []


def _count(material: Material, options: ReportOptions) -> None:
    """Count the splits of the first run whose shards are there, and take it as the source of pictures.

    Raises ValueError where the shards that were given have other classes, or hold none of the splits.
    """
    problems: list[str] = []
    for run, location in zip(material.runs, material.shards, strict=True):
        for role in dict.fromkeys(("train", "val", material.role)) if location else ():
            try:
                counts = count_split(run, location, role)
            except ValueError as error:
                problems.append(str(error))
                continue
            try:
                check_classes(material.classes, counts.classes, location)
            except ValueError as error:
                if options.shards:
                    raise
                problems.append(str(error))
                break
            material.classes = material.classes or counts.classes
            material.counts[role] = counts
            material.source = run, location
        if material.counts:
            break
    if options.shards and not material.counts:
        raise ValueError(problems[0])
    material.notes += dict.fromkeys(problems)
    if not any(material.shards):
        gone = material.runs[0].config.get("data.shards", "the shards")
        material.notes.append(
            f"{gone} isn't there: no training counts, no pictures of clips. Pass the shards by --shards"
        )


def _positives(material: Material) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Give the clips of each class (C,) in each split that is known; of the split shown those scored."""
    positives = {role: counts.by_class for role, counts in material.counts.items()}
    if material.first:
        positives[material.role] = (material.first[1].targets != 0).sum(axis=0, dtype=np.int64)
    return positives


def _scored_on(material: Material) -> set[int]:
    """Give the numbers of clips that the runs were scored on."""
    counts = material.counts.get(material.role)
    return material.sizes or ({counts.num_clips} if counts else set())


def _trained_on(material: Material) -> set[int]:
    """Give the numbers of clips that the runs were trained on, as far as their shards are there."""
    splits = {
        (location, run.split_name("train"))
        for run, location in zip(material.runs, material.shards, strict=True)
        if location
    }
    sizes = set()
    for location, name in splits:
        try:
            with open_shards(join(location, name)) as split:
                sizes.add(len(split))
        except ValueError:  # what of a run's shards is missing is said by its counts
            continue
    return sizes


def _sizes(material: Material) -> dict[str, int]:
    sizes = {role: counts.num_clips for role, counts in material.counts.items()}
    return sizes | ({material.role: len(material.first[1].keys)} if material.first else {})


def _about(material: Material) -> str:
    """Say what was trained on what: networks, classes, frames."""
    parts = list(dict.fromkeys(str(run.config.get("model.name", "?")) for run in material.runs))
    if material.classes:
        parts.append(f"{len(material.classes)} classes")
    frames = dict.fromkeys(run.config.get("input.clip_frames") for run in material.runs)
    if None not in frames:
        parts.append(f"{' or '.join(f'{length:,}' for length in frames)} frames a clip")
    return " · ".join(parts)


def _name_classes(material: Material) -> list[dict[str, str]]:
    """Give names and mids; numbers where neither checkpoint nor shards tell them."""
    classes = material.classes
    if classes:
        return [{"name": name, "mid": mid} for name, mid in zip(classes.names, classes.mids, strict=True)]
    num_classes = material.first[1].targets.shape[1] if material.first else 0
    return [{"name": f"class {n}", "mid": ""} for n in range(num_classes)]


def _environments(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Give what each run's maker noted: when, on what, with which versions; nothing where nothing was."""
    rows = []
    for run in runs:
        noted = run.environment
        hardware, versions = noted.get("hardware") or {}, noted.get("versions") or {}
        cells = [
            ("started", noted.get("time")),
            ("commit", noted.get("commit")),
            ("command", noted.get("command")),
            *((name, hardware.get(name)) for name in ("cpu", "cores", "memory_gb", "gpu")),
            *((name, versions.get(name)) for name in ("python", "torch")),
        ]
        known = [(name.replace("_", " "), str(value)) for name, value in cells if value is not None]
        if known:
            rows.append((run.name, known))
    return rows
