"""The command demo: the whole way on built-in data, each step as one would type it."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from psla_fast.commands.ensemble import ensemble
from psla_fast.commands.evaluate import evaluate
from psla_fast.commands.pack import pack
from psla_fast.commands.report import report
from psla_fast.commands.tag import tag
from psla_fast.demo import write_synthetic_fsd50k
from psla_fast.recipe import parse_flags
from psla_fast.train.__main__ import main as train


@dataclass(frozen=True)
class DemoCommand:
    """Build a small synthetic FSD50K, pack it, train on it, evaluate: the whole way in minutes on a CPU."""

    out: tyro.conf.Positional[Path] = Path("demo")
    """Folder for data set, shards and run; a second demo there goes on where the first stopped."""
    clips: int = 480
    """Clips to make, over all splits."""
    seed: int = 0
    """Seeds the sounds and the run."""


def demo(arguments: list[str]) -> None:
    """Run the commands of the whole way one after the other, each shown as one would type it."""
    command = parse_flags(DemoCommand, arguments, "psla-fast demo")
    data, shards, run = (str(command.out / name) for name in ("FSD50K", "shards", "run"))
    best = f"{run}/checkpoints/best.pt"
    print(f"building a synthetic FSD50K of {command.clips} clips in {data}", flush=True)
    write_synthetic_fsd50k(Path(data), command.clips, command.seed)
    sound = str(min(Path(data, "FSD50K.eval_audio").iterdir()))
    for step, words in (
        (pack, ["pack", "fsd50k", data, shards]),
        (train, ["train", "demo", "--data.shards", shards, "--run", run, "--seed", str(command.seed)]),
        (evaluate, ["evaluate", best, f"{shards}/eval", "--out", f"{run}/scores/eval_best.h5"]),
        (ensemble, ["ensemble", best, f"{run}/checkpoints/wa.pt", "--data", f"{shards}/eval"]),
        (tag, ["tag", sound, "--checkpoint", best, "--top", "3"]),
        (report, ["report", run, "--out", f"{run}/report.html"]),
    ):
        print(f"\n$ psla-fast {shlex.join(words)}", flush=True)
        step(words[1:])
    print(f"\nThe run is in {run}: report.html, result.csv, best_single_result.csv, wa_result.csv,")
    print(f"ensemble_result.csv, checkpoints/, scores/, events/ (tensorboard --logdir {run}/events).")
    print(f"The shards are in {shards}.")
