from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from psla_fast.plots import Strip, plot_fbank, plot_timeline


def pixels(path: Path) -> np.ndarray:
    return image.imread(path)[..., :3]


@pytest.mark.parametrize("num_classes", [1, 5, 40])
@pytest.mark.parametrize("num_steps", [1, 400])
def test_a_timeline_is_drawn_for_any_number_of_classes_and_steps(
    tmp_path: Path, num_classes: int, num_steps: int
):
    rng = np.random.default_rng(0)
    fbank = Strip(rng.uniform(-15, 5, (num_steps * 32, 16)).astype(np.float32), 0.01)
    activity = Strip(rng.random((num_steps, num_classes), np.float32), 0.32)
    names = [f"$class$_{i} with a name of its own that is long" for i in range(num_classes)]
    plot_timeline(tmp_path / "a.png", fbank, activity, names, "a$b.wav")
    assert pixels(tmp_path / "a.png").std() > 0.05


def test_the_first_class_is_on_top_and_time_goes_to_the_right(tmp_path: Path):
    activity = np.zeros((10, 4), np.float32)
    activity[:5, 0] = 1.0
    fbank = Strip(np.zeros((320, 8), np.float32), 0.01)
    plot_timeline(tmp_path / "a.png", fbank, Strip(activity, 0.32), ["a", "b", "c", "d"], "x")
    drawn = pixels(tmp_path / "a.png")
    heat = drawn[drawn.shape[0] // 2 :, : int(drawn.shape[1] * 0.9)]
    yellow = (heat[..., 0] > 0.9) & (heat[..., 1] > 0.8) & (heat[..., 2] < 0.3)  # the colour of 1
    rows, columns = np.nonzero(yellow)
    dark_rows, dark_columns = np.nonzero(np.abs(heat - (0.267, 0.005, 0.329)).max(axis=2) < 0.02)
    assert rows.max() < np.percentile(dark_rows, 50)
    assert columns.max() < np.percentile(dark_columns, 60)


def test_an_fbank_is_drawn(tmp_path: Path):
    plot_fbank(tmp_path / "a.png", np.eye(64, 16, dtype=np.float32), 10.0, "a clip")
    assert pixels(tmp_path / "a.png").std() > 0.05
