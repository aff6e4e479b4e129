"""Tables: runs' results -> the rows of the results table, and the page's headline figures."""

import statistics
from collections.abc import Sequence
from typing import Any

from psla_fast.classes import Classes
from psla_fast.metrics import d_prime
from psla_fast.report.groups import Group
from psla_fast.report.numbers import format_spread
from psla_fast.report.runs import KINDS, Run

HEADLINE = ("ensemble", "wa", "ema", "best")  # the first that is there


def result_of(run: Run, kind: str, role: str) -> tuple[float, float] | None:
    """Give mAP and AUC of a kind of result on `val` or `eval`; None where that isn't there."""
    values = run.results.get(kind, [])
    start = 0 if role == "val" else 2
    return (values[start], values[start + 1]) if len(values) >= start + 2 else None


def build_results(runs: Sequence[Run], groups: Sequence[Group], role: str) -> dict[str, Any]:
    """Give the kinds of results that are there, and a row for each group of seeds and each run."""
    kinds = [kind for kind in KINDS if any(result_of(run, kind, role) for run in runs)]
    rows = []
    for number, group in enumerate(groups):
        members = [runs[member] for member in group.members]
        if len(members) > 1:
            rows.append({**_row(group.name, members, kinds, role), "colour": number, "level": "group"})
        level = "seed" if len(members) > 1 else ""
        rows += [{**_row(run.name, [run], kinds, role), "colour": number, "level": level} for run in members]
    return {"kinds": [(kind, KINDS[kind][0]) for kind in kinds], "rows": rows}


def _row(name: str, runs: Sequence[Run], kinds: Sequence[str], role: str) -> dict[str, Any]:
    cells = []
    for kind in kinds:
        found = [pair for run in runs if (pair := result_of(run, kind, role))]
        cells += [format_spread([pair[0] for pair in found]), format_spread([pair[1] for pair in found])]
    last = next((kind for kind in HEADLINE if kind in kinds), "")
    aucs = [pair[1] for run in runs if (pair := result_of(run, last, role))]
    epochs = dict.fromkeys(f"{len(run.table)} / {run.num_epochs or '?'}" for run in runs)
    best = dict.fromkeys(str(run.best_epoch) if run.best_epoch else "–" for run in runs)
    return {
        "name": name,
        "seeds": ", ".join(str(run.config.get("seed", "?")) for run in runs),
        "epochs": ", ".join(epochs),
        "best_epoch": ", ".join(best),
        "cells": cells,
        "d_prime": format_spread([d_prime(auc) for auc in aucs], 2),
        "unfinished": not all(run.is_finished for run in runs),
    }


def build_tiles(
    runs: Sequence[Run],
    groups: Sequence[Group],
    role: str,
    measured: int,
    classes: Classes | None,
    sizes: dict[str, int],
) -> list[dict[str, str]]:
    """Give the headline figures: the highest group's, how much it was measured on, and how fast it ran."""
    tiles = _headline(runs, groups, role)
    if classes and measured:
        note = "all have clips" if measured == len(classes) else f"of {len(classes)} have clips to measure"
        tiles.append({"label": f"Classes in {role}", "value": f"{measured}", "note": note})
    if sizes:
        first, *others = sizes
        note = ", ".join(f"{sizes[name]:,} {name}" for name in others)
        tiles.append({"label": f"Clips in {first}", "value": f"{sizes[first]:,}", "note": note})
    steps = [row for run in runs for row in run.log.steps]
    rates = [row["clips_per_second"] for row in steps if row.get("clips_per_second") is not None]
    if rates:
        waits = [row["loader_wait"] for row in steps if row.get("loader_wait") is not None]
        note = f"clips/s; {statistics.fmean(waits):.1%} waiting for data" if waits else "clips/s"
        rate = statistics.median(rates)
        tiles.append(
            {"label": "Median speed", "value": f"{rate:,.0f}" if rate >= 20 else f"{rate:.1f}", "note": note}
        )
    return [*tiles, _progress(runs, groups)]


def _progress(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, str]:
    if len(runs) == 1:
        done, whole = len(runs[0].table), runs[0].num_epochs
        note = f"of {whole}, finished" if runs[0].is_finished else f"of {whole or '?'}, unfinished"
        return {"label": "Epochs", "value": f"{done:,}", "note": note}
    left = sum(not run.is_finished for run in runs)
    many = "1 configuration" if len(groups) == 1 else f"{len(groups)} configurations"
    note = f"{many}, {f'{left} unfinished' if left else 'all finished'}"
    return {"label": "Runs", "value": f"{len(runs)}", "note": note}


def _headline(runs: Sequence[Run], groups: Sequence[Group], role: str) -> list[dict[str, str]]:
    for kind in HEADLINE:
        found = []
        for group in groups:
            pairs = [pair for member in group.members if (pair := result_of(runs[member], kind, role))]
            if pairs:
                found.append((statistics.fmean(pair[0] for pair in pairs), group.name, pairs))
        if not found:
            continue
        _, name, pairs = max(found, key=lambda entry: entry[0])
        what = KINDS[kind][0].lower()
        where = f"{name}, {what}" if len(groups) > 1 else what
        label = f"{'Highest ' if len(groups) > 1 else ''}{role} mAP"
        auc = format_spread([pair[1] for pair in pairs])
        prime = format_spread([d_prime(pair[1]) for pair in pairs], 2)
        return [
            {"label": label, "value": format_spread([pair[0] for pair in pairs]), "note": where},
            {"label": "AUC", "value": auc, "note": f"d′ {prime}"},
        ]
    return []
