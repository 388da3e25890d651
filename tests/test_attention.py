"""Attention: the three backends against loops and float64; the Triton kernel without a GPU.

The kernel's values are checked in Triton's interpreter (numpy), in a process of its own, since
TRITON_INTERPRET=1 must be set before the import. Its launches are recorded instead of run, and compiled
ahead of time for GPUs that are not here.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import attention as attention_module
from attention import DTYPES, HEAD_DIMS, attention

triton = attention_module.triton
needs_triton = pytest.mark.skipif(not triton, reason="triton is not installed")
GPUS = {80: 163, 90: 227}  # compute capability: KiB of shared memory that one program may use
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}


# --------------------------------------------------------------------------------------------------------
# Launches: recorded, and compiled for GPUs that are not here


class Recorder:
    """In place of a kernel: notes the arguments of each launch, and runs nothing."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.launches.append((self.kernel, named))


@pytest.fixture
def launches(monkeypatch):
    """A list of (kernel, {argument or option: value}), filled by forward and backward passes."""
    found = []
    for name, value in list(vars(attention_module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(attention_module, name, Recorder(value, found))
    return found


def run_both_passes(dtype, d, N, L, masked):
    """Forward and backward of the kernel's autograd function on (2, 3, N or L, d)."""
    q, k, v = (torch.zeros(2, 3, n, d, dtype=dtype, requires_grad=True) for n in (N, L, L))
    mask = torch.ones(2, L, dtype=torch.bool) if masked else None
    attention_module.TritonAttention.apply(q, k, v, mask).sum().backward()


def inductor_type(value):
    """How torch.compile types an argument that is no constexpr, on CUDA; as `signature_of` in
    torch/_inductor/codegen/triton_utils.py."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp64"
    if isinstance(value, bool):
        return "i1"
    if value == 1:
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def compile_launch(kernel, named, capability):
    """Compile a recorded launch with inductor's types, as if its GPU were here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = [p.name for p in kernel.params if p.is_constexpr]
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = named[name]
        signature[name] = "constexpr" if name in fixed else inductor_type(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
def test_no_launch_passes_a_float(launches, masked):
    """Only tensors, integers and constants: torch.compile would pass a float in 64 bits."""
    run_both_passes(torch.bfloat16, 64, 128, 77, masked)
    assert len(launches) == 3
    for kernel, named in launches:
        for parameter in kernel.params:
            value = named[parameter.name]
            assert parameter.is_constexpr or type(value) in (torch.Tensor, int), (kernel, parameter.name)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_kernel_compiles_with_the_types_of_inductor(launches, capability):
    run_both_passes(torch.bfloat16, 64, 128, 77, True)
    for kernel, named in launches:
        compile_launch(kernel, named, capability)
