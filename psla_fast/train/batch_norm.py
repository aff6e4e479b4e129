"""BatchNorm anew: averaged weights + training batches -> the running statistics that belong to them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psla_fast.distributed import World, sum_over_ranks
from psla_fast.evaluate import Precision, autocast, resolve_precision


def find_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Give the modules that keep running statistics."""
    modules = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [module for module in modules if module.track_running_stats]


def recompute_statistics(
    model: nn.Module, inputs: Iterable[tuple[Tensor, ...]], precision: Precision, world: World
) -> int:
    """Set each BatchNorm's statistics to the mean of those of batches; returns how many were left out.

    `inputs` are the model's arguments, batch by batch, as many on each rank. It is the cumulative average of
    torch.optim.swa_utils.update_bn: the model is in training mode, so a layer is fed as in training,
    drop-connect included. Beyond that: several arguments and ranks; a batch whose statistics aren't finite is
    left out; a compiled model isn't compiled anew. Every rank must call it, with the same weights. Raises
    ValueError where no batch is finite.
    """
    norms = find_batch_norms(model)
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    sums, momenta = [torch.zeros_like(buffer) for buffer in buffers], [norm.momentum for norm in norms]
    counts = torch.zeros(2, device=world.device)  # batches that are in the sums, all batches
    context = autocast(resolve_precision(precision, world.device), world.device)
    model.train()
    try:
        for norm in norms:
            norm.momentum = 1.0  # the running statistics are the last batch's
        for batch in inputs:
            for norm in norms:
                norm.reset_running_stats()  # as 0 · NaN is NaN
            with torch.no_grad(), context:
                model.forward(*batch)  # model(…) may be compiled for the other momenta
            finite = torch.stack([buffer.isfinite().all() for buffer in buffers]).all()
            for total, buffer in zip(sums, buffers, strict=True):
                total += torch.where(finite, buffer, 0)
            counts += torch.stack([finite, torch.ones_like(finite)])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    used, given = sum_over_ranks(counts, world).tolist()
    if not used:
        raise ValueError("no batch gave BatchNorm finite statistics. Set batch-norm-clips to 0.")
    for total, buffer in zip(sums, buffers, strict=True):
        buffer.copy_(sum_over_ranks(total, world) / used)
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(int(used))
    return int(given - used)
