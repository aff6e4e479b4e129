"""What differs on a GPU: pinned slabs and copies, autocast, compiled kernels. Skipped where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_fast.augment import AugmentConfig, InputSpec, StoredBatch, augment, draw_uniforms
from psla_fast.distributed import World
from psla_fast.fbank import FbankConfig, compute_fbank
from psla_fast.models import ModelConfig, build_model
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import open_shards
from psla_fast.stream import DrawPlan, PlanConfig, StreamConfig, open_stream
from psla_fast.train.loop import Trainer
from psla_fast.train.profiling import count_syncs, measure_phases, read_events
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def test_fbanks_on_the_gpu_are_those_of_the_cpu():
    waveform = torch.randn(4, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    on_cpu = compute_fbank(waveform, FbankConfig())
    on_gpu = compute_fbank(waveform.to(CUDA), FbankConfig())
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-3)


@pytest.mark.parametrize("buckets", [(), (40, 120)])
@pytest.mark.parametrize("kind", ["indexed", "resident", "resident in host memory", "dali", "webdataset"])
def test_batches_on_the_gpu_are_those_of_the_cpu(packed: Path, kind: str, buckets: tuple[int, ...]):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"place": "host"} if "host" in kind else {}
    config = StreamConfig(kind=kind.split()[0], buckets=buckets, dali_buffer_mb=1, **options)  # type: ignore[arg-type]
    with open_shards(packed / "train") as shards:
        plan = DrawPlan(shards, PlanConfig(SamplingConfig(), config, 0, 8, 120))
        reference = replace(config, kind="webdataset" if kind == "webdataset" else "indexed", place="device")
        here = open_stream(shards, reference, plan.shapes, torch.device("cpu"))
        there = open_stream(shards, config, plan.shapes, CUDA)
        try:
            next(there.batches(plan.batches(1)))  # an epoch that is broken off at once
            for epoch in (1, 2):
                pairs = zip(
                    here.batches(plan.batches(epoch)), there.batches(plan.batches(epoch)), strict=True
                )
                for ours, theirs in pairs:
                    assert theirs.fbank.device == CUDA
                    torch.cuda._sleep(10_000_000)  # the device is still busy when the batch is used
                    fbank = theirs.fbank * 1
                    assert torch.equal(ours.fbank, fbank.cpu())
                    for name in ("num_frames", "targets", "partner_row", "lam"):
                        assert torch.equal(getattr(ours, name), getattr(theirs, name).cpu())
        finally:
            here.close()
            there.close()


def test_compiled_augmentation_on_the_gpu_is_the_eager_one_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(8, 100, 128, generator=generator) * 4 - 5).half()
    lengths, partners = torch.tensor([100, 80, 3, 50] * 2), torch.arange(4, 8)
    targets, lam = torch.eye(8)[:, :5], torch.tensor([0.5, 1.0, 0.3, 0.9])
    tensors, uniforms = (stored, lengths, targets, partners, lam), draw_uniforms(0, 1, 0, 4)
    options = (AugmentConfig(), InputSpec(100, 128, 0.0, -4.6, 4.6))
    expected = augment(StoredBatch(*tensors), uniforms, *options)
    moved = StoredBatch(*(tensor.to(CUDA) for tensor in tensors))
    found = torch.compile(augment)(moved, uniforms.to(CUDA), *options)
    for here, there in zip(expected, found, strict=True):
        assert torch.allclose(here, there.cpu(), atol=1e-4)


@pytest.mark.parametrize("same_padding", ["symmetric", "asymmetric"])
def test_channels_last_bf16_scores_are_near_those_of_the_cpu(same_padding: str):
    torch.manual_seed(0)
    config = ModelConfig(name="efficientnet_b0", same_padding=same_padding)  # type: ignore[arg-type]
    model = build_model(config, 10).eval()
    fbank = torch.randn(2, 208, 128)
    with torch.inference_mode():
        expected = model(fbank)
        model.to(CUDA).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.autocast("cuda", torch.bfloat16):
            found = model(fbank.to(CUDA))
    assert torch.allclose(found.cpu(), expected, atol=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compiled", ["none", "default"])
def test_a_run_on_the_gpu_learns_as_on_the_cpu(packed: Path, tmp_path: Path, precision: str, compiled: str):
    losses = []
    for device in (torch.device("cpu"), CUDA):
        flags = ["--device", device.type, "--model.drop-connect", "0"]
        if device.type == "cuda":
            flags += ["--precision", precision, "--compile", compiled]
        config = tiny_config(packed, tmp_path / device.type, *flags)
        Trainer(config, World(0, 1, device)).run()
        losses.append(np.loadtxt(config.run / "result.csv", delimiter=",")[:, 5])
    assert np.allclose(*losses, rtol=0.02)


def test_a_run_logs_the_gpus_memory_and_its_profile_has_kernels_and_no_copies_back(
    packed: Path, tmp_path: Path
):
    flags = ("--profile", "--optim.batch-size", "4", "--log-every-steps", "100", "--optim.epochs", "1")
    config = tiny_config(packed, tmp_path / "run", *flags)
    Trainer(config, World(0, 1, CUDA)).run()
    row = json.loads((config.run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["gpu_memory_gb"] > 0
    assert 0 <= row.get("gpu_utilisation", 0) <= 1
    events = read_events(config.run / "profile/trace.json")
    phases = measure_phases(events)
    assert all(phases[name][1] > 0 for name in ("augment", "forward", "backward", "optimiser"))
    syncs = count_syncs(events)
    # a slab that is filled again may be waited for: by an event, and only where reading runs ahead
    assert not any(number for name, number in syncs.items() if name != "cudaEventSynchronize")
