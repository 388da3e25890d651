"""One GPU, checked and measured in five minutes: `python -m lab.bench gpu`.

Sections run one after the other. One that fails says so, and the others continue. One that would begin after
the time is over is skipped.

    kernel values    the attention kernel against float64, forward and gradients
    attention        the kernel against sdpa and each of its backends
    steps            a training step of every preset, eager and compiled, beside the peers
    train.py         its own clips/s against the bare step, and the seconds to its first step
    whole run        `python train.py` with its defaults, from an empty cache to the end

With --quick the same runs with tiny sizes, also on a CPU. Left out: several GPUs, power, and profiles.
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

from attention import HEAD_DIMS, attention
from dit import PRESETS
from lab.bench import QUICK, alternate, attention_inputs, bench_attention, bench_train, our_step
from lab.report import markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK_OPTIONS = "--quick --clips 16 --batch 2 --steps 10"
SMALL_OPTIONS = "--preset small --data both --clips 8192 --batch 32 --steps 300 --every 1000"


def relative_error(found, expected) -> float:
    """The largest difference, over the largest number expected."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def values_and_gradients(inputs, backend):
    """The result of attention, and the gradients of q, k and v for a fixed gradient of the result."""
    out = attention(*inputs, backend)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    gradients = torch.autograd.grad(out, inputs[:3], weights.view(out.shape).to(out.dtype))
    return out, *gradients


def kernel_values(bench):
    """The kernel, and sdpa for comparison, against the maths in float64; on a CPU eager instead of the
    kernel."""
    backends = ["triton" if bench.gpu else "eager", "sdpa"]
    lengths = ((8, 8), (7, 5)) if bench.quick else ((512, 512), (500, 77))
    rows, result = [], {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in HEAD_DIMS:
            for N, L in lengths:
                inputs = attention_inputs((2, 2, N, L, d), bench.device, dtype)
                exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
                expected = values_and_gradients((*exact, inputs[3]), "eager")
                for backend in backends:
                    found = values_and_gradients(inputs, backend)
                    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
                    name = f"{str(dtype)[6:]}, {N} x {L} x {d}"
                    rows.append([name, backend, *(f"{error:.1e}" for error in errors)])
                    result[f"{name}, {backend}"] = errors
    return markdown_table(["type, N x L x d", "backend", "out", "dq", "dk", "dv"], rows), result


def run_train(bench, options: str) -> dict:
    """Run train.py in a process of its own, with an empty cache -> numbers of the run. Raises RuntimeError if
    it fails, TimeoutExpired if it takes longer than the whole bench may."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        environment = {**os.environ, "MODELGROW_CACHE": str(Path(folder) / "cache")}
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
        "seconds": seconds,
        "steps": last["step"],
        "seconds to the first step": first["seconds"] - first["step"] * batch / speed,
        "clips/s": speed,
        "validation loss": next(entry["val_loss"] for entry in reversed(metrics) if "val_loss" in entry),
    }


def run_table(options, numbers) -> str:
    """The numbers of a run as a table."""
    cells = [f"{value:.4g}" for value in numbers.values()]
    return markdown_table(["command", *numbers], [[f"python train.py {options}", *cells]])


def train_speed(bench):
    """train.py's own clips/s against the bare step of the same preset and batch."""
    options = QUICK_OPTIONS if bench.quick else SMALL_OPTIONS
    numbers = run_train(bench, options)
    config, batch = (QUICK, 2) if bench.quick else (PRESETS["small"], 32)
    step = our_step(config, batch, bench, compiled=not bench.quick)
    seconds = alternate({"step": step}, bench.repeats)["step"]
    numbers["clips/s of the bare step"] = batch / np.median(seconds)
    numbers["share of it"] = numbers["clips/s"] / numbers["clips/s of the bare step"]
    return run_table(options, numbers), numbers


def whole_run(bench):
    """`python train.py` with its defaults."""
    options = QUICK_OPTIONS if bench.quick else ""
    numbers = run_train(bench, options)
    return run_table(options, numbers), numbers


SECTIONS = {
    "kernel values": kernel_values,
    "attention": bench_attention,
    "steps": bench_train,
    "train.py": train_speed,
    "whole run": whole_run,
}


def run_sections(sections, bench) -> tuple[str, dict]:
    """All sections, one after the other -> the text of all, and {name: {"seconds", "result" or "error"}}."""
    begin = time.perf_counter()
    texts, results = [], {}
    for name, section in sections.items():
        started = time.perf_counter() - begin
        left = bench.minutes - started / 60
        entry = {}
        try:
            if left <= 0:
                raise TimeoutError(f"skipped, because {bench.minutes:g} minutes are over")
            text, entry["result"] = section(replace(bench, minutes=left))
        except Exception as error:  # whatever it is, the other sections shall run
            entry["error"] = f"{type(error).__name__}: {error}"
            text = f"failed: {entry['error']}"
        entry["seconds"] = time.perf_counter() - begin - started
        print(f"{name}: {entry['seconds']:.0f} s")
        texts.append(f"## {name} ({entry['seconds']:.0f} s)\n\n{text}")
        results[name] = entry
    return "\n\n".join(texts), results
