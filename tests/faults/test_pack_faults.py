"""A pack that is killed, runs out of disk, or loses its source: nothing finished is lost, none is half."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.shards import open_shards
from psla_fast.shards.verify import verify_split
from psla_fast.sources import read_audioset, read_fsd50k
from tests.makers import CLASSES, read_tree, write_audio, write_segments

ROOT = Path(__file__).resolve().parents[2]
SMALL_SHARDS = PackConfig(shard_mb=0.04)  # of a clip or two
ONE, TWO = WorkConfig(workers=1), WorkConfig(workers=2)


@pytest.fixture(scope="module")
def whole(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "shards"
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, SMALL_SHARDS, ONE)
    return out


def pack_in_child(root: Path, out: Path, wanted: int, seconds: float) -> bool:
    """Pack in a forked process; kill it so many seconds after `wanted` shards are finished.

    Tells whether it was killed, rather than done before.
    """
    child = os.fork()
    if not child:
        try:
            pack_splits(*read_fsd50k(root), out, SMALL_SHARDS, ONE)
            os._exit(0)
        finally:
            os._exit(1)
    while len(finished_shards(out)) < wanted:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def finished_shards(out: Path) -> list[Path]:
    return list(out.glob("*/0*.json"))


def test_after_20_kills_and_more_the_bytes_are_those_of_an_uninterrupted_pack(
    synthetic_fsd50k: Path, whole: Path, tmp_path: Path
):
    out, rng, seen = tmp_path / "out", random.Random(0), {}
    num_shards = len(finished_shards(whole))

    def kill(wanted: int, seconds: float) -> bool:
        killed = pack_in_child(synthetic_fsd50k, out, wanted, seconds)
        for path in finished_shards(out):
            time_before = seen.setdefault(path, path.stat().st_mtime_ns)
            assert path.stat().st_mtime_ns == time_before  # finished shards are not touched again
        return killed

    kills = 0
    for number in range(20):  # some while it starts, most while it packs
        done = len(finished_shards(out))
        kills += (
            kill(0, rng.uniform(0.0, 0.05)) if number % 4 == 0 else kill(done + 1, rng.uniform(0.0, 0.01))
        )
    assert kills == 20
    assert 0 < len(seen) < num_shards
    for _ in range(5):  # while it makes index and checksums
        kill(num_shards, rng.uniform(0.0, 0.04))
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, SMALL_SHARDS, ONE)
    assert all(path.stat().st_mtime_ns == before for path, before in seen.items())
    assert read_tree(out) == read_tree(whole)


def test_workers_that_outlive_a_killed_pack_do_no_harm(synthetic_fsd50k: Path, whole: Path, tmp_path: Path):
    words = ["fsd50k", str(synthetic_fsd50k), str(tmp_path / "out"), "--shard-mb", "0.04", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools/pack_shards.py"), *words]
    for wanted in (1, 12):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(list(tmp_path.glob("out/*/0*.json"))) < wanted and process.poll() is None:
                time.sleep(0.005)
            process.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_tree(tmp_path / "out") == read_tree(whole)


def test_a_killed_worker_loses_nothing(synthetic_fsd50k: Path, whole: Path, tmp_path: Path):
    words = ["fsd50k", str(synthetic_fsd50k), str(tmp_path / "out"), "--shard-mb", "0.04", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools/pack_shards.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        workers = packing_processes(process.pid, tmp_path / "out")
        os.kill(workers[0], signal.SIGKILL)
        output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert read_tree(tmp_path / "out") == read_tree(whole)


def test_a_dask_cluster_packs_the_same_bytes_and_outlives_a_killed_worker(
    synthetic_fsd50k: Path, whole: Path, tmp_path: Path
):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    killed = []

    def kill_a_worker():
        killed.extend(packing_processes(os.getpid(), tmp_path / "out")[:1])
        os.kill(killed[0], signal.SIGKILL)

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        work = WorkConfig(engine="dask", address=cluster.scheduler_address)
        killer = threading.Thread(target=kill_a_worker)
        killer.start()
        pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path / "out", SMALL_SHARDS, work)
        killer.join()
    assert len(killed) == 1
    assert read_tree(tmp_path / "out") == read_tree(whole)


def packing_processes(parent: int, out: Path) -> list[int]:
    """Find the processes, other than the parent, that write a shard under `out` now."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = []
        for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
            try:
                files = [os.readlink(link) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if int(process.name) != parent and any(
                f.startswith(f"{out}/") and ".tar.tmp" in f for f in files
            ):
                found.append(int(process.name))
        if found:
            return found
    raise AssertionError("no worker has had a shard open for 30 s")


@pytest.mark.parametrize("work", [ONE, TWO])
def test_a_full_disk_is_one_clear_error_and_what_is_finished_stays(
    synthetic_fsd50k: Path, tmp_path: Path, work: WorkConfig
):
    config = PackConfig(shard_mb=100)  # 16 clips a shard; the limit lets the small shards through
    limit = 700_000
    words = ["fsd50k", str(synthetic_fsd50k), str(tmp_path / "out"), "--workers", str(work.workers)]
    command = [sys.executable, str(ROOT / "tools/pack_shards.py"), *words, "--shard-mb", "100"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "finished shards are kept" in done.stderr
    assert "File too large" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(path.stat().st_size <= limit for path in tmp_path.rglob("*"))
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/*/0*.tar")}
    pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path / "out", config, ONE)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    for name in ("train", "val", "eval"):
        assert verify_split(tmp_path / "out" / name, 1).faults == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_packed(
    synthetic_fsd50k: Path, small_disk: Path
):
    with pytest.raises(ValueError, match=r"has 0\.00 GB free, the shards need about 0\.00 GB. Free some"):
        pack_splits(*read_fsd50k(synthetic_fsd50k), small_disk / "out", PackConfig(), ONE)
    assert not list(small_disk.rglob("*.tar*"))


def test_a_disk_that_fills_up_is_one_clear_error(
    synthetic_fsd50k: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("psla_fast.pack.estimate_clip_bytes", lambda table, config: 1.0)
    with pytest.raises(OSError, match="No space left on device; finished shards are kept") as caught:
        pack_splits(*read_fsd50k(synthetic_fsd50k), small_disk / "out", SMALL_SHARDS, ONE)
    assert str(caught.value.filename).startswith(str(small_disk))
    finished = list(small_disk.glob("out/*/0*.json"))
    assert finished
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    before = {path: path.stat().st_mtime_ns for path in finished}
    pack_splits(*read_fsd50k(synthetic_fsd50k), small_disk / "out", SMALL_SHARDS, ONE)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_read_only_disk_is_one_clear_error(synthetic_fsd50k: Path, small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = ["fsd50k", str(synthetic_fsd50k), str(small_disk / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/pack_shards.py"), *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_source_that_vanishes_stops_the_pack_and_keeps_what_is_finished(
    synthetic_fsd50k: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = Path(shutil.copytree(synthetic_fsd50k, tmp_path / "data"))
    audio = root / "FSD50K.dev_audio"
    classes, splits = read_fsd50k(root)
    listed = list(splits[0].read())
    train = [replace(splits[0], read=lambda: iter(listed))]
    read, count = __import__("psla_fast.pack.shard_task", fromlist=["read_recording"]).read_recording, 0

    def read_then_vanish(*arguments):
        nonlocal count
        count += 1
        if count == 10:
            audio.rename(root / "elsewhere")
        return read(*arguments)

    monkeypatch.setattr("psla_fast.pack.shard_task.read_recording", read_then_vanish)
    with pytest.raises(OSError, match="vanished or changed while it was packed; finished shards are kept"):
        pack_splits(classes, train, tmp_path / "out", SMALL_SHARDS, ONE)
    finished = list(tmp_path.glob("out/train/0*.json"))
    assert finished
    with pytest.raises(ValueError, match=r"none of \d+ recordings looked for is there, for instance"):
        pack_splits(classes, train, tmp_path / "out", SMALL_SHARDS, ONE)
    monkeypatch.setattr("psla_fast.pack.estimate_clip_bytes", lambda table, config: 1.0)
    with pytest.raises(OSError, match=r"none of the \d recordings of shard \d+ is there"):
        pack_splits(classes, train, tmp_path / "out", SMALL_SHARDS, ONE)
    (root / "elsewhere").rename(audio)
    pack_splits(*read_fsd50k(root), tmp_path / "out", SMALL_SHARDS, ONE)
    assert read_tree(tmp_path / "out") == read_tree(whole)


def test_parts_merged_are_the_whole(synthetic_fsd50k: Path, whole: Path, tmp_path: Path):
    from psla_fast.pack import FinishConfig, merge_parts

    out = tmp_path / "out"
    for part in ("2/3", "1/3"):
        work = replace(ONE, part=part)
        assert pack_splits(*read_fsd50k(synthetic_fsd50k), out, SMALL_SHARDS, work) == []
    with pytest.raises(ValueError, match=r"\d+ of \d+ shards aren't packed yet, for instance 00002"):
        merge_parts(out, FinishConfig())
    with pytest.raises(ValueError, match="isn't packed to its end: pack again, or merge its parts"):
        open_shards(out / "train")
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, SMALL_SHARDS, replace(ONE, part="3/3"))
    merge_parts(out, FinishConfig())
    assert read_tree(out) == read_tree(whole)
    for name in ("train", "val", "eval"):
        assert verify_split(out / name, 1).faults == []


def test_two_packs_of_one_folder_at_once_are_refused(synthetic_fsd50k: Path, tmp_path: Path):
    from psla_fast.pack.log import PackLog

    with PackLog(tmp_path / "train", ONE), pytest.raises(ValueError, match="another pack is at work in"):
        pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path, PackConfig(), ONE)


def write_audioset(tmp_path: Path, num_clips: int = 24) -> tuple[Path, Path]:
    """An AudioSet of short tones in two folders; its CSV and its audio folder."""
    rows, audio = [], tmp_path / "audio"
    for number in range(num_clips):
        ytid = f"abcdefghi{number:02d}"
        write_audio(audio / f"part{number % 2}" / f"{ytid}.wav", seconds=0.2, hertz=200 + 50 * number)
        rows.append((ytid, 0.0, 10.0, "/m/09x0r"))
    return write_segments(tmp_path / "segments.csv", rows), audio


def test_audioset_clips_that_vanish_while_it_is_packed_are_an_error(tmp_path: Path):
    segments, audio = write_audioset(tmp_path)
    split = read_audioset([segments], audio, CLASSES, "eval")
    (audio / "part1").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="vanished or changed while it was packed; finished shards are kept"):
        pack_splits(CLASSES, [split], tmp_path / "out", PackConfig(), ONE)
    (tmp_path / "elsewhere").rename(audio / "part1")
    assert pack_splits(CLASSES, [split], tmp_path / "out", PackConfig(), ONE)[0].num_clips == 24


def test_a_pack_of_audioset_does_not_go_on_while_audio_it_had_is_gone(tmp_path: Path):
    segments, audio = write_audioset(tmp_path)
    config = PackConfig(shard_mb=0.03)
    pack_splits(CLASSES, [read_audioset([segments], audio, CLASSES, "eval")], tmp_path / "out", config, ONE)
    (tmp_path / "out/eval/00003.json").unlink()
    (audio / "part1").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"packed before are gone, for instance part1/\S+. Is all of"):
        pack_splits(
            CLASSES, [read_audioset([segments], audio, CLASSES, "eval")], tmp_path / "out", config, ONE
        )


def test_retrying_the_rejected_leaves_shards_alone_whose_audio_is_still_missing(tmp_path: Path):
    segments, audio = write_audioset(tmp_path)
    config, again = PackConfig(shard_mb=0.03), replace(ONE, retry_rejected=True)
    missing = next((audio / "part1").iterdir())
    content = missing.read_bytes()
    missing.unlink()
    out = tmp_path / "out"
    pack_splits(CLASSES, [read_audioset([segments], audio, CLASSES, "eval")], out, config, ONE)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack_splits(CLASSES, [read_audioset([segments], audio, CLASSES, "eval")], out, config, again)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    missing.write_bytes(content)
    summary = pack_splits(CLASSES, [read_audioset([segments], audio, CLASSES, "eval")], out, config, again)
    assert summary[0].num_clips == 24
    assert sum(path.stat().st_mtime_ns != time for path, time in before.items()) == 1


def test_parts_and_a_merge_never_work_on_a_split_at_once(synthetic_fsd50k: Path, tmp_path: Path):
    from psla_fast.pack import FinishConfig, merge_parts
    from psla_fast.pack.log import lock_split

    part = replace(ONE, part="1/2")
    for one in (part, replace(ONE, part="2/2")):
        pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path, PackConfig(), one)
    with lock_split(tmp_path / "train", shared=True):  # as a part at work does
        pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path, PackConfig(), part)
        with pytest.raises(ValueError, match="another pack is at work"):
            merge_parts(tmp_path, FinishConfig())
        with pytest.raises(ValueError, match="another pack is at work"):
            pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path, PackConfig(), ONE)
    merge_parts(tmp_path, FinishConfig())
