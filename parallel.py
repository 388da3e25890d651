"""Several processes, one training: `torchrun --nproc-per-node 2 train.py`.

**Data parallel** (`DistributedDataParallel`). Every process holds the model and draws the same rows,
timesteps and noise for a step (train.py), but computes only its share of the batch. The gradients are
averaged over the processes during the backward pass. The shares are equal, so the losses are those of one
process, but for the order of sums. Nothing random depends on the rank, so a run may resume with another
number of processes.

**Sharded** (`--shard`, FSDP2's `fully_shard`). Each process keeps a shard of every parameter, gradient,
optimizer state and EMA. A block's parameters are gathered for its turn and dropped afterwards.

Process 0 alone prints and writes. Left out: tensor, pipeline and sequence parallelism.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def start(batch: int | None, device: str):
    """Join the processes of torchrun, with a GPU each unless `device` is "cpu". Raises ValueError if there
    are too few GPUs, or if a batch of `batch` clips cannot be shared evenly; None: it is not known yet."""
    if WORLD == 1 or dist.is_initialized():
        return
    if batch and batch % WORLD:
        raise ValueError(f"--batch {batch} cannot be shared by {WORLD} processes: it must be a multiple")
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # processes on this machine
        if torch.cuda.device_count() < here:
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs for {here} processes")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # process 0 may have much to read first


def finish():
    """End this process if it is one of several. Python's own end is skipped: gloo's threads may still have to
    release tensors, and without an interpreter they would abort (torch 2.13)."""
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)


def peer_lost(error) -> bool:
    """Whether an error says that another process is gone."""
    words = ("gloo", "NCCL", "Connection", "store")
    return WORLD > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def agree(number: float) -> float:
    """The largest of the numbers of all processes; all wait for it."""
    number = torch.tensor(number, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD


@contextmanager
def first_process_first():
    """Process 0 runs the block first; then the others, which find its results in the caches."""
    if RANK:
        agree(0)  # wait
    yield
    if not RANK:
        agree(0)


def my_share(batch: torch.Tensor) -> torch.Tensor:
    """The rows of a batch that this process computes."""
    return batch.chunk(WORLD)[RANK]


def distribute(model, ema, shard: bool, device):
    """Let all processes train `model` -> what to call in its place. With `shard` both models are cut."""
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (WORLD,))
        for part in (*model.blocks, model, *ema.blocks, ema):
            fully_shard(part, mesh=mesh)
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model


def whole(tensor):
    """All of a tensor of which each process may have a slice; all must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def slice_like(tensor, parameter):
    """The part of a whole `tensor` that belongs to this process's slice of `parameter`, on its device."""
    tensor = tensor.to(parameter.device)
    if hasattr(parameter, "placements") and tensor.ndim:
        from torch.distributed.tensor import distribute_tensor  # its import takes a second

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
