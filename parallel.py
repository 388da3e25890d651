"""Several processes, one training: `torchrun --nproc-per-node 2 train.py`.

**The same, shared out.** Every process holds the model and draws the same rows, times and noise for a step
(train.py), but computes only its share of the batch. The gradients are averaged over the processes, which
overlaps with the backward pass (`DistributedDataParallel`). As the shares are equal, the mean of their means
is the mean over the batch, so the losses are those of one process, but for the order of sums; and since
nothing random belongs to a process, a run may be resumed by more or fewer of them.

**Models that do not fit a device with gradients and moments** (`--shard`, FSDP2's `fully_shard`). Each
process keeps a slice of every parameter, of its gradient, its moments and its EMA. A block's parameters are
gathered when it is its turn and dropped afterwards. Only process 0 puts a whole model together, to validate,
to draw samples and to save; the averaged weights alone must fit on its device.

Process 0 alone prints and writes. When to stop is agreed on before every step, or some would wait for others
that have left. If one dies, the others lose their connection to it and end as well.

Left out: slices within a layer (tensor parallelism), stages in a row (pipeline parallelism), and sharing a
sequence.
"""

import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def join(batch, device="auto"):
    """Join the processes that torchrun has started, if it has, and take a GPU each, unless `device` is "cpu".
    Raises ValueError if there are too few of them, or a batch of `batch` clips cannot be shared out."""
    if WORLD == 1 or dist.is_initialized():
        return
    if batch % WORLD:
        raise ValueError(f"--batch {batch} cannot be shared by {WORLD} processes: it must be a multiple")
    on_gpus = torch.cuda.is_available() and device != "cpu"
    if on_gpus:
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise ValueError(f"there are {gpus} GPUs here: torchrun --nproc-per-node {gpus}, no more")
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # process 0 may have much to read first
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def leave():
    """The end of this process, if it is one of several and has got there. Python's own end is skipped: gloo's
    threads may still have to let go of tensors, and without an interpreter they would abort (torch 2.13)."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)


def lost(error) -> bool:
    """Whether an error says that another process is gone."""
    words = ("gloo", "NCCL", "Connection", "store")
    return WORLD > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def agree(*numbers: float) -> list[float]:
    """The largest of what the processes say, number by number; all wait for it."""
    if WORLD == 1:
        return list(numbers)
    told = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()


def mean(values):
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD


@contextmanager
def one_first():
    """Within it process 0 works alone; then the others, who find in the caches what it has left there."""
    if RANK:
        agree(0)
    yield
    if not RANK:
        agree(0)


def share(rows):
    """What is this process's of the rows of a batch."""
    return rows.chunk(WORLD)[RANK]


def distribute(model, ema, shard, device):
    """Let all processes train `model` -> what to call in its place, so that gradients are averaged. With
    `shard` both models are cut into slices."""
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (WORLD,))
        for network in (model, ema):
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
    elif WORLD > 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def not_yet(model):
    """The context of a forward and backward pass whose gradients are not averaged yet, as others follow."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def whole(tensor):
    """All of a tensor of which each process has a slice; all must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collect(tensor):
    """All of a tensor, on the CPU, in process 0; elsewhere nothing. All must ask for it."""
    tensor = whole(tensor)
    return tensor.cpu() if RANK == 0 else None


def slice_like(tensor, parameter):
    """This process's slice of a whole `tensor`, cut as `parameter` is; on its device."""
    tensor = tensor.to(parameter.device)
    if tensor.ndim and hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


@torch.no_grad()
def gather(model, into):
    """Put the slices of `model` together in `into`, if that is another one, in process 0; all must take
    part."""
    for mine, all_of_it in zip(model.parameters(), into.parameters(), strict=True):
        if mine is not all_of_it and (value := whole(mine)) is not mine and not RANK:
            all_of_it.copy_(value)
