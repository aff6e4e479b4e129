"""What label enhancement brings back: labels are removed on purpose, a model trained without them enhances.

Of the labels that are a child or an ancestor of another of their clip, a share is removed from the training
split; a run is trained on what is left, and enhances it -> precision and recall of the removed labels by type
and threshold, and the eval mAP of training on the labels with and without them, and enhanced.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ablation_runs import TINY, read_eval_map, train, write_tiny
from record import print_table, read_environment, write_record

from psla_fast.commands.enhance import enhance_labels
from psla_fast.errors import exit_on_user_error
from psla_fast.labels import LabelTable, read_labels, write_labels
from psla_fast.ontology import PACKAGED, UNEXPANDED_FSD50K, Relations, find_relations, read_ontology
from psla_fast.recipe import parse_flags
from psla_fast.shards import open_shards

THRESHOLDS = ("mean", "median", "25", "10", "5")
TYPES = {"1": "type1", "2": "type2", "both": "type1_2"}


@dataclass(frozen=True)
class Enhance:
    """Remove labels, train, enhance, and see what comes back."""

    shards: str = ""
    """Folder that pack wrote: train, val and eval."""
    out: str = "enhance_runs"
    """Folder of the runs: what is finished there isn't trained again."""
    recipe: str = "small_cpu"
    """Recipe of the runs."""
    removed: float = 0.3
    """Share of the children and ancestors that is removed."""
    ontology: str = ""
    """Ontology in AudioSet's JSON format; none: the packaged one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the removal and of the runs."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def remove_labels(table: LabelTable, relations: Relations, share: float, seed: int) -> LabelTable:
    """Remove a share of the labels with a parent or descendant among their clip's, never all of a clip's."""
    rng = np.random.default_rng(seed)
    related = [
        set(children.tolist()) | set(ancestors.tolist())
        for children, ancestors in zip(relations.children, relations.ancestors, strict=True)
    ]
    lists = []
    for row in range(len(table)):
        own = table.labels(row).tolist()
        known = set().union(*(related[label] for label in own))
        kept = [label for label in own if label not in known or rng.random() >= share]
        lists.append(kept or [own[0]])
    indptr = np.concatenate([[0], np.cumsum([len(labels) for labels in lists])])
    return replace(table, indptr=indptr, indices=np.array([i for one in lists for i in one], np.int32))


def pairs(table: LabelTable) -> set[tuple[str, int]]:
    """All (key, label)."""
    return {(key, label) for row, key in enumerate(table.keys) for label in table.labels(row).tolist()}


def run_seed(config: Enhance, seed: int, tiny: list[str]) -> dict[str, dict[str, float]]:
    """Remove, train, enhance, and train on each label set: rates by enhanced set, mAP by label set."""
    folder = Path(config.out)
    with open_shards(f"{config.shards}/train") as shards:
        classes = shards.classes
        whole = LabelTable(Path("whole"), shards.keys, shards.index.indptr, shards.index.indices)
    relations = find_relations(read_ontology(Path(config.ontology or PACKAGED)), classes, UNEXPANDED_FSD50K)
    less = remove_labels(whole, relations, config.removed, seed)
    write_labels(folder / f"less_{seed}.csv", less, classes)

    def train_on(name: str, labels: str) -> Path:
        run = folder / f"{name}_{seed}"
        command = [sys.executable, "-m", "psla_fast.train", config.recipe, f"--data.shards={config.shards}"]
        command += [f"--data.labels={labels}"] if labels else []
        train([*command, f"--run={run}", f"--seed={seed}", "--keep-epochs=False", *tiny], run, False)
        return run

    first = train_on("less", f"{folder}/less_{seed}.csv")
    removed, kept = pairs(whole) - pairs(less), pairs(less)
    rates: dict[str, dict[str, float]] = {"removed": {"labels": len(removed), "left": len(kept)}}
    for kind, name in TYPES.items():
        words = ["--run", str(first), "--ontology", config.ontology or str(PACKAGED)]
        enhance_labels([*words, "--threshold", "all", "--type", kind])
        for threshold in THRESHOLDS:
            table = read_labels(first / f"enhance/train_{name}_{threshold}.csv", classes)
            added = pairs(table) - kept
            back = len(added & removed)
            rates[f"{name} {threshold}"] = {
                "added": len(added),
                "precision": round(back / max(1, len(added)), 4),
                "recall": round(back / max(1, len(removed)), 4),
            }
    for name, labels in (("whole", ""), ("enhanced", f"{first}/enhance/train_type1_2_mean.csv")):
        rates[f"trained on {name}"] = read_eval_map(train_on(name, labels))
    return {**rates, "trained on less": read_eval_map(first)}


def main() -> None:
    """Run each seed, print the tables, write the record."""
    config = parse_flags(Enhance, sys.argv[1:], "benchmarks/enhance.py")
    with tempfile.TemporaryDirectory(prefix="psla_fast_enhance_") as temporary:
        tiny = TINY.split() if config.tiny else []
        if config.tiny:
            paths = write_tiny(Path(temporary))
            ontology = f"{paths['waveforms']}/ontology.json"
            config = replace(config, shards=paths["shards"], out=paths["out"], ontology=ontology, seeds=(0,))
        by_seed = {seed: run_seed(config, seed, tiny) for seed in config.seeds}

    def mean(row: str, key: str) -> float:
        return round(float(np.mean([rates[row][key] for rates in by_seed.values()])), 4)

    print(f"\n{mean('removed', 'labels'):.0f} labels removed, {mean('removed', 'left'):.0f} left")
    rows = [f"{name} {threshold}" for name in TYPES.values() for threshold in THRESHOLDS]
    cells = [[row, f"{mean(row, 'added'):.0f}", mean(row, "precision"), mean(row, "recall")] for row in rows]
    print_table(["enhanced", "added", "precision", "recall"], cells)
    sets, results = ("whole", "less", "enhanced"), ("single", "weights", "ensemble")
    maps = [[name, *(mean(f"trained on {name}", result) for result in results)] for name in sets]
    print_table(["eval mAP, trained on", *results], maps)
    record = {
        "benchmark": "enhance",
        "ratios": {
            f"{name}/less": round(
                mean(f"trained on {name}", "weights") / mean("trained on less", "weights"), 4
            )
            for name in ("whole", "enhanced")
        },
        "recovered": {row: {key: mean(row, key) for key in ("added", "precision", "recall")} for row in rows},
        "by_seed": by_seed,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "config": asdict(config),
        "environment": read_environment(),
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/enhance.py"):
        main()
