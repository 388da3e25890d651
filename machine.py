"""The machine: device, precision, the cache folder, and errors in one line.

Every program asks the same questions. Which device is there? In which type does it multiply fast? Where may
files be kept that are expensive to compute? And how does a program end when the user made a mistake? The
answers stand here once. Nothing in this file knows about models, videos or text.

**Precision.** Weights, optimizer state and EMA are float32. Matrix products run in bfloat16 under
`torch.autocast` where the machine multiplies it fast (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), and
in float32 elsewhere. A CPU without these instructions was 90 times slower in bfloat16.

**Errors.** ValueError and OSError are errors of the user: a wrong option, a missing file. `run_command`
prints them as one line and ends with status 2. Everything else is a bug and keeps its traceback.

Left out: logging levels, configuration files, environment switches other than MODELGROW_CACHE.
"""

import os
import sys
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" -> the GPU if there is one, else the CPU; other names as torch knows them. Raises ValueError
    for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where Triton launches its kernels
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None


def bf16_is_fast(device_type: str) -> bool:
    """Whether this machine has instructions for products in bfloat16."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """ "auto", "bf16" or "fp32" -> the type of matrix products under `autocast`. "auto" is bfloat16 where the
    machine multiplies it fast. None means float32 throughout."""
    if name == "auto":
        name = "bf16" if bf16_is_fast(device.type) else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def autocast(device: torch.device, precision: torch.dtype | None):
    """The context in which a model runs: matrix products in `precision`; None: everything in float32."""
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


def cache_dir() -> Path:
    """The folder for what is expensive to compute (features, decoded clips): MODELGROW_CACHE, or
    ~/.cache/modelgrow. It is made if need be."""
    path = Path(os.environ.get("MODELGROW_CACHE") or Path.home() / ".cache" / "modelgrow")
    path.mkdir(parents=True, exist_ok=True)
    return path


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    messages = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def run_command(main, memory_hint: str = "take smaller sizes"):
    """Run `main()` as a program. An error of the user becomes one line and exit status 2, Ctrl-C status 130.
    `memory_hint` says what to do when memory runs out."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = str(error)
        if out_of_memory(error):
            message = f"out of memory: {memory_hint}"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
