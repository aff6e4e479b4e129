"""The command line: `psla-fast COMMAND …`; the scripts in tools/ call the same functions."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from psla_fast.commands.average import average
from psla_fast.commands.enhance import enhance_labels
from psla_fast.commands.ensemble import ensemble
from psla_fast.commands.import_psla import import_psla
from psla_fast.commands.pack import pack
from psla_fast.commands.rounds import run_recipe
from psla_fast.commands.verify import verify
from psla_fast.commands.weights import weights
from psla_fast.distributed import DeviceName
from psla_fast.errors import exit_on_user_error
from psla_fast.evaluate import Precision
from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a packed split with a checkpoint: prints mAP, AUC and d-prime, writes the scores."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A file of RUN/checkpoints."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A packed split, for instance SHARDS/eval, or its URL; with --split the folder of the splits."""
    split: str = ""
    """Name of the split in DATA, for instance train; none: DATA is one."""
    out: Path = Path("scores.h5")
    """Score file to write: HDF5 with key, scores and targets."""
    batch_size: int = 32
    """Clips scored at once, 1 or more."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""
    per_class: Path | None = None
    """CSV to write, a row a class: positives, AP, AUC, d', lwlrap; precision, recall, F1 at a threshold."""
    bootstrap: int = 0
    """Resamples of the clips, for instance 1000, for 95 % intervals of the figures; 0: none."""
    thresholds: Path | None = None
    """Score file of the validation split: precision, recall and F1 at the thresholds that are best there."""


def evaluate(arguments: list[str]) -> None:
    """Evaluate a checkpoint on a split."""
    command = parse_flags(EvaluateCommand, arguments, "psla-fast evaluate")
    from psla_fast.commands.measures import prepare_measures, print_measures
    from psla_fast.evaluate import evaluate_checkpoint, save_evaluation
    from psla_fast.metrics import compute_lwlrap
    from psla_fast.shards import join

    data = join(command.data, command.split) if command.split else command.data
    if command.out.is_dir() or not command.out.resolve().parent.is_dir():
        raise ValueError(f"--out {command.out} can't be written: give a file in a folder that is there.")
    asked = prepare_measures(command.checkpoint, command.per_class, command.bootstrap, command.thresholds)
    result = evaluate_checkpoint(
        command.checkpoint, data, command.batch_size, command.precision, command.device
    )
    save_evaluation(command.out, result)
    metrics = result.metrics
    print(metrics)
    print(f"lwlrap: {compute_lwlrap(result.scores, result.targets).lwlrap:.6f}")
    only_positive = metrics.num_auc_skipped - metrics.num_skipped
    no_auc = f", {only_positive} without negatives out of the AUC" if only_positive else ""
    print(
        f"{len(result.keys)} clips; mean over {metrics.num_classes} classes, {metrics.num_skipped} without "
        f"positives left out{no_auc}; scores are in {command.out}"
    )
    print_measures(asked, result)


def report(arguments: list[str]) -> None:
    """Write a page that shows runs."""
    from psla_fast.commands.report import report as run_report

    run_report(arguments)


def serve(arguments: list[str]) -> None:
    """Serve a checkpoint as a web page."""
    from psla_fast.commands.serve import serve as run_serve

    run_serve(arguments)


def export(arguments: list[str]) -> None:
    """Export a checkpoint to another format."""
    from psla_fast.commands.export import export as run_export

    run_export(arguments)


def tag(arguments: list[str]) -> None:
    """Tag audio with a checkpoint."""
    from psla_fast.commands.tag import tag as run_tag

    run_tag(arguments)


def train(arguments: list[str]) -> None:
    """Train on one rank; several need torchrun."""
    from psla_fast.train.__main__ import main as train_main

    train_main(arguments)


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
    from psla_fast.demo import write_synthetic_fsd50k

    data, shards, run = (str(command.out / name) for name in ("FSD50K", "shards", "run"))
    best = f"{run}/checkpoints/best.pt"
    print(f"building a synthetic FSD50K of {command.clips} clips in {data}", flush=True)
    write_synthetic_fsd50k(Path(data), command.clips, command.seed)
    for step, words in (
        (pack, ["pack", "fsd50k", data, shards]),
        (train, ["train", "demo", "--data.shards", shards, "--run", run, "--seed", str(command.seed)]),
        (evaluate, ["evaluate", best, f"{shards}/eval", "--out", f"{run}/scores/eval_best.h5"]),
        (ensemble, ["ensemble", best, f"{run}/checkpoints/wa.pt", "--data", f"{shards}/eval"]),
    ):
        print(f"\n$ psla-fast {shlex.join(words)}", flush=True)
        step(words[1:])
    print(f"\nThe run is in {run}: result.csv, best_single_result.csv, wa_result.csv, ensemble_result.csv,")
    print(f"checkpoints/, scores/, events/ (tensorboard --logdir {run}/events). The shards are in {shards}.")


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "demo": (
        demo,
        "build a small synthetic FSD50K, pack it, train, evaluate: the whole way in minutes, on a CPU",
    ),
    "pack": (pack, "labelled audio -> tar shards of fbanks and labels"),
    "verify": (verify, "checks every byte of packed splits; --repair packs broken shards again"),
    "weights": (weights, "label set -> PSLA's sample weights (_weight.csv)"),
    "train": (train, "shards -> a run folder with checkpoints, scores and PSLA's result files"),
    "evaluate": (evaluate, "checkpoint + shards -> mAP, AUC, d-prime and a score file"),
    "import": (import_psla, "PSLA's official weights -> a checkpoint"),
    "enhance": (enhance_labels, "scores + labels + ontology -> label sets with what annotators missed"),
    "recipe": (
        run_recipe,
        "shards -> round 1, enhanced labels, round 2 with several seeds, ensembles, report",
    ),
    "average": (average, "checkpoints -> one with the mean of their weights"),
    "ensemble": (ensemble, "checkpoints or score files -> PSLA's ensemble summary"),
    "tag": (tag, "audio files, folders, or raw PCM on stdin -> top classes: text, JSON, CSV, timeline"),
    "serve": (serve, "checkpoint -> a web page that tags recordings, and the same as JSON"),
    "export": (export, "checkpoint -> safetensors, the Hub's layout, ONNX, torch.export, int8 ONNX"),
    "report": (report, "run folders -> one page: curves, results, classes, confusions, examples"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run `psla-fast COMMAND …`; exits with 2 and one line for bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print("usage: psla-fast COMMAND …   (each takes --help)\n")
        print("\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()))
        sys.exit(0 if words else 2)
    with exit_on_user_error(f"psla-fast {words[0]}"):
        if words[0] not in COMMANDS:
            raise ValueError(f"{words[0]!r} is no command. Commands are {', '.join(COMMANDS)}.")
        COMMANDS[words[0]][0](words[1:])


if __name__ == "__main__":
    main()
