"""The command `export` as a user types it, and the commands that take what it wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from psla_fast.augment import InputSpec
from psla_fast.cli import main
from psla_fast.models import ModelConfig
from psla_fast.shards import open_shards
from tests.small_net import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHA = r"  [\d,]+ bytes  sha256 [0-9a-f]{64}"


@pytest.fixture(scope="module")
def checkpoint(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with open_shards(packed / "eval") as shards:
        classes = shards.classes
    spec = InputSpec(clip_frames=96, num_mels=128, pad_value=-15.94, mean=-7.0, std=5.0)
    path = tmp_path_factory.mktemp("checkpoint") / "wa.pt"
    return write_checkpoint(path, config=ModelConfig(name="small"), spec=spec, classes=classes)


def run(*words: str | Path) -> None:
    main([str(word) for word in words])


def metrics_of(checkpoint: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run("evaluate", checkpoint, data, "--out", out, "--precision", "fp32")
    return capsys.readouterr().out.splitlines()[0]


def test_weights_go_out_and_every_command_takes_them_back(
    checkpoint: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, scores = packed / "eval", tmp_path / "scores.h5"
    wanted = metrics_of(checkpoint, data, scores, capsys)
    assert wanted.startswith("mAP: 0.")
    files, hub = tmp_path / "model.safetensors", tmp_path / "hub"
    for kind, out, names in (
        ("safetensors", files, ["model.safetensors", "model.json"]),
        ("hub", hub, ["hub/README.md", "hub/model.safetensors", "hub/config.json"]),
    ):
        run("export", checkpoint, "--format", kind, "--out", out)
        *lines, last = capsys.readouterr().out.splitlines()
        assert len(lines) == len(names)
        for line, name in zip(lines, names, strict=True):
            assert re.fullmatch(re.escape(str(tmp_path / name)) + SHA, line)
        assert last.startswith("scores differ from the checkpoint's by 0 at most, 0 on average")
        assert metrics_of(out, data, scores, capsys) == wanted
    run("ensemble", checkpoint, files, hub, "--data", data, "--precision", "fp32")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" mAP")[0] for line in lines[1:]] == [
        f"Model 0 {checkpoint}",
        f"Model 1 {files}",
        f"Model 2 {hub}",
        "Ensemble 3 Models",
    ]
    assert len({line.split(" mAP")[1] for line in lines[1:]}) == 1
    run("average", files, hub, "--out", tmp_path / "mean.pt")
    capsys.readouterr()
    assert metrics_of(tmp_path / "mean.pt", data, scores, capsys) == wanted
    run("export", hub, "--format", "safetensors", "--out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == files.read_bytes()


def test_int8_is_measured_on_shards_beside_float32_and_torch(
    checkpoint: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "m.int8.onnx"
    run(
        "export", checkpoint, "--format", "int8", "--out", out, "--data", packed / "eval", "--batch-size", "4"
    )
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"(?m)^(torch float32|onnx float32|int8) +(0\.\d{6}  .*)$", printed))
    assert set(rows) == {"torch float32", "onnx float32", "int8"}
    columns = {name: [float(cell) for cell in row.split()] for name, row in rows.items()}
    run("evaluate", checkpoint, packed / "eval", "--out", tmp_path / "s.h5", "--precision", "fp32")
    measured = re.search(r"mAP: (0\.\d+), AUC: (0\.\d+)", capsys.readouterr().out)
    assert measured is not None
    wanted = [float(measured[1]), float(measured[2])]
    assert columns["torch float32"][:2] == pytest.approx(wanted, abs=2e-6)
    assert columns["onnx float32"][:2] == pytest.approx(wanted, abs=2e-3)
    assert columns["int8"][:2] == pytest.approx(wanted, abs=0.1)
    assert min(cell for row in columns.values() for cell in row) > 0
    assert re.search(r"int8 against onnx float32: mAP [+-]0\.\d{4}, times the speed \d\.\d\d by 1, ", printed)
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_program_is_measured_on_shards_beside_torch(
    checkpoint: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--format", "torch-export", "--out", tmp_path / "m.pt2", "--batch-size", "4"]
    run("export", checkpoint, *words, "--data", packed / "eval")
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"(?m)^(torch float32|torch-export) +(0\.\d{6}  0\.\d{6}) ", printed))
    before, after = (
        [float(cell) for cell in rows[name].split()] for name in ("torch float32", "torch-export")
    )
    assert after == pytest.approx(before, abs=2e-3)
    assert re.search(r"torch-export against torch float32: mAP [+-]0\.\d{4}, times the speed ", printed)


def test_a_file_that_hears_waveforms_runs_without_this_package(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "m.onnx"
    words = ["--format", "onnx", "--out", out, "--with-fbank"]
    run("export", checkpoint, *words)
    script = (
        "import json, sys, numpy, onnxruntime\nsession = onnxruntime.InferenceSession(sys.argv[1])\n"
        "waveform = numpy.sin(numpy.arange(32000, dtype=numpy.float32))[None]\n"
        "scores = session.run(None, {'waveform': waveform})[0]\n"
        "names = json.loads(session.get_modelmeta().custom_metadata_map['class_names'])\n"
        "print(json.dumps([scores.shape, len(names), float(scores.max()), 'psla_fast' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, out], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    shape, num_names, largest, has_package = json.loads(done.stdout)
    assert shape == [1, num_names]
    assert 0 < largest <= 1
    assert not has_package


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--format", "onnx", "--out", "m.pt"],
            "--out m.pt can't be of --format onnx. Give a file NAME.onnx.",
        ),
        (["--format", "int8", "--out", "m.onnx"], "Give a file NAME.int8.onnx."),
        (["--format", "onnx", "--out", "m.int8.onnx"], "names int8, and --format onnx is float32"),
        (["--format", "hub", "--out", "LICENSE"], "--out LICENSE is a file. Give a folder"),
        (["--format", "hub", "--out", "LICENSE/hub"], "LICENSE is no folder one may write to"),
        (["--format", "hub", "--out", "h", "--with-fbank"], "hub holds weights alone"),
        (["--format", "hub", "--out", "h", "--data", "/no"], "--data measures onnx, torch-export and int8"),
        (["--format", "onnx", "--out", "m.onnx", "--data", "/no"], "index.h5 not found in /no"),
        (
            ["--format", "onnx", "--out", "m.onnx", "--data", "/no", "--batch-size", "0"],
            "--batch-size is 0; give",
        ),
        (["--format", "onnx", "--out", "m.onnx", "--batch-size", "4"], "--batch-size is for --data"),
        (["--format", "tflite", "--out", "m"], "tflite"),
        (["--format", "onnx"], "--out"),
    ],
)
def test_what_can_t_be_exported_is_one_line(
    words: list[str],
    message: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    before = set(ROOT.iterdir())
    with pytest.raises(SystemExit) as stop:
        run("export", checkpoint, *words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert set(ROOT.iterdir()) == before


def test_the_script_shows_its_help_and_refuses_a_missing_checkpoint():
    tool = [sys.executable, ROOT / "tools/export_model.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words, status, message in (
        (["--help"], 0, "--with-fbank"),
        (["no.pt", "--format", "hub", "--out", "h"], 2, "no.pt not found"),
    ):
        done = subprocess.run(
            [*tool, *words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        assert done.returncode == status, done.stderr
        assert message in done.stdout + done.stderr
