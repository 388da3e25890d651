"""The machine: device, precision, the cache folder, and errors in one line.

Every program asks the same questions. Which device is there? In which type does it multiply fast? Where may
files be kept that are expensive to compute? And how does a program end when the user made a mistake? The
answers stand here once. Nothing in this file knows about models, videos or text.

**Precision.** Weights, optimizer state and EMA are float32. Matrix products run in bfloat16 under
`torch.autocast` where the machine multiplies it fast (GPUs since Ampere, CPUs with AVX512-BF16 or AMX). A CPU
without these instructions was 90 times slower in bfloat16, so it computes in float32. Older NVIDIA GPUs
train in float16, whose range is small: there the loss is scaled (`torch.amp.GradScaler`, train.py).

**Where data lies.** A data set is a large tensor of bytes, in memory or in files. `RowStore` keeps it on the
training device if it fits, and fetches rows ahead of their step if it does not, so that the device never
waits for the CPU.

**Launches.** A step of a small model is a thousand small kernels, and launching them takes longer than
running them. `GraphedStep` captures them once as a CUDA graph and launches that.

**Errors.** ValueError and OSError are errors of the user: a wrong option, a missing file. `run_command`
prints them as one line and ends with status 2. So it does when memory runs out. Everything else is a bug and
keeps its traceback. A line that cannot be printed is not an error: see `SafeOutput`.

Left out: logging levels, configuration files, environment switches other than MODELGROW_CACHE.
"""

import codecs
import contextlib
import ctypes
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
RESIDENT_SHARE = 0.25  # of a GPU's memory that a data set may take; the model needs the rest
READ_AT_ONCE = 1024  # clips on their way to a GPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
WARMUP_CALLS = 3  # of a step before it is captured: libraries allocate and tune at first calls


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
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"there is no device {name!r} here: {reason}; try --device cpu, or cuda:1 for another GPU"
        ) from None


def bf16_is_fast(device_type: str) -> bool:
    """Whether a CUDA GPU or the CPU has instructions for products in bfloat16; False for other devices."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """ "auto" or a name of PRECISIONS -> the type of matrix products under `autocast`; None means float32
    throughout. "auto" is bfloat16 where the machine multiplies it fast, and float16 on other CUDA GPUs."""
    if name == "auto":
        without = "fp16" if device.type == "cuda" else "fp32"
        name = "bf16" if bf16_is_fast(device.type) else without
    return PRECISIONS[name]


def autocast(device: torch.device, precision: torch.dtype | None):
    """The context in which a model runs: matrix products in `precision`; None: everything in float32."""
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


@cache
def compiles(device: torch.device) -> bool:
    """Whether torch.compile works here, found out with a tiny function: that takes seconds. It is tried on
    Linux alone. It fails without the headers of Python or a C++ compiler that is new enough, in a path with
    spaces, where temporary files must not be written or run, and on old GPUs."""
    if sys.platform != "linux":
        return False
    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(8, device=device))
    except (RuntimeError, OSError):
        return False
    return True


def keep_freed_memory():
    """Let glibc keep the memory that this process frees. By default it goes back to the system at the end of
    a training step and is asked for again in the next one, page by page: up to 9,000 page faults in a step of
    `tiny` on a CPU (docs/speed.md has the time). Other C libraries stay as they are."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never give back the end of the heap
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc allows for a block of the heap


