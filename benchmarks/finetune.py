"""What fine-tuning is worth: new classes, learnt from nothing, from ImageNet, or from a tagger of others.

Taggers are trained on an FSD50K's clips without the new classes; the others have these labels alone.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ablation_runs import RESULTS, TINY, read_eval_map, train
from record import print_table, read_environment, write_record

from psla_fast.classes import Classes
from psla_fast.clip import Clip, Rejected
from psla_fast.demo import write_synthetic_fsd50k
from psla_fast.errors import exit_on_user_error
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.recipe import parse_flags
from psla_fast.sources import Split, read_fsd50k

NEW = ("Bass_drum", "Snare_drum", "Crash_cymbal", "Cowbell", "Bell", "Clapping", "Glass", "Bird")
ALL_ALIKE = ("--optim.freeze-epochs=0", "--optim.backbone-lr-factor=1")
FROM_NOTHING = "nothing, all trained alike"
ROWS = {  # what a run starts from, and flags after `small_cpu finetune`
    FROM_NOTHING: ("none", ALL_ALIKE),
    "ImageNet, all trained alike": ("imagenet", ALL_ALIKE),
    "ImageNet, finetune": ("imagenet", ()),
    "tagger, all trained alike": ("tagger", ALL_ALIKE),
    "tagger, finetune": ("tagger", ()),
    "tagger, finetune, backbone at 0.3": ("tagger", ("--optim.backbone-lr-factor=0.3",)),
    "tagger, head alone": ("tagger", ("--optim.freeze-epochs=1000",)),
}


@dataclass(frozen=True)
class Finetune:
    """Train taggers on some classes, fine-tune them on others."""

    fsd50k: str = ""
    """An FSD50K folder, for instance of real recordings."""
    out: str = "finetune_runs"
    """Folder of shards and runs: what is finished there isn't trained again."""
    new: tuple[str, ...] = NEW
    """Names of the new classes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each row is trained with each of these seeds."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the table; "nothing, all trained alike" is what the others are compared with."""
    jobs: int = 2
    """Runs at a time; with more than one, each has one thread."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def part(split: Split, new: list[int], wanted: bool) -> Split:
    """Keep the clips with new classes, and of their labels these; or the clips without any, as they are."""

    def read() -> Iterator[Clip | Rejected]:
        for clip in split.read():
            if isinstance(clip, Clip):
                labels = tuple(new.index(label) for label in clip.labels if label in new)
                if bool(labels) == wanted:
                    yield replace(clip, labels=tuple(sorted(labels))) if wanted else clip

    return replace(split, read=read)


def pack_parts(config: Finetune, out: Path) -> None:
    """Pack OUT/shards_old and OUT/shards_new."""
    classes, splits = read_fsd50k(Path(config.fsd50k))
    unknown = [name for name in config.new if name not in classes.names]
    if unknown:
        raise ValueError(f"{config.fsd50k} has no class {unknown[0]}. Give names of its vocabulary to --new.")
    new = [classes.names.index(name) for name in config.new]
    of_new = Classes(tuple(classes.mids[i] for i in new), tuple(config.new))
    for name, vocabulary in (("old", classes), ("new", of_new)):
        parts = [part(split, new, wanted=name == "new") for split in splits]
        pack_splits(vocabulary, parts, out / f"shards_{name}", PackConfig(), WorkConfig())


def run_all(config: Finetune, out: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Train the taggers, then the rows: eval mAP by row, seed and result."""
    tiny = TINY.split() if config.tiny else []
    base = [sys.executable, "-m", "psla_fast.train", "small_cpu"]
    alone, warm = config.jobs > 1, ["--optim.warmup-steps=0"] if config.tiny else []

    def name(run: Path, seed: int) -> list[str]:
        return [f"--run={run}", f"--seed={seed}", "--keep-epochs=False"]

    def train_tagger(seed: int) -> None:
        run = out / f"tagger_{seed}"
        train([*base, f"--data.shards={out}/shards_old", *name(run, seed), *tiny], run, alone)

    def train_row(row: str, seed: int) -> dict[str, float]:
        start, extra = ROWS[row]
        run = out / f"{row.replace(', ', '_').replace(' ', '_')}_{seed}"
        start = f"{out}/tagger_{seed}/checkpoints/wa.pt" if start == "tagger" else start
        flags = [f"--data.shards={out}/shards_new", *name(run, seed), *tiny, *warm, *extra]
        train([*base, "finetune", *flags, f"--model.pretrained={start}"], run, alone)
        return read_eval_map(run)

    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(train_tagger, config.seeds))
        keys = list(itertools.product(config.rows, config.seeds))
        found = dict(zip(keys, pool.map(lambda key: train_row(*key), keys), strict=True))
    return {row: {seed: found[row, seed] for seed in config.seeds} for row in config.rows}


def main() -> None:
    """Pack, train, print the table, write the record."""
    config = parse_flags(Finetune, sys.argv[1:], "benchmarks/finetune.py")
    if not {FROM_NOTHING} <= set(config.rows) <= set(ROWS):
        raise ValueError(f"--rows is {config.rows}; give {FROM_NOTHING!r} and others of {list(ROWS)}.")
    with tempfile.TemporaryDirectory(prefix="psla_fast_finetune_") as temporary:
        if config.tiny:
            write_synthetic_fsd50k(Path(temporary) / "audio", num_clips=60, seed=0)
            paths = {"fsd50k": f"{temporary}/audio", "out": f"{temporary}/runs", "seeds": (0,)}
            config = replace(
                config, **paths, new=("Low_tone", "Hiss"), rows=(FROM_NOTHING, "tagger, finetune")
            )
        pack_parts(config, Path(config.out))
        values = run_all(config, Path(config.out))
    rows = []
    for row, seeds in values.items():
        columns = [[results[key] for results in seeds.values()] for key in RESULTS]
        spread = [f" ± {np.std(column, ddof=1):.3f}" if len(column) > 1 else "" for column in columns]
        rows.append([row, *(f"{np.mean(c):.3f}{s}" for c, s in zip(columns, spread, strict=True))])
    print_table(["eval mAP of the new classes", "best epoch", "weights averaged", "ensembled"], rows)
    means = {row: np.mean([one["weights"] for one in seeds.values()]) for row, seeds in values.items()}
    ratios = {f"{row} / nothing": round(float(mean / means[FROM_NOTHING]), 4) for row, mean in means.items()}
    record = {
        "benchmark": "finetune",
        "ratios": ratios,
        "by_row_and_seed": values,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "config": asdict(config),
        "environment": read_environment(),
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/finetune.py"):
        main()
