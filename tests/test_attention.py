"""Attention: which backend is taken; the Triton kernel against float64, without a GPU.

What the kernel computes is checked in Triton's interpreter (numpy), in processes of their own, since
TRITON_INTERPRET=1 has to be set before the import. How it is launched is recorded instead of run, and these
launches are compiled ahead of time for GPUs that are not here.
"""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import attention as attention_module
from attention import HEAD_DIMS, attention

HERE = Path(__file__).parent
triton = attention_module.triton
needs_triton = pytest.mark.skipif(not triton, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not triton or not torch.cuda.is_available(), reason="there is no CUDA GPU")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}


# --------------------------------------------------------------------------------------------------------
# All backends


def test_unknown_backend():
    with pytest.raises(ValueError, match="no attention backend"):
        attention(*torch.zeros(3, 1, 1, 2, 4), backend="flash")


def test_the_command_compares_backends(capsys):
    """`python attention.py` prints a row of errors for each backend and type; those in float32 are small."""
    attention_module.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    errors = {
        tuple(row[:2]): [float(x) for x in row[2:]] for row in rows if row[1] in ("float32", "bfloat16")
    }
    assert set(errors) >= {(backend, t) for backend in ("eager", "sdpa") for t in ("float32", "bfloat16")}
    for (_, dtype), found in errors.items():
        assert len(found) == 4 and max(found) < (1e-5 if dtype == "float32" else 2e-2)


