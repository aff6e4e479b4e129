"""The command line: `psla-fast COMMAND …`; the scripts in tools/ call the same functions."""

import importlib
import sys

from psla_fast.errors import exit_on_user_error

# Name of a command -> the function that takes its arguments, imported when it's called, and what it does
COMMANDS = {
    "demo": (
        "psla_fast.commands.demo:demo",
        "build a small synthetic FSD50K, pack it, train, evaluate: the whole way in minutes, on a CPU",
    ),
    "pack": ("psla_fast.commands.pack:pack", "labelled audio -> tar shards of fbanks and labels"),
    "verify": (
        "psla_fast.commands.verify:verify",
        "checks every byte of packed splits; --repair packs broken shards again",
    ),
    "weights": (
        "psla_fast.commands.weights:weights",
        "label set -> PSLA's sample weights (_weight.csv)",
    ),
    "train": (
        "psla_fast.train.__main__:main",
        "shards -> a run folder with checkpoints, scores and PSLA's result files",
    ),
    "evaluate": (
        "psla_fast.commands.evaluate:evaluate",
        "checkpoint + shards -> mAP, AUC, d-prime and a score file",
    ),
    "import": ("psla_fast.commands.import_psla:import_psla", "PSLA's official weights -> a checkpoint"),
    "enhance": (
        "psla_fast.commands.enhance:enhance_labels",
        "scores + labels + ontology -> label sets with what annotators missed",
    ),
    "recipe": (
        "psla_fast.commands.rounds:run_recipe",
        "shards -> round 1, enhanced labels, round 2 with several seeds, ensembles, report",
    ),
    "average": ("psla_fast.commands.average:average", "checkpoints -> one with the mean of their weights"),
    "ensemble": (
        "psla_fast.commands.ensemble:ensemble",
        "checkpoints or score files -> PSLA's ensemble summary",
    ),
    "tag": (
        "psla_fast.commands.tag:tag",
        "audio files, folders, or raw PCM on stdin -> top classes: text, JSON, CSV, timeline",
    ),
    "serve": (
        "psla_fast.commands.serve:serve",
        "checkpoint -> a web page that tags recordings, and the same as JSON",
    ),
    "export": (
        "psla_fast.commands.export:export",
        "checkpoint -> safetensors, the Hub's layout, ONNX, torch.export, int8 ONNX",
    ),
    "report": (
        "psla_fast.commands.report:report",
        "run folders -> one page: curves, results, classes, confusions, examples",
    ),
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
        module, _, function = COMMANDS[words[0]][0].partition(":")
        getattr(importlib.import_module(module), function)(words[1:])


if __name__ == "__main__":
    main()
