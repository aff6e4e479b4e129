"""Groups: runs that differ in their seeds alone belong together; settings that differ between groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psla_fast.report.runs import Run, stem_of

# what changes neither what is computed nor what it is computed from
ALIKE = {"run", "seed", "resume", "wandb", "profile", "device", "checkpoint_minutes", "log_every_steps"}
ALIKE |= {"keep_epochs", "stream.num_threads", "stream.read_ahead", "stream.cache", "stream.check_crc"}
MISSING = "–"


@dataclass(frozen=True)
class Group:
    """Runs by their numbers, of one configuration with different seeds."""

    name: str
    members: list[int]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together whose settings are the same but for the seed, in the order of their first ones.

    Where a seed comes twice, something differs that settings don't tell: then the names must be the same but
    for the numbers at their ends, too, and runs whose seeds still come twice stand alone.
    """
    by_settings: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        by_settings.setdefault(_settings(run), []).append(number)
    members: list[list[int]] = []
    for numbers in by_settings.values():
        if _seeds_differ(runs, numbers):
            members.append(numbers)
            continue
        by_name: dict[str, list[int]] = {}
        for number in numbers:
            by_name.setdefault(stem_of(runs[number].name), []).append(number)
        for alike in by_name.values():
            members += [alike] if _seeds_differ(runs, alike) else [[number] for number in alike]
    groups: list[Group] = []
    for numbers in sorted(members):
        name = runs[numbers[0]].name if len(numbers) == 1 else stem_of(runs[numbers[0]].name)
        if any(group.name == name for group in groups):
            name = runs[numbers[0]].name
        groups.append(Group(name, numbers))
    return groups


def _settings(run: Run) -> str:
    return repr(sorted((key, repr(value)) for key, value in run.config.items() if key not in ALIKE))


def _seeds_differ(runs: Sequence[Run], numbers: Sequence[int]) -> bool:
    seeds = [repr(runs[number].config.get("seed")) for number in numbers]
    return len(set(seeds)) == len(seeds)


def differing_settings(runs: Sequence[Run], groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Give each setting that isn't the same in all runs, with its value or values in each group."""
    rows = []
    for key in _keys(runs):
        if key == "run" or len({_show(run.config, key) for run in runs}) == 1:
            continue
        cells = []
        for group in groups:
            shown = [_show(runs[number].config, key) for number in group.members]
            cells.append(", ".join(dict.fromkeys(shown)))
        rows.append((key, cells))
    return rows


def common_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Give each setting that is the same in all runs."""
    rows = [(key, {_show(run.config, key) for run in runs}) for key in _keys(runs) if key != "run"]
    return [(key, values.pop()) for key, values in rows if len(values) == 1]


def _keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.config))


def _show(config: dict[str, Any], key: str) -> str:
    """Write a value as one would type it; a dash where an older run doesn't have the setting."""
    if key not in config:
        return MISSING
    value = config[key]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"
