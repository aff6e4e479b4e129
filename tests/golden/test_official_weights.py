"""Official weight files, as PSLA released them but with golden weights, give the official scores."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_fast.checkpoint import load_checkpoint
from psla_fast.cli import main
from psla_fast.models import ModelConfig, build_model
from tests.golden.test_model_scores import FEATURES, FOLDER, build_golden, golden_fbank


def write_released(path: Path, size: int, num_heads: int, num_classes: int) -> None:
    """Write weights as a released file has them: DataParallel's prefix, ImageNet's classifier left over."""
    state = {
        f"module.{name}": value
        for name, value in build_golden(size, num_heads, num_classes).state_dict().items()
    }
    state["module.effnet._fc.weight"] = torch.zeros(1000, FEATURES[size])
    state["module.effnet._fc.bias"] = torch.zeros(1000)
    torch.save(state, path)


@pytest.mark.parametrize("num_classes", [527, 200])
@pytest.mark.parametrize("num_heads", [4, 1, 0])
@pytest.mark.parametrize("size", [0, 2])
def test_an_imported_file_gives_the_original_codes_scores(
    size: int, num_heads: int, num_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    released, out = tmp_path / "as_mdl_0.pth", tmp_path / "psla_as.pt"
    write_released(released, size, num_heads, num_classes)
    main(["import", str(released), "--out", str(out)])
    said = capsys.readouterr().out
    assert hashlib.sha256(released.read_bytes()).hexdigest() in said
    assert f"efficientnet_b{size}, {num_heads} heads, symmetric padding; {num_classes} classes" in said
    checkpoint = load_checkpoint(out)
    expected = np.load(FOLDER / f"effnet_b{size}_heads{num_heads}_classes{num_classes}.npz")["scores"]
    assert np.abs(expected[0] - expected[1]).mean() > 0.01, "scores that are all alike would test nothing"
    with torch.no_grad():
        scores = checkpoint.build()(golden_fbank()).numpy()
    assert np.abs(scores - expected).max() <= 1e-5
    card = checkpoint.card
    assert card.classes.names[0] == ("Speech" if num_classes == 527 else "Accelerating_and_revving_and_vroom")
    spec = card.input
    assert spec.clip_frames == (1056 if num_classes == 527 else 3000)
    assert (spec.num_mels, spec.pad_value, spec.mean, spec.std) == (128, 0.0, -4.6476, 4.5699)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "odd.pth"
    write_released(path, 0, 1, 3)
    return path


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["import", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


def test_other_classes_need_their_list_and_frames_or_a_new_head(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.pt"
    words = [str(released), "--out", str(out)]
    assert "has 3 classes, no known set's. Pass --classes CSV." in refuse(words, capsys)
    (tmp_path / "own.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n")
    words += ["--classes", str(tmp_path / "own.csv")]
    assert "Pass --clip-frames." in refuse(words, capsys)
    main(["import", *words, "--clip-frames", "500"])
    assert "3 classes (A, B, C …); clips of 500 frames" in capsys.readouterr().out
    assert load_checkpoint(out).card.classes.mids == ("/m/a", "/m/b", "/m/c")
    words = [str(released), "--out", str(out), "--classes", "fsd50k", "--clip-frames", "500"]
    assert "has 3 classes, fsd50k 200." in refuse(words, capsys)
    main(["import", *words, "--strict", "false"])
    assert (
        "not used: attention.att.bias (3,), attention.att.weight (3, 1280, 1, 1)" in capsys.readouterr().out
    )
    state, before = load_checkpoint(out).state, torch.load(released, weights_only=True)
    assert torch.equal(state["effnet._conv_stem.weight"], before["module.effnet._conv_stem.weight"])
    assert state["attention.cla.weight"].shape == (200, 1280, 1, 1)


def test_a_model_of_another_size_is_told_what_the_file_is(released: Path):
    config = ModelConfig(name="efficientnet_b2", pretrained=str(released))
    with pytest.raises(ValueError, match="It is efficientnet_b0 with 1 heads for 3 classes."):
        build_model(config, num_classes=3)


def test_a_file_that_is_something_else_gets_one_line(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = torch.load(released, weights_only=True)
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "cut.pth").write_bytes(released.read_bytes()[:100_000])
    torch.save({"conv1.weight": torch.zeros(3, 1, 3, 3)}, tmp_path / "other.pth")
    torch.save({k: v for k, v in state.items() if "_blocks.3." not in k}, tmp_path / "lacking.pth")
    torch.save({k: v for k, v in state.items() if "_bn1.bias" not in k}, tmp_path / "torn.pth")
    for name, reason in {
        "text.pth": "is not a whole torch file",
        "cut.pth": "is not a whole torch file",
        "other.pth": "isn't PSLA's model (1 tensors, the first conv1.weight)",
        "lacking.pth": "isn't PSLA's model",
        "torn.pth": "is another model",
        "absent.pth": "not found",
    }.items():
        words = [
            str(tmp_path / name),
            "--out",
            str(tmp_path / "o.pt"),
            "--classes",
            "fsd50k",
            "--clip-frames",
            "9",
        ]
        assert reason in refuse([*words, "--strict", "false"], capsys), name
        assert not (tmp_path / "o.pt").exists()
    classes = ["--classes", "fsd50k", "--clip-frames", "9", "--strict", "false"]
    main(["import", str(released), "--out", str(tmp_path / "ours.pt"), *classes])
    words = [str(tmp_path / "ours.pt"), "--out", str(tmp_path / "again.pt")]
    assert "is a psla_fast checkpoint already" in refuse(words, capsys)
    words = [str(released), "--out", str(released)]
    assert "give a file other than WEIGHTS" in refuse(words, capsys)
