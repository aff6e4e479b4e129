"""The whole way on real recordings in FSD50K's layout: `make test-real REAL=FOLDER`. About ten minutes."""

import os
from pathlib import Path

import numpy as np
import pytest

from psla_fast.cli import main

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("REAL"):
        pytest.skip("REAL names no folder: make test-real REAL=FOLDER, an FSD50K or a part of it")
    shards = tmp_path_factory.mktemp("real") / "shards"
    main(["pack", "fsd50k", os.environ["REAL"], str(shards)])
    return shards


def train_small(shards: Path, run: Path, *flags: str) -> float:
    """Train small_cpu and return the best eval mAP of single, averaged, ensemble."""
    main(["train", "small_cpu", "--data.shards", str(shards), "--run", str(run), *flags])
    names = ("best_single_result.csv", "wa_result.csv", "ensemble_result.csv")
    return max(float(np.loadtxt(run / name)[2]) for name in names)


def test_imagenet_weights_reach_076(real_shards: Path, tmp_path: Path):
    assert train_small(real_shards, tmp_path / "run") >= 0.76


def test_b0_from_nothing_passes_the_prototype(real_shards: Path, tmp_path: Path):
    flags = ["--model.name", "efficientnet_b0", "--model.pretrained", "none"]
    assert train_small(real_shards, tmp_path / "run", *flags) > 0.24