def card(device: torch.device) -> tuple[str, int] | None:
    """The name of a CUDA GPU and the bytes of its memory; None for other devices."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.total_memory


def fits(size: int, device: torch.device) -> bool:
    """Whether a data set of `size` bytes may lie on the device: it leaves room for the model."""
    found = card(device)
    return found is None or size < RESIDENT_SHARE * found[1]


class RowStore:
    """Rows of a large tensor, on the training device.

    tensor (N, ...) uint8, on any device, or what is indexed like one and reads its rows from files.
    """

    def __init__(self, tensor, device: torch.device):
        self.tensor, self.device = tensor, device
        self.pool, self.ahead = None, {}
        if device.type == "cpu" or tensor.device == device:
            return  # it lies where it is needed, or in files
        if fits(tensor.nbytes, device):
            self.tensor = torch.empty(tensor.shape, dtype=torch.uint8, device=device)
            for rows in torch.arange(len(tensor)).split(READ_AT_ONCE):  # the CPU may have less memory
                self.tensor[rows.to(device)] = tensor[rows].to(device)
        else:
            self.pool = ThreadPoolExecutor(1)

    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.pool else self.tensor.nbytes

    def pinned(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the store in memory that the device can read while it computes."""
        return self.tensor[index].pin_memory()

    def take(self, index: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """Rows `index` (B,) of the store -> (B, ...) on the device. Rows `ahead`, those of the next call, are
        read meanwhile if the store does not lie on the device."""
        if self.pool is None:
            return self.tensor[to_device(index, self.tensor.device)].to(self.device)
        ready = self.ahead.pop(tuple(index.tolist()), None)
        batch = ready.result() if ready else self.pinned(index)
        self.ahead[tuple(ahead.tolist())] = self.pool.submit(self.pinned, ahead)
        return batch.to(self.device, non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU -> the same on the device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class GraphedStep:
    """A function of tensors that changes state in place (weights, optimizer), as one CUDA graph.

    The first WARMUP_CALLS calls run it as it is. The next one captures it: from then on every call copies its
    inputs into the captured ones and replays the kernels, which gives the same numbers with one launch.
    Shapes must not change. Everything runs in a stream of its own, which capturing demands.
    """

    def __init__(self, function):
        self.function = function
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph = None

    def __call__(self, *inputs):
        """Tensors -> what the function returns, one tensor."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.run(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def run(self, inputs):
        """The call itself, in the stream."""
        self.calls += 1
        if self.calls <= WARMUP_CALLS:
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            # By default a capture forbids what other threads do meanwhile: RowStore's pins memory.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        for captured, tensor in zip(self.inputs, inputs, strict=True):
            captured.copy_(tensor)
        self.graph.replay()
        return self.output.clone()


def cache_dir() -> Path:
    """The folder for what is expensive to compute (features, decoded clips): MODELGROW_CACHE, or
    ~/.cache/modelgrow, or for a user without a home, as in some containers, a folder of temporary files. It
    is made if need be. Raises OSError if it belongs to another user."""
    if os.environ.get("MODELGROW_CACHE"):
        path = Path(os.environ["MODELGROW_CACHE"])
    else:
        try:
            path = Path.home() / ".cache" / "modelgrow"
        except RuntimeError:  # no HOME, and the user is not in the list of users
            return homeless_cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{error}: set MODELGROW_CACHE to a folder for the cache") from None
    return path


def homeless_cache_dir() -> Path:
    """The cache of a user without a home. torch.compile gets one too: it would ask for the user's name."""
    path = Path(tempfile.gettempdir(), f"modelgrow-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user: set MODELGROW_CACHE")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(path / "inductor"))
    return path


def read_cache(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of the cache; none if it is not there yet, or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def fsync(path: Path):
    """Wait until a file or directory is on the disk: a power cut may come. Some file systems cannot do that
    for a directory."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(number)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None):
    """Write a safetensors file, with `about` in its header, that others may read if the umask lets them: by
    itself save_file keeps it from all but the owner. Raises OSError, for example if the disk is full."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, about)
    except SafetensorError as error:  # it hides an OSError
        raise OSError(str(error)) from None
    path.chmod(mode)


def write_cache(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None):
    """Write a file of the cache, with `about` in its header. It is complete or absent, even after a power
    cut. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        new = Path(temporary, "new")
        try:
            save_tensors(new, tensors, about)
        except OSError as error:
            raise OSError(f"cannot write into {path.parent}: {error}") from None
        fsync(new)
        new.replace(path)


def decode_text(content: bytes) -> str:
    """The bytes of a text file -> its text, without a byte order mark. Raises ValueError, with the encoding
    if that can be told, for anything but UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16, not UTF-8")
    if b"\0" in content:
        raise ValueError("it has zero bytes, so it is not UTF-8 text")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    messages = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


class SafeOutput:
    """A text stream that never fails, so that no work is lost because a line cannot be printed. What the
    encoding lacks is written as \\u2514. When the reader of the pipe has gone (`| head`), or the disk is
    full, the rest goes nowhere."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self.give_up(error)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError):
        """Send the rest to the null device."""
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"note: what is printed is lost: {error.strerror}", file=sys.stderr)


@contextlib.contextmanager
def safe_output():
    """A context in which nothing that is printed can fail."""
    before = sys.stdout, sys.stderr
    nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stdout, sys.stderr = (SafeOutput(stream or nowhere) for stream in before)  # None: it is closed
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def run_command(main, memory_hint: str = "take smaller sizes"):
    """Run `main()` as a program. An error of the user becomes one line and exit status 2, Ctrl-C status 130.
    `memory_hint` says what to do when memory runs out."""
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook which starts a command may be missing here
    with safe_output():
        status = run_main(main, memory_hint)
    if status:
        sys.exit(status)


def run_main(main, memory_hint: str) -> int:
    """Run `main()` -> the exit status."""
    try:
        main()
        return 0
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = str(error)
        if out_of_memory(error):
            message = f"out of memory: {memory_hint}"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
