"""One GPU, measured in five minutes: `python -m lab.bench gpu`.

Sections run one after the other. One that fails says so, and the others continue; the exit status is then 1.
One that would begin after the time is over is skipped, and so is a model of the last section.

    values           of the kernel and of sdpa, and their gradients, against float64
    attention        the kernel against sdpa and each of its backends
    train.py         `python train.py` with its defaults, from an empty cache to the end; the seconds to its
                     first step, after imports; its FLOP/s against those of the bare step
    steps            a training step of every preset, eager, compiled and captured, beside the peers

With --quick the same runs with tiny sizes, also on a CPU. Left out: several GPUs; power; profiles.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from attention import attention
from cost import count_flops
from dit import PRESETS, DiT
from lab.bench import (
    QUICK,
    QUICK_SHAPES,
    TEXT_LENGTH,
    alternate,
    attention_inputs,
    bench_attention,
    bench_train,
    captured,
    our_model,
    training_step,
)

REPOSITORY = Path(__file__).resolve().parents[1]
CACHES = ("MODELGROW_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
QUICK_OPTIONS = "--quick --clips 16 --batch 2 --steps 10"
VALUE_SHAPES = {  # with whole tiles, with cut ones, and with masked keys
    "even": (2, 4, 256, 256, 64),
    "odd": (2, 4, 200, 200, 128),
    "text": (4, 4, 128, 77, 32),
}
WORST = 2e-2  # relative error of values and gradients in types of 16 bits


def values_and_gradients(inputs, backend):
    """q, k, v and a mask -> the output of attention, and the gradients of q, k and v, where q stands in for
    the gradient of the output: it is random."""
    out = attention(*inputs, backend)
    return out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[0].detach())


def kernel_values(bench) -> list[dict]:
    """The relative errors of the kernel and of sdpa. Raises ArithmeticError if one is too large."""
    rows = []
    for name, shape in (QUICK_SHAPES if bench.quick else VALUE_SHAPES).items():
        *tensors, mask = attention_inputs(shape, bench)
        doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
        truth = values_and_gradients((*doubles, mask), "eager")
        for backend in ("sdpa", "triton" if bench.gpu else "eager"):
            found = values_and_gradients((*tensors, mask), backend)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
            if not max(errors) < WORST:  # nan too
                raise ArithmeticError(f"{backend}, {name}: relative errors {errors} against float64")
            row = {"B x heads x N x L x d": f"{name}: {' x '.join(map(str, shape))}", "backend": backend}
            rows.append(row | {"error of values": errors[0], "error of gradients": max(errors[1:])})
    return rows


def run_train(bench, options: str) -> dict:
    """Run train.py in a process of its own, with empty caches -> a row about it. Raises RuntimeError if it
    fails, TimeoutExpired if it takes longer than the whole bench may."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        caches = {name: str(Path(folder) / name) for name in CACHES}
        environment = {**os.environ, **caches}
        command = [sys.executable, "train.py", *options.split()]
        command += ["--device", str(bench.device), "--out", str(out)]
        limit = 60 * bench.minutes
        begin = time.perf_counter()
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=limit
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        batch = json.loads((out / "args.json").read_text())["batch"]
    logged = [entry for entry in metrics if "samples_per_second" in entry]
    first, last = logged[0], logged[-1]
    speed = last["samples_per_second"]
    return {
        "command": f"python train.py {options}",
        "seconds": seconds,
        "steps": last["step"],
        "seconds to the first step, after imports": first["seconds"] - first["step"] * batch / speed,
        "clips/s": speed,
        "TFLOP/s": speed / batch * last["flops"] / last["step"] / 1e12,
        "validation loss": next(entry["val_loss"] for entry in reversed(metrics) if "val_loss" in entry),
    }


def train_speed(bench) -> list[dict]:
    """`python train.py` with its defaults, and its FLOP/s against those of the bare step of the same preset
    and batch, whose prompts may have another length."""
    row = run_train(bench, QUICK_OPTIONS if bench.quick else "")
    config, batch = (QUICK, 2) if bench.quick else (PRESETS["tiny"], 32)
    step = training_step(our_model(config, compiled=not bench.quick), config, batch, bench)
    if bench.gpu:
        step = captured(step)
    flops = batch * count_flops(DiT(config), [TEXT_LENGTH])
    bare = flops / np.median(alternate({"step": step}, bench.repeats)["step"]) / 1e12
    return [{**row, "TFLOP/s of the bare step": bare, "share of it": row["TFLOP/s"] / bare}]


SECTIONS = {
    "values": kernel_values,
    "attention": bench_attention,
    "train.py": train_speed,
    "steps": bench_train,
}


def run_sections(sections, bench):
    """All sections, one after the other. Yields (name, rows) of each; of one that failed the row says why."""
    begin = time.perf_counter()
    for name, section in sections.items():
        left = bench.minutes - (time.perf_counter() - begin) / 60
        try:
            if left <= 0:
                raise TimeoutError(f"skipped, because {bench.minutes:g} minutes are over")
            rows = section(replace(bench, minutes=left))
        except Exception as error:  # whatever it is, the other sections still run
            rows = [{"failed": f"{type(error).__name__}: {error}"}]
        print(f"{name}: {time.perf_counter() - begin:.0f} s since the start")
        yield name, rows
