"""`psla-fast tag` as it is typed."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from psla_fast.cli import main
from psla_fast.scores import write_scores
from tests.makers import CLASSES
from tests.taggers import make_noise, save_model, write_noise

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("net") / "b0.pt", "efficientnet_b0")


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch: pytest.MonkeyPatch, net: Path):
    monkeypatch.setenv("PSLA_FAST_CHECKPOINT", str(net))


def tag(*words: object) -> int:
    """The exit status of `psla-fast tag WORDS`."""
    try:
        main(["tag", *map(str, words), "--precision", "fp32"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else -1
    return 0


def test_text_names_the_top_classes_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [write_noise(tmp_path / name, 0.5) for name in ("a.wav", "b c.wav")]
    assert tag(*files, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files[0]}  0.50 s"
    assert lines[3] == f"{files[1]}  0.50 s"
    names = [line.split(maxsplit=1)[1].strip() for line in lines[1:3] + lines[4:6]]
    assert len(lines) == 6
    assert set(names) <= set(CLASSES.names)


def test_json_is_an_object_a_line_with_labels_where_thresholds_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = write_noise(tmp_path / "a.wav", 2.5)
    scores, targets = np.full((2, 4), 0.5), np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    scores[0] = [0.0002, 0.0002, 0.9999, 0.9999]
    scores[1] = [0.0001, 0.0001, 0.9998, 0.9998]
    write_scores(tmp_path / "val.h5", ["a", "b"], scores, targets, CLASSES.mids)
    assert tag(file, "--json", "--thresholds", tmp_path / "val.h5", "--over", "mean") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["source"] == str(file)
    assert found["seconds"] == 2.5
    assert [label["mid"] for label in found["top"]] != []
    assert {label["mid"] for label in found["labels"]} == set(CLASSES.mids[:2])
    assert found["top"] == sorted(found["top"], key=lambda label: -label["score"])


def test_csv_has_a_header_and_a_row_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_noise(tmp_path / 'a "b", c.wav', 0.5)
    assert tag(file, "--csv", "--top", 3) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["source"] for row in rows} == {str(file)}
    assert all(CLASSES.names[int(row["index"])] == row["name"] for row in rows)


def test_a_bad_file_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = write_noise(tmp_path / "a.wav", 0.5)
    (tmp_path / "b.wav").write_bytes(b"no audio")
    assert tag(tmp_path / "b.wav", whole, tmp_path / "c.wav", "--json") == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    undecodable, missing = printed.err.splitlines()
    assert undecodable.startswith("psla-fast tag: undecodable: ")
    assert missing == f"psla-fast tag: missing_audio: {tmp_path / 'c.wav'} is not there"
    assert tag(tmp_path / "b.wav") == 2


def test_a_folder_is_tagged_and_names_with_a_dash_go_after_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_noise(tmp_path / "sounds/-a.wav", 0.3)
    write_noise(tmp_path / "sounds/inner/b.flac", 0.3)
    assert tag(tmp_path / "sounds", "--json") == 0
    sources = [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()]
    assert sources == [str(tmp_path / "sounds" / name) for name in ("-a.wav", "inner/b.flac")]
    monkeypatch.chdir(tmp_path / "sounds")
    main(["tag", "--json", "--", "-a.wav"])
    assert json.loads(capsys.readouterr().out)["source"] == "-a.wav"


def test_timelines_are_drawn_one_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [write_noise(tmp_path / name, seconds) for name, seconds in (("a.wav", 2.5), ("x/a.wav", 0.2))]
    (tmp_path / "b.wav").write_bytes(b"no audio")
    assert tag(files[0], tmp_path / "b.wav", files[1], "--timeline", tmp_path / "out.png") == 1
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["out_a.png", "out_a_2.png"]
    assert tag(files[0], "--timeline", tmp_path / "one.png") == 0
    assert all(path.read_bytes()[:4] == PNG for path in tmp_path.glob("*.png"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out_a.png").read_bytes()
    capsys.readouterr()


def test_names_too_long_for_a_picture_are_cut_and_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [write_noise(tmp_path / f"{'ä' * 120}{i}.wav", 0.2) for i in (1, 2)]  # 245 bytes
    assert tag(*files, "--timeline", tmp_path / "out.png", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    stem = "out_" + "ä" * 98
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{stem}.png", f"{stem}_2.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no file is given"),
        (["a.wav", "--top", "0"], "--top is 0; give 1 or more"),
        (["a.wav", "--json", "--csv"], "--json and --csv can't both be had"),
        (["-", "a.wav"], "- is live and stands alone"),
        (["-", "--timeline", "x.png"], "- is live and stands alone"),
        (["a.wav", "--timeline", "nowhere/x.png"], "give a file in a folder that is there"),
        (
            ["a.wav", "--timeline", "o.xyz"],
            "--timeline o.xyz is no PNG by its name; give one that ends in .png",
        ),
        (["a.wav", "--timeline", "o"], "--timeline o is no PNG by its name"),
        (["a.wav", "--overlap", "1"], "an overlap of 1 can't be cut; give 0 to 0.95"),
        (["a.wav", "--window-seconds", "0"], "a window of 0 seconds can't be cut"),
        (["a.wav", "--batch-size", "0"], "batch_size is 0; give 1 or more"),
        (["a.wav", "--thresholds", "val.h5"], "val.h5 not found"),
        (["a.wav", "--pcm-rate", "3"], "a PCM rate of 3 Hz can't be"),
        (["a.wav", "--over", "sum"], "--over"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert tag(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("psla-fast tag: error: ")
    assert message in line


def test_without_a_checkpoint_it_says_where_to_give_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("PSLA_FAST_CHECKPOINT")
    assert tag("a.wav") == 2
    assert "--checkpoint is missing. Give one, or set $PSLA_FAST_CHECKPOINT." in capsys.readouterr().err


def test_raw_pcm_is_tagged_while_it_still_comes(tmp_path: Path, net: Path):
    second = (make_noise(1.0) * 32767).astype("<i2").tobytes()
    command = [sys.executable, "tools/tag.py", "-", "--json", "--precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PSLA_FAST_CHECKPOINT": str(net)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(second)
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # stdin is still open
        assert first["source"] == "-"
        assert first["seconds"] == pytest.approx(0.32)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert [json.loads(line)["start_seconds"] for line in rest.splitlines()][0] == 0.0
    last = json.loads(rest.splitlines()[-1])
    assert last["start_seconds"] + last["seconds"] == pytest.approx(1.0, abs=1e-3)


def test_a_file_that_is_not_utf8_by_name_is_tagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = os.fsdecode(b"\xff\n.wav")
    soundfile.write(tmp_path / "a.wav", make_noise(0.3), 16000)
    (tmp_path / "a.wav").rename(tmp_path / name)
    assert tag(tmp_path / name) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/\ufffd\\n.wav  0.30 s"
    assert tag(tmp_path / name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"] == str(tmp_path / name)