@pytest.fixture
def fused_calls(monkeypatch):
    """A list that gets longer with each call of torch's fused attention."""
    calls = []
    function = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(True)
        return function(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("keys", [256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_auto_on_a_cpu(fused_calls, training, dtype, keys):
    """The fused one, but by hand to train in bfloat16 on few keys."""
    q, k = torch.zeros(1, 1, 2, 4, dtype=dtype), torch.zeros(1, 1, keys, 4, dtype=dtype)
    with torch.set_grad_enabled(training):
        attention(q, k, k)
    by_hand = training and dtype == torch.bfloat16 and keys == 256
    assert bool(fused_calls) != by_hand


@pytest.mark.parametrize("training", [False, True])
def test_auto_on_a_gpu(fused_calls, monkeypatch, training):
    """The fused one, never the kernel. The tensors have shapes and a device, but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(attention_module, "triton_attention", None)
    with FakeTensorMode(), torch.set_grad_enabled(training):
        q = torch.empty(1, 1, 128, 64, dtype=torch.bfloat16, device="cuda")
        attention(q, q, q)
    assert fused_calls


@needs_triton
@pytest.mark.parametrize(
    ("channels", "dtype", "why"),
    [(32, torch.float32, "needs a GPU"), (24, torch.float32, "32, 64, 128"), (32, torch.float64, "float64")],
)
def test_kernel_refuses(channels, dtype, why):
    q = torch.zeros(1, 1, 2, channels, dtype=dtype)
    with pytest.raises(ValueError, match=why):
        attention(q, q, q, backend="triton")


@needs_triton
def test_the_kernel_refuses_mixed_types():
    q, k = torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32, bfloat16, bfloat16"):
        attention(q, k, k, backend="triton")


# --------------------------------------------------------------------------------------------------------
# What the kernel computes. Each check runs in a process of its own.


def random_case(case, device="cpu"):
    """-> q, k, v, mask, the gradient of the output: of any shape and type; odd cases are views of one
    projection, and every sixth has lengths that are multiples of all tiles."""
    draw = np.random.default_rng(case)
    d, dtype = HEAD_DIMS[case % 3], attention_module.DTYPES[case // 3 % 3]
    B, H, N, L = (int(draw.integers(least, most)) for least, most in ((1, 3), (1, 3), (1, 150), (8, 150)))
    if case % 6 == 4:
        N, L = 128, 128
    g = torch.Generator().manual_seed(case)
    q, k, v, slope = (torch.randn(B, H, n, d, generator=g).to(device, dtype) for n in (N, L, L, N))
    if case % 2:
        kv = torch.stack((k, v), 3).transpose(1, 2).contiguous()  # (B, L, heads, 2, d)
        k, v = kv.permute(3, 0, 2, 1, 4)
        slope = slope.transpose(2, 3).contiguous().transpose(2, 3)  # its last stride is not one
    mask = torch.rand(B, L, generator=g) < draw.random()
    mask[:, torch.randperm(L, generator=g)[:4]] = True  # of one key alone the gradients are zero
    return q * (1 + case % 5), k, v, mask.to(device) if case % 4 else None, slope


def results(inputs, mask, slope, backend, dtype):
    """-> {name: tensor} of the output and the gradients, computed in a type."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attention(*inputs, mask, backend)
    gradients = torch.autograd.grad(out, inputs, slope.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def check_values(cases=range(24), device="cpu"):
    """Values and gradients against float64, with the tiles of both generations of GPUs. Memory that nobody
    has written is nan."""
    torch.use_deterministic_algorithms(True)  # fills new memory with nan
    assert torch.empty(3).isnan().all()
    for case in cases:
        rows = ("sm_80", "sm_90")[case // 12 % 2]
        attention_module.generation = lambda device, rows=rows: rows
        *inputs, mask, slope = random_case(case, device)
        dtype = slope.dtype
        found = results(inputs, mask, slope, "triton", dtype)
        truth = results(inputs, mask, slope, "eager", torch.float64)
        for name, tensor in found.items():
            error = relative_error(tensor, truth[name])
            assert tensor.dtype == dtype, (case, name)
            assert error < (1e-5 if dtype == torch.float32 else 2e-2), (case, rows, name, error)


def check_one_key():
    """A mask that leaves one key, the last: the output is its value, and no other key has a gradient."""
    q, k, v = (torch.randn(1, 1, 70, 32, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, torch.arange(70)[None] == 69, "triton")
    assert torch.allclose(out, v[:, :, 69:].expand_as(v), rtol=1e-6)
    dk, dv = torch.autograd.grad(out.sum(), (k, v))
    assert not dk[:, :, :69].any() and not dv[:, :, :69].any() and dv[:, :, 69:].all()


def check_large_scores():
    """Scores of some thousands, with the largest in any tile: no exponential overflows."""
    q, rising = torch.full((1, 1, 16, 32), 30.0), torch.arange(150.0)
    for k in (rising, rising.flip(0), -rising):
        inputs = [q, k[:, None].expand(1, 1, 150, 32), torch.randn(1, 1, 150, 32)]
        truth = results(inputs, None, torch.ones_like(q), "eager", torch.float64)
        found = results(inputs, None, torch.ones_like(q), "triton", torch.float32)
        assert relative_error(found["out"], truth["out"]) < 1e-5
        assert all(x.isfinite().all() for x in found.values())


def check_second_derivative():
    """There is none: an error, and not a wrong one."""
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 32)]
    out = attention(*inputs, backend="triton")
    (slope,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


class Layer(nn.Module):
    """Attention as in a transformer: queries, keys and values are views of one projection."""

    def __init__(self, backend, heads=2, channels=64):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x, mask=None):
        """x (B, N, D), mask (B, N) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        q, k = q.float(), k.float()  # as norms may return them
        return self.proj(attention(q, k, v, mask, self.backend).transpose(1, 2).flatten(2))


def check_autocast():
    """A layer under autocast, and its gradients, as with the backend by hand."""
    found = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        layer = Layer(backend)
        x = torch.randn(2, 40, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, torch.arange(40) < torch.tensor([[40], [9]]))
        out.float().square().sum().backward()
        found.append((out, x.grad, layer.qkv.weight.grad))
    for a, b in zip(*found, strict=True):
        assert relative_error(b, a) < 2e-2


def check_graph():
    """torch.compile takes a layer into one graph forward and one backward, without a GPU to run them, and
    finds no floating-point argument."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from triton.backends.compiler import GPUTarget

    torch.utils._triton.has_triton = lambda: True
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    launched = []

    def record(graph, _):
        nodes = [node for node in graph.graph.nodes if "triton" in str(node.target)]
        launched.append(len(nodes))
        for node in nodes:
            kernel = kernel_side_table.get_kernel(
                node.kwargs["kernel_idx"]
            ).fn  # without its warps and stages
            constant = {p.name for p in kernel.params if p.is_constexpr}
            numbers = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
            assert not [n for n, x in numbers.items() if isinstance(x, float) and n not in constant]
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [v if v is None else torch.zeros(v.shape) for v in outputs])

    attend = attention_module.TritonAttention.apply
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 2, 40, 32)]
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(
        lambda q, k, v, mask: 2 * attend(q + 1, k, v, mask), backend=backend, fullgraph=True
    )
    compiled(*inputs, torch.ones(2, 40, dtype=torch.bool)).sum().backward()
    assert launched == [1, 2]


def check_some_values():
    check_values(range(2))


FAST = (check_some_values, check_one_key, check_large_scores)
IN_NUMPY = (*FAST, check_values, check_second_derivative, check_autocast)


@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.__name__, marks=() if check in FAST else pytest.mark.slow)
        for check in (*IN_NUMPY, check_graph)
    ],
)
def test_kernel(check):
    interpret = {"TRITON_INTERPRET": "1"} if check in IN_NUMPY else {}
    paths = {"PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE)))}
    child = [sys.executable, "-c", f"import test_attention; test_attention.{check.__name__}()"]
    done = subprocess.run(child, env={**os.environ, **paths, **interpret}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@needs_gpu
@pytest.mark.parametrize("case", range(12))
def test_kernel_on_a_gpu(case):
    """Its values in eager mode and compiled."""
    torch.compiler.reset()  # after several cases torch would compile no more
    *inputs, mask, slope = random_case(case, "cuda")
    truth = results(inputs, mask, slope, "eager", torch.float64)
    for run in (results, torch.compile(results)):
        for name, tensor in run(inputs, mask, slope, "triton", slope.dtype).items():
            limit = 1e-5 if slope.dtype == torch.float32 else 2e-2
            assert relative_error(tensor, truth[name]) < limit, name


# --------------------------------------------------------------------------------------------------------
# How the kernel is launched: recorded, and compiled for GPUs that are not here


class Recorder:
    """In place of a kernel: notes the arguments of each launch, and runs nothing."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **options):
        named = dict(zip(self.kernel.arg_names, args, strict=True))
        self.found.append(SimpleNamespace(kernel=self.kernel, grid=grid, named=named, options=options))


@pytest.fixture
def launches(monkeypatch):
    """A list of launches, filled by forward and backward passes."""
    found = []
    for name in ("forward_kernel", "dq_kernel", "dkv_kernel"):
        monkeypatch.setattr(attention_module, name, Recorder(getattr(attention_module, name), found))
    return found


def run_both_passes(dtype, d, N, L, masked):
    """Forward and backward of the kernel's autograd function on (2, 3, N or L, d)."""
    q, k, v = (torch.zeros(2, 3, n, d, dtype=dtype, requires_grad=True) for n in (N, L, L))
    mask = torch.ones(2, L, dtype=torch.bool) if masked else None
    attention_module.TritonAttention.apply(q, k, v, mask).sum().backward()


def inductor_type(value):
    """How torch.compile types an argument that is not a constexpr, on CUDA: `signature_of` in
    torch/_inductor/codegen/triton_utils.py."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp64"
    if value == 1:
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def compile_launch(launch, capability):
    """Compile a launch with inductor's types, as if its GPU were here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constants, aligned = {}, {}, {}
    for place, (name, value) in enumerate(launch.named.items()):
        signature[name] = "constexpr" if name in constant else inductor_type(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options=launch.options)


def resources(built):
    """-> the registers of a thread, bytes of shared memory, and bytes spilled to slow memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        told = subprocess.run([tool, "-res-usage", file.name], stdout=-1, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told.stdout)
    registers, stack, local = map(int, used.groups())
    return registers, built.metadata.shared, stack + local


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
def test_no_launch_passes_a_float(launches, masked):
    """Only tensors, integers and constants: torch.compile passes other floats in 64 bits, which no kernel
    expects."""
    run_both_passes(torch.bfloat16, 64, 128, 77, masked)
    assert len(launches) == 3
    for launch in launches:
        for parameter in launch.kernel.params:
            value = launch.named[parameter.name]
            assert parameter.is_constexpr or type(value) in (torch.Tensor, int), parameter.name


@needs_triton
def test_sources_need_no_names_but_those_of_inductor():
    """Inductor copies kernels and what they call into a file that knows only `triton` and `tl`."""
    for name, kernel in vars(attention_module).items():
        if isinstance(kernel, triton.runtime.JITFunction):
            names = {"triton": triton, "tl": triton.language}
            exec(kernel.src, names)
            assert name in names


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90, 100, 120])
def test_kernel_compiles_with_the_types_of_inductor(launches, capability):
    run_both_passes(torch.float16, 64, 128, 77, True)
    for launch in launches:
        compile_launch(launch, capability)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("capability", "memory"), [(80, 99), (90, 227)])
def test_kernel_fits(launches, monkeypatch, capability, memory, dtype, d):
    """No spilled register; shared memory in KiB of the smallest GPU that uses the row: an RTX 30, an H100."""
    monkeypatch.setattr(attention_module, "generation", lambda device: f"sm_{capability}")
    run_both_passes(dtype, d, 256, 77, True)
    run_both_passes(dtype, d, 256, 256, False)
    assert len(launches) == 6
    for launch in launches:
        registers, shared, spilled = resources(compile_launch(launch, capability))
        used = launch.kernel.__name__, launch.options, registers, shared, spilled
        assert registers <= 255 and shared <= memory * 1024 and not spilled, used


@needs_triton
@pytest.mark.parametrize(("N", "L", "even"), [(256, 256, True), (256, 250, False), (250, 256, False)])
def test_full_tiles_need_no_masks(launches, N, L, even):
    """Where the lengths are multiples of the tiles, nothing is masked and nothing selected."""
    run_both_passes(torch.bfloat16, 64, N, L, False)
    for launch in launches:
        code = compile_launch(launch, 80).asm["ttir"]
        assert launch.named["EVEN"] == even and "tt.load" in code
        masked = re.findall(r"tt\.(?:load|store) %\w+, %\w+, %\w+", code)
        assert bool(masked) != even and ("arith.select" in code) <= (not even), launch.kernel.__name__


@needs_triton
def test_views_are_not_copied(launches):
    """Queries, keys and values that are views of one projection reach the kernels where they lie, and the
    results lie as the next projection wants them."""
    layer, x = Layer("triton"), torch.randn(2, 40, 64)
    qkv = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
    out = attention_module.TritonAttention.apply(*qkv, None)
    assert out.transpose(1, 2).is_contiguous()
    out.transpose(1, 2).flatten(2).mul(torch.ones(2, 40, 64)).sum().backward()
    assert len(launches) == 3
    for launch in launches:
        for name, view in zip("qkv", qkv, strict=True):
            assert launch.named[name].data_ptr() == view.data_ptr()
            assert [launch.named[name + axis] for axis in "bhn"] == list(view.stride()[:3])


@needs_triton
@pytest.mark.parametrize(
    ("major", "rows"), [(7, "older"), (8, "sm_80"), (9, "sm_90"), (10, "sm_90"), (12, "sm_80")]
)
def test_rows_of_a_gpu(monkeypatch, major, rows):
    """An RTX 50 (12) has the shared memory of an RTX 30, not of an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert attention_module.generation(SimpleNamespace(type="cuda")) == rows
