"""Engine: runs shard tasks by joblib on processes of this machine or a cluster, and outlives killed ones."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from psla_fast.pack.config import WorkConfig
from psla_fast.pack.shard_task import ShardResult, ShardTask, pack_shard

TaskId = tuple[int, int]  # split, shard
MOST_DEATHS = 3  # of workers, one after the other, without a shard finished in between
RAY_ROUND = 8  # shards a worker takes between two looks at the progress


def run_tasks(
    ids: Sequence[TaskId], make: Callable[[TaskId], ShardTask], work: WorkConfig
) -> Iterator[ShardResult]:
    """Pack the shards, in any order, and yield each as it is done; tasks are made as workers take them.

    A killed worker's shard is packed again. Raises ValueError where workers keep dying or the engine isn't
    installed, and what a task raises.
    """
    waiting = dict.fromkeys(ids)
    deaths = 0
    while waiting:
        num_waiting = len(waiting)
        try:
            for result in _run_once(list(waiting), make, work):
                del waiting[result.split, result.number]
                yield result
        except (TerminatedWorkerError, *_cluster_deaths(work)) as error:
            deaths = deaths + 1 if len(waiting) == num_waiting else 1
            if deaths > MOST_DEATHS:
                raise ValueError(
                    f"workers keep getting killed ({len(waiting)} shards are left, all others are kept); "
                    "lack of memory? Give fewer --workers, or a lower --max-clip-seconds."
                ) from error


def _run_once(
    ids: list[TaskId], make: Callable[[TaskId], ShardTask], work: WorkConfig
) -> Iterator[ShardResult]:
    with _backend(work) as num_jobs:
        options = {"n_jobs": min(num_jobs, len(ids)), "batch_size": 1, "pre_dispatch": "2*n_jobs"}
        if work.engine != "ray":
            jobs = joblib.Parallel(**options, return_as="generator_unordered")
            yield from jobs(joblib.delayed(pack_shard)(make(task_id)) for task_id in ids)
            return
        for first in range(0, len(ids), RAY_ROUND * num_jobs):  # ray's backend gives results as a list only
            round_ids = ids[first : first + RAY_ROUND * num_jobs]
            yield from joblib.Parallel(**options)(
                joblib.delayed(pack_shard)(make(task_id)) for task_id in round_ids
            )


@contextlib.contextmanager
def _backend(work: WorkConfig) -> Iterator[int]:
    """Choose joblib's backend; gives the number of jobs it runs at once."""
    if work.engine == "loky":
        with joblib.parallel_config(backend="loky"):
            yield work.workers
    elif work.engine == "dask":
        with (
            _dask_client(work) as client,
            joblib.parallel_config(backend="dask", wait_for_workers_timeout=60),
        ):
            client.wait_for_workers(1, timeout=60)
            yield sum(client.nthreads().values())
    else:
        with _ray(work):
            yield joblib.effective_n_jobs(-1) if work.address else work.workers


@contextlib.contextmanager
def _dask_client(work: WorkConfig):  # type: ignore[no-untyped-def] # of a package that needn't be there
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError(
            "--engine dask needs the package distributed: pip install psla-fast[dask]"
        ) from error
    with contextlib.ExitStack() as stack:
        if work.address:
            target = work.address
        else:
            cluster = LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=work.workers, threads_per_worker=1, dashboard_address=None
            )
            target = stack.enter_context(cluster)
        try:
            client = stack.enter_context(Client(target, timeout=30))  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:  # a refused connection, or no address at all
            raise ValueError(f"no dask scheduler at {work.address} ({error}). Check --address.") from error
        yield client


@contextlib.contextmanager
def _ray(work: WorkConfig) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray: pip install psla-fast[ray]") from error
    options = {"address": work.address} if work.address else {"num_cpus": work.workers}
    ray.init(**options, log_to_driver=False, include_dashboard=False)
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            yield
    finally:
        ray.shutdown()


def _cluster_deaths(work: WorkConfig) -> tuple[type[Exception], ...]:
    """Give what the cluster raises where a worker has died too often."""
    if work.engine == "dask":
        from distributed import KilledWorker

        return (KilledWorker,)
    return ()
