"""One rank of many without the others: collectives copy within the process, so that values stay plausible.

A GPU's clocks depend on the values that it multiplies, and the fake process group of torch 2.11 leaves what would have been
received as it was. Here a rank receives from every other what it would send itself.
"""
import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


class Done:
    """What an asynchronous collective returns."""

    def wait(self) -> None:
        pass


def reduce_scatter_tensor(output: Tensor, input: Tensor, op=None, group=None, async_op: bool = False):
    """As torch.distributed's: this rank's part of its own input."""
    output.copy_(input.view(-1, *output.shape)[dist.get_rank(group)])
    return Done() if async_op else None


def all_gather_into_tensor(output: Tensor, input: Tensor, group=None, async_op: bool = False):
    """As torch.distributed's: this rank's input from every rank."""
    output.view(-1, *input.shape).copy_(input.expand(output.numel() // max(1, input.numel()), *input.shape))
    return Done() if async_op else None


def all_to_all_single(output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, group=None,
                      async_op: bool = False):
    """As torch.distributed's: what this rank sends, repeated or cut to what it would receive."""
    n = min(len(output), len(input))
    output[:n].copy_(input[:n])
    if n < len(output):
        output[n:] = output[: len(output) - n] if n >= len(output) - n > 0 else torch.randn_like(output[n:])
    return Done() if async_op else None


@contextlib.contextmanager
def rank_of(ranks: int, rank: int, gpus_a_node: int, device: torch.device) -> Iterator[DeviceMesh]:
    """The mesh that rank `rank` of `ranks` would have, `gpus_a_node` of them on a machine; one rank is a real group."""
    names = ("reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")
    real = {name: getattr(dist, name) for name in names}
    if ranks == 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        for name in names:
            setattr(dist, name, globals()[name])
    shape, dims = ((ranks // gpus_a_node, gpus_a_node), ("replicate", "shard")) if ranks > gpus_a_node else ((ranks,), ("shard",))
    try:
        yield init_device_mesh(device.type, shape, mesh_dim_names=dims)
    finally:
        for name in names:
            setattr(dist, name, real[name])
        dist.destroy_process_group()
