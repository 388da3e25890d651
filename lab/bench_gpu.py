"""One GPU, measured in five minutes: `python -m lab.bench gpu`.

Sections run one after the other. One that fails says so, and the others continue. One that would begin after
the time is over is skipped.

    attention        the kernel against sdpa and each of its backends
    steps            a training step of every preset, eager and compiled, beside the peers
    train.py         its own clips/s against the bare step, and the seconds to its first step, after imports
    whole run        `python train.py` with its defaults, from an empty cache to the end

With --quick the same runs with tiny sizes, also on a CPU. Left out: values of the attention kernel, which
`pytest tests/test_attention.py` compares with float64 on a GPU; several GPUs; power; profiles.
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

from dit import PRESETS
from lab.bench import QUICK, alternate, bench_attention, bench_train, our_model, training_step

REPOSITORY = Path(__file__).resolve().parents[1]
CACHES = ("MODELGROW_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
QUICK_OPTIONS = "--quick --clips 16 --batch 2 --steps 10"
SMALL_OPTIONS = "--preset small --data both --clips 8192 --batch 32 --steps 300 --every 1000"


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
        "validation loss": next(entry["val_loss"] for entry in reversed(metrics) if "val_loss" in entry),
    }


def train_speed(bench) -> list[dict]:
    """train.py's own clips/s against the bare step of the same preset and batch."""
    row = run_train(bench, QUICK_OPTIONS if bench.quick else SMALL_OPTIONS)
    config, batch = (QUICK, 2) if bench.quick else (PRESETS["small"], 32)
    step = training_step(our_model(config, compiled=not bench.quick), config, batch, bench)
    bare = batch / np.median(alternate({"step": step}, bench.repeats)["step"])
    return [{**row, "clips/s of the bare step": bare, "share of it": row["clips/s"] / bare}]


def whole_run(bench) -> list[dict]:
    """`python train.py` with its defaults."""
    return [run_train(bench, QUICK_OPTIONS if bench.quick else "")]


SECTIONS = {
    "attention": bench_attention,
    "steps": bench_train,
    "train.py": train_speed,
    "whole run": whole_run,
}


def run_sections(sections, bench) -> dict[str, list[dict]]:
    """All sections, one after the other -> {name: rows}; of one that failed the row says why."""
    begin = time.perf_counter()
    results = {}
    for name, section in sections.items():
        left = bench.minutes - (time.perf_counter() - begin) / 60
        try:
            if left <= 0:
                raise TimeoutError(f"skipped, because {bench.minutes:g} minutes are over")
            results[name] = section(replace(bench, minutes=left))
        except Exception as error:  # whatever it is, the other sections still run
            results[name] = [{"failed": f"{type(error).__name__}: {error}"}]
        print(f"{name}: {time.perf_counter() - begin:.0f} s since the start")
    return results
