"""The benchmarks run, and end with their record; their tiny numbers mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("ablation", {"waveform_mixup/whole"}),
        ("ensemble", {"upstream/ours", "reading/ours", "peak of all/of two"}),
        ("enhance", {"enhanced/less", "whole/less"}),
        ("finetune", {"tagger, finetune / nothing"}),
        ("end_to_end", {"indexed/synthetic", "resident/synthetic", "dali/synthetic"}),
        ("metrics", {"upstream/ours", "sort/ours", "each resample measured/bootstrap"}),
        ("pack", {"wav ours/upstream", "mp3 ours/decode", "two workers/one"}),
        ("stream", {"indexed/upstream", "indexed/pread"}),
        ("stream_device", {"indexed/one batch", "webdataset/one batch"}),
        ("scale", {"reads, 2M clips/pread"}),
        ("tag", {"ours/upstream", "ours/model alone"}),
        ("step", {"b0@64 ours/upstream", "b0@64 ours/roofline", "buckets, equal frames / padded"}),
    ],
)
def test_a_benchmark_prints_its_record_last(name: str, ratios: set[str]):
    results = ROOT / "benchmarks/results"
    before = {path: path.stat().st_size for path in results.iterdir()}
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--tiny"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["benchmark"] == name
    assert ratios <= record["ratios"].keys()
    assert all(value > 0 for value in record["ratios"].values())
    assert {path: path.stat().st_size for path in results.iterdir()} == before
