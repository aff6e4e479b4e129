"""Any model in, through training and evaluation: a user's own, timm's, and inputs that aren't PSLA's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_fast.checkpoint import load_checkpoint
from psla_fast.evaluate import evaluate_checkpoint
from psla_fast.fbank import FbankConfig
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.sources import read_fsd50k
from tests.tiny import tiny_config, train_tiny

ONE_EPOCH = ["--optim.epochs", "1", "--wa.start", "1", "--wa.end", "1", "--sampling.num-draws", "16"]


def train_and_evaluate(shards: Path, run: Path, *flags: str) -> None:
    """Train, score the evaluation split anew from the checkpoint, and compare with what the run wrote."""
    trained = train_tiny(tiny_config(shards, run, *flags)).model.eval()
    checkpoint = load_checkpoint(run / "checkpoints/wa.pt")  # what a run ends with
    for name, value in trained.state_dict().items():
        assert torch.equal(checkpoint.state[name], value), name
    evaluation = evaluate_checkpoint(run / "checkpoints/wa.pt", shards / "eval", 8, "fp32", "cpu")
    expected = np.loadtxt(run / "wa_result.csv")[2]  # mAP of eval
    assert evaluation.metrics.mean_ap == pytest.approx(expected, abs=1e-4)
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()


def test_the_example_of_a_users_net_learns_and_is_evaluated_from_its_checkpoint(
    packed: Path, tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", ["--model.name", "examples.my_net:MyNet", "--optim.epochs", "6"]
    train_and_evaluate(packed, run, *flags, "--wa.end", "6")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "step" in row]
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:8])


def test_the_example_is_fifteen_lines() -> None:
    text = (Path(__file__).parents[2] / "examples/my_net.py").read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 15


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet"])
def test_other_networks_train_with_length_buckets_and_masks(packed: Path, tmp_path: Path, name: str) -> None:
    flags = ["--model.name", name, "--model.mask-padding", "--model.pooling", "linear_softmax"]
    buckets = ["--input.clip-frames", "161", "--stream.buckets", "77", "161"]
    train_and_evaluate(packed, tmp_path / "run", *ONE_EPOCH, *flags, *buckets)


@pytest.fixture(scope="module")
def wide_band(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 32 kHz and 64 mels."""
    shards = tmp_path_factory.mktemp("wide") / "shards"
    classes, splits = read_fsd50k(synthetic_fsd50k)
    config = PackConfig(fbank=FbankConfig(sample_rate=32000, num_mels=64))
    pack_splits(classes, splits, shards, config, WorkConfig(workers=1))
    return shards


@pytest.mark.parametrize("flags", [["--model.name", "efficientnet_lite0"], ["--model.name", "timm:test_vit"]])
def test_64_mels_of_32_khz_and_an_odd_number_of_frames_train_and_evaluate(
    wide_band: Path, tmp_path: Path, flags: list[str]
) -> None:
    sizes = ["--input.clip-frames", "133", "--augment.freq-mask-bins", "20", "--input.statistics", "shards"]
    train_and_evaluate(wide_band, tmp_path / "run", *ONE_EPOCH, *flags, *sizes)
    card = load_checkpoint(tmp_path / "run/checkpoints/last.pt").card
    assert (card.fbank.sample_rate, card.input.num_mels, card.input.clip_frames) == (32000, 64, 133)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model.name", "timm:test_convnext", "--input.clip-frames", "20"], "20 frames × 128 mels"),
        (
            ["--model.name", "timm:test_convnext", "--stream.buckets", "24", "100"],
            "24 frames × 128 mels",
        ),
        (["--model.name", "torch.nn:Identity"], r"makes \(1, 100, 128\) of a clip of 100 frames"),
        (["--model.name", "examples.my_net:MyNet", "--input.clip-frames", "3"], "3 frames × 128 mels"),
        (["--model.name", "examples.my_net:MyNet", "--model.mask-padding"], "can't mask padding"),
    ],
)
def test_what_a_network_cant_take_is_refused_before_the_run_begins(
    packed: Path, tmp_path: Path, flags: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        train_tiny(tiny_config(packed, tmp_path / "run", *flags))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_checkpoint_of_before_the_poolings_is_still_built(packed: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "old.pt"
    train_tiny(tiny_config(packed, run, *ONE_EPOCH, "--model.name", "timm:test_resnet"))
    content = torch.load(run / "checkpoints/last.pt", weights_only=True)
    for field in ("pooling", "dropout"):
        del content["model_config"][field]
    torch.save(content, path)
    assert load_checkpoint(path).build().attention.num_heads == 4
