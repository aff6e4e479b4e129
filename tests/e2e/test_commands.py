"""The commands as a user types them, in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from psla_fast.scores import read_scores

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--input.clip-frames", "64", "--optim.batch-size", "8", "--optim.epochs", "2", "--wa.start", "1"]
SMALL += ["--optim.warmup-steps", "2", "--log-every-steps", "1", "--augment.time-mask-frames", "10"]


def run(*command: str | Path, status: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tool(
    name: str, *words: str | Path, status: int = 0, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "tools" / f"{name}.py", *words, status=status, cwd=cwd)


def train_command(shards: Path, folder: Path, *flags: str) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "psla_fast.train", "demo", "--data.shards", shards]
    return [*command, "--run", folder, *SMALL, *flags]


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(*train_command(packed, folder))
    return folder


def test_pack_prints_what_it_did_and_packs_from_any_folder(synthetic_fsd50k: Path, tmp_path: Path):
    out = tool(
        "pack_shards", "fsd50k", synthetic_fsd50k, tmp_path / "s", "--workers", "1", cwd=tmp_path
    ).stdout
    assert "train: 64 of 64 clips found" in out
    assert re.search(r"\nclips +64 +16 +16\n", out)
    assert re.search(r"\nlog-mel mean( +-?\d+\.\d{4}){3}   PSLA's AudioSet: -4\.6476\n", out)
    assert (tmp_path / "s/classes.csv").is_file()


def test_evaluate_gives_the_figures_of_the_run(trained: Path, packed: Path, tmp_path: Path):
    best = np.loadtxt(trained / "best_single_result.csv")
    out = tool(
        "evaluate", trained / "checkpoints/best.pt", packed / "eval", "--out", tmp_path / "scores.h5"
    ).stdout
    measured = re.search(r"mAP: (\d\.\d{6}), AUC: (\d\.\d{6}), d-prime: -?\d\.\d{6}", out)
    assert measured is not None
    assert float(measured[1]) == pytest.approx(best[2], abs=2e-6)
    assert float(measured[2]) == pytest.approx(best[3], abs=2e-6)
    assert read_scores(tmp_path / "scores.h5").scores.shape == (16, 14)


def test_averaging_one_checkpoint_twice_changes_no_score(trained: Path, packed: Path, tmp_path: Path):
    best = trained / "checkpoints/best.pt"
    tool("average_weights", best, best, "--out", tmp_path / "wa.pt")
    outs = [
        tool("evaluate", path, packed / "val", "--out", tmp_path / "s.h5").stdout.splitlines()[0]
        for path in (best, tmp_path / "wa.pt")
    ]
    assert outs[0] == outs[1]


def test_the_average_of_the_epochs_is_the_run_s_own(trained: Path, packed: Path, tmp_path: Path):
    epochs = sorted((trained / "checkpoints").glob("epoch_*.pt"))
    tool("average_weights", *epochs, "--out", tmp_path / "wa.pt")
    out = tool("evaluate", tmp_path / "wa.pt", packed / "val", "--out", tmp_path / "s.h5").stdout
    measured = re.search(r"mAP: (\d\.\d{6})", out)
    assert measured is not None
    assert float(measured[1]) == pytest.approx(np.loadtxt(trained / "wa_result.csv")[0], abs=2e-6)


def test_the_ensemble_summary_has_psla_s_lines(trained: Path, packed: Path, tmp_path: Path):
    best, last = trained / "checkpoints/best.pt", trained / "checkpoints/last.pt"
    tool("evaluate", last, packed / "eval", "--out", tmp_path / "last.h5")
    lines = tool("ensemble", best, tmp_path / "last.h5", "--data", packed / "eval").stdout.splitlines()
    figures = r"mAP: \d\.\d{6}, AUC: \d\.\d{6}, d-prime: -?\d\.\d{6}"
    assert lines[0].strip("-") == "Ensemble Result Summary"
    assert re.fullmatch(rf"Model 0 {re.escape(str(best))} {figures}", lines[1])
    assert re.fullmatch(rf"Model 1 .*last\.h5 {figures}", lines[2])
    assert re.fullmatch(rf"Ensemble 2 Models {figures}", lines[3])


def test_torchrun_trains_on_two_ranks(packed: Path, tmp_path: Path):
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2"]
    out = run(*torchrun, *train_command(packed, tmp_path / "run")[1:]).stdout
    assert out.count("epoch 2/2 done") == 1  # only the first rank prints
    assert np.loadtxt(tmp_path / "run/result.csv", delimiter=",").shape == (2, 10)
    assert np.isfinite(np.loadtxt(tmp_path / "run/wa_result.csv")).all()


def test_a_killed_run_goes_on_and_ends_like_an_uninterrupted_one(trained: Path, packed: Path, tmp_path: Path):
    command = [str(w) for w in train_command(packed, tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/2 step 3"):
                process.send_signal(signal.SIGKILL)
                break
    out = run(*command).stdout
    assert "going on at epoch 2, step 1" in out
    for name in ("result.csv", "wa_result.csv", "ensemble_result.csv", "best_single_result.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes(), name


def test_sigterm_saves_mid_epoch_and_the_same_command_goes_on(trained: Path, packed: Path, tmp_path: Path):
    command = [str(w) for w in train_command(packed, tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("epoch 1/2 step 4"):
                process.terminate()
        start = time.monotonic()
        assert process.wait() == 3
        assert time.monotonic() - start < 30
    assert "stopped by SIGTERM; the same command goes on from" in output
    assert "going on at epoch 1, step" in run(*command).stdout
    assert (tmp_path / "run/result.csv").read_bytes() == (trained / "result.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "psla_fast.train", "fsd50k", "--run", "R"], "--data.shards"),
        (["-m", "psla_fast.train", "fsd50"], "recipe 'fsd50' not found. Did you mean 'fsd50k'?"),
        (
            ["-m", "psla_fast.train", "demo", "--data.shards", "/no", "--run", "R"],
            "index.h5 not found in /no/train",
        ),
        (["-m", "psla_fast.train", "demo", "--optim.epoch", "1"], "Did you mean 'optim.epochs'?"),
        (["tools/pack_shards.py", "fsd50k", "/no", "OUT"], "vocabulary.csv not found in /no"),
        (["tools/pack_shards.py", "fsd5k", "/no", "OUT"], "'fsd5k' is no source. Give one of fsd50k,"),
        (["tools/pack_shards.py", "table", "/no.csv", "OUT"], "--classes"),
        (["tools/pack_shards.py", "table", "/no.csv", "--classes", "fsd50k", "OUT"], "/no.csv not found"),
        (
            ["tools/pack_shards.py", "datafile", "LICENSE", "--classes", "audioset", "OUT"],
            "LICENSE is not JSON",
        ),
        (["tools/pack_shards.py", "hdf5", "LICENSE", "--classes", "audioset", "OUT"], "LICENSE"),
        (["tools/pack_shards.py", "esc50", "/no", "OUT", "--fold", "9"], "fold"),
        (["tools/pack_shards.py", "fsd50k", "/no", "OUT", "--part", "3/2"], "--part is '3/2'; give i/n"),
        (["tools/pack_shards.py", "fsd50k", "/no", "OUT", "--address", "a:1"], "--address needs --engine"),
        (["tools/pack_shards.py", "merge", "/no"], "no pack.json in /no"),
        (["tools/verify_shards.py", "/no"], "no packed split in /no"),
        (["tools/sample_weights.py", "LICENSE"], "--classes is missing"),
        (["tools/evaluate.py", "no.pt", "/no"], "no.pt not found"),
        (["tools/ensemble.py", "no.pt", "--data", "/no"], "index.h5 not found in /no"),
        (["tools/average_weights.py", "LICENSE", "--out", "x.pt"], "not a whole torch file"),
        (["-m", "psla_fast.cli", "trian"], "'trian' is no command"),
        (["tools/pack_shards.py", "fsd50k", "/no", "OUT", "--fbank.num-mels", "0"], "0 mels"),
        (["tools/evaluate.py", "no.pt", "/no", "--out", "/tmp"], "--out /tmp can't be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], message: str):
    done = run(sys.executable, *words, status=2)
    assert not (ROOT / "R").exists()
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["demo", "verify", "weights", "train", "evaluate", "average", "ensemble"])
def test_help_names_the_command_and_exits_with_0(command: str):
    out = run(sys.executable, "-m", "psla_fast.cli", command, "--help").stdout
    assert out.startswith("usage: ")
    assert "--help" in out


@pytest.mark.parametrize(
    "source", ["fsd50k", "audioset", "datafile", "hdf5", "esc50", "table", "folder", "merge"]
)
def test_every_source_has_its_help(source: str, capsys: pytest.CaptureFixture[str]):
    from psla_fast.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["pack", source, "--help"])
    assert stop.value.code == 0
    assert f"psla-fast pack {source}" in capsys.readouterr().out
    main(["pack", "--help"])
    assert f"\n  {source} " in capsys.readouterr().out
