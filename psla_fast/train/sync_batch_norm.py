"""Synchronised BatchNorm: each rank's batch -> the statistics of the global one, on GPUs and CPUs."""

# B clips of a rank's batch, C channels

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from psla_fast.distributed import World


def synchronise_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """Let a model's BatchNorm layers, in place, take their statistics over all ranks; one rank: nothing.

    Parameters, buffers and their names stay. Gradients must then be averaged over the ranks, as DDP does. On
    GPUs it is torch's SyncBatchNorm, in each layer of which the host waits for the device, and which refuses
    CPU tensors; on CPUs SyncedBatchNorm.
    """
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SyncedBatchNorm.of(child))
    return model


class _Normalise(torch.autograd.Function):
    """(B, C, …) -> normalised by the mean and variance of all ranks' B·…, which are returned, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        own = torch.stack(torch.var_mean(x.float(), dims, correction=0))  # (2, C)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        variances, means = torch.stack(parts).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the sum of all ranks' losses: Ioffe and Szegedy 2015, section 3."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        dims = [dim for dim in range(x.dim()) if dim != 1]
        wide = (-1, *[1] * (x.dim() - 2))
        normal = (x.float() - mean.view(wide)) * inverse_std.view(wide)
        grad = grad.float()
        own = torch.stack([grad.sum(dims), (grad * normal).sum(dims)])  # (2, C), of bias and weight
        whole = own.clone()
        dist.all_reduce(whole)
        of_mean, of_std = whole / (x.numel() / x.shape[1] * dist.get_world_size())
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = (grad - of_mean.view(wide) - normal * of_std.view(wide)) * scale.view(wide)
        grads = (None, None) if weight is None else (own[1], own[0])
        return grad_x.to(x.dtype), *grads, None


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm of any number of axes over all ranks, each of which must have as many elements a channel."""

    @classmethod
    def of(cls, module: _BatchNorm) -> "SyncedBatchNorm":
        """Take over a module's settings, parameters and buffers."""
        tracks = module.track_running_stats
        made = cls(module.num_features, module.eps, module.momentum, module.affine, tracks)
        made.weight, made.bias = module.weight, module.bias
        made.running_mean, made.running_var = module.running_mean, module.running_var
        made.num_batches_tracked = module.num_batches_tracked
        return made.train(module.training)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        assert input.dim() >= 2

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, …); in training with this batch's statistics, which move the running ones."""
        if not self.training:
            return super().forward(x)
        y, mean, variance = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.eps
        )
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return y  # type: ignore[no-any-return]
