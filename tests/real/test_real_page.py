"""Real recordings uploaded through the web page in headless Chromium: `make test-real REAL=FOLDER`.

REAL_CHECKPOINT names a checkpoint that was trained on REAL; without it small_cpu is trained, three minutes.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from psla_fast.cli import main
from tests.e2e.test_serve_page import CHROMIUM
from tests.web import serving

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH"),
]
NUM_RECORDINGS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not os.environ.get("REAL"):
        pytest.skip("REAL names no folder: make test-real REAL=FOLDER, an FSD50K or a part of it")
    if "REAL_CHECKPOINT" in os.environ:
        yield Path(os.environ["REAL_CHECKPOINT"])
        return
    root = tmp_path_factory.mktemp("real")
    main(["pack", "fsd50k", os.environ["REAL"], str(root / "shards")])
    main(["train", "small_cpu", "--data.shards", str(root / "shards"), "--run", str(root / "run")])
    yield root / "run" / "checkpoints" / "wa.pt"


def test_the_page_hears_what_people_heard(checkpoint: Path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    root = Path(os.environ["REAL"])
    with open(root / "FSD50K.ground_truth" / "eval.csv", newline="", encoding="utf-8") as file:
        truth = {row["fname"]: row["labels"].replace("_", " ").split(",") for row in csv.DictReader(file)}
    names = sorted(truth)
    names = names[:: -(-len(names) // NUM_RECORDINGS)]
    num_right = 0
    with serving(checkpoint) as server, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#hint:not(:empty)")
        for name in names:
            page.set_input_files("#file", root / "FSD50K.eval_audio" / f"{name}.wav")
            page.wait_for_function(
                "n => document.getElementById('name').textContent === n", arg=f"{name}.wav"
            )
            best = page.locator("#classes .label").first.text_content()
            num_right += best in truth[name]
            print(f"{name}: {best}; people heard {', '.join(truth[name])}")
        browser.close()
    print(f"{num_right} of {len(names)} right")
    assert num_right >= 0.7 * len(names)
