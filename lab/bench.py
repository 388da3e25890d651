"""Speed, measured and not assumed: `python -m lab.bench attention|train|sample|data|gpu`.

**A fair comparison** runs all sides in one process, in turn, many times. Whatever else the machine does then
hits all of them. The ratio of two neighbours is taken each time, and its median and quartiles are printed. A
first turn, in which memory is allocated and graphs are compiled, does not count.

**The floor.** A transformer is matrix products. The speed of the machine at large square ones in the same
precision bounds what a step can reach: its FLOPs (`cost.count_flops`) over that peak. The share of the peak
says how much of the time goes elsewhere: to memory, norms, the optimizer.

**Peers** are two video transformers of `diffusers`, if that is installed: Wan's (full attention, one kind of
block, as here) and Latte's (space and time in turn, so half of its blocks are temporal). They have the same
number of tokens, channels, blocks, heads and channels of a patch, and the same clips, features, loss,
optimizer and precision. Neither they nor we recompute activations.

`gpu` runs the first two and more, in five minutes on one GPU (lab/bench_gpu.py). A part returns the rows of
its table. Left out: end-to-end comparisons with trained peers, whose weights are of another size by far.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from attention import attention
from cost import count_flops
from data import ToyDataset
from dit import PRESETS, DiT, DiTConfig
from flow import flow_loss
from lab.evaluate import prompt_sets, sample_clips, score
from lab.reader import get_reader
from lab.study import machine_name
from lab.tables import markdown_table
from lab.verdicts import attribute_mean
from machine import (
    WARMUP_CALLS,
    GraphedStep,
    autocast,
    out_of_memory,
    pick_device,
    pick_precision,
    run_command,
)
from run import find_checkpoint, load_model, newest_checkpoint
from start import make_optimizer
from text_encoder import Prompts

SHAPES = {  # of attention in training on a CPU: (B, heads, N, L, d)
    "nano, self": (32, 4, 64, 64, 32),
    "tiny, self": (32, 4, 128, 128, 32),
    "tiny, text": (32, 4, 128, 16, 32),
    "256 tokens": (16, 4, 256, 256, 64),
    "512 tokens": (8, 6, 512, 512, 64),
    "small, self": (4, 6, 2048, 2048, 64),
    "small, text": (4, 6, 2048, 77, 64),
}
GPU_SHAPES = {
    "small, self": (32, 6, 2048, 2048, 64),
    "wide, self": (8, 12, 4096, 4096, 128),
    "tiny, self": (256, 4, 128, 128, 32),
    "small, text": (32, 6, 2048, 77, 64),
}
QUICK_SHAPES = {"self": (2, 2, 8, 8, 32), "text": (2, 2, 8, 5, 32)}
SDPA_BACKENDS = {  # of a GPU
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

PEER = DiTConfig(patch_time=2, patch_size=4, width=256, depth=6, heads=4)  # 256 tokens
QUICK = DiTConfig(frames=4, size=16, patch_time=2, patch_size=4, width=32, depth=1, heads=2)
OURS = ("eager", "compiled", "captured")  # steps of this project, beside those of peers
TEXT_LENGTH = 32  # tokens of the prompts of a step


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    device: torch.device
    precision: torch.dtype | None  # of autocast, as from `pick_precision`
    repeats: int = 20  # turns of each side
    quick: bool = False  # tiny sizes, to see that everything works
    checkpoint: Path | None = None  # that part sample draws with; None: the newest
    count: int = 200  # prompts of part sample
    minutes: float = 5.0  # after which no further section of part gpu, or model of its steps, is begun

    @property
    def gpu(self) -> bool:
        """Whether this is a CUDA GPU."""
        return self.device.type == "cuda"


# --------------------------------------------------------------------------------------------------------
# Tools


def alternate(sides, repeats, calls=1) -> dict[str, list[float]]:
    """{name: a function} -> {name: seconds of a call, in each of `repeats` turns}, all sides in turn. On a
    GPU several `calls` without a pause hide the time of a launch."""
    seconds = {name: [] for name in sides}
    for turn in tqdm(range(repeats + 1), "turns", leave=False):
        for name, run in sides.items():
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def ratio(seconds, name, other) -> str:
    """How many times as long `name` takes as `other`: the median over turns, and the quartiles."""
    ratios = np.divide(seconds[name], seconds[other])
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(rows: list[dict]) -> str:
    """Rows, {title of a column: number or text}, as Markdown. Some rows may lack some columns."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = []
    for row in rows:
        texts = {title: f"{x:.4g}" if isinstance(x, float) else str(x) for title, x in row.items()}
        cells.append([texts.get(title, "") for title in titles])
    return markdown_table(titles, cells)


def matmul_peak(bench) -> float:
    """FLOP/s of a product of two large random matrices, the best of ten."""
    n = 64 if bench.quick else 8192 if bench.gpu else 2048
    a, b = torch.randn(2, n, n, device=bench.device, dtype=bench.precision)
    times = alternate({"product": partial(torch.matmul, a, b)}, 10)["product"]
    return 2 * n**3 / min(times)


def attention_inputs(shape, bench):
    """(B, heads, N, L, d) -> q, k, v, which want gradients, and if N and L differ a mask for prompts of 1 to
    L tokens, else None."""
    B, H, N, L, d = shape
    tensors = []
    for n in (N, L, L):
        x = torch.randn(B, H, n, d, device=bench.device, dtype=bench.precision)
        tensors.append(x.requires_grad_())
    if N == L:
        return (*tensors, None)
    lengths = torch.linspace(1, L, B, device=bench.device).unsqueeze(1)
    return (*tensors, torch.arange(L, device=bench.device) < lengths)


def run_attention(inputs, backend, backward):
    """One forward pass of attention, and with `backward` the gradients of q, k and v. backend: one of
    attention.py, or one of SDPA_BACKENDS. Raises RuntimeError if that one cannot do it."""
    only = SDPA_BACKENDS.get(backend)
    kernels = [only] if only else [*SDPA_BACKENDS.values(), SDPBackend.MATH]
    with torch.set_grad_enabled(backward), sdpa_kernel(kernels):
        out = attention(*inputs, "sdpa" if only else backend)
        if backward:
            torch.autograd.grad(out, inputs[:3], out.detach())


def can_run(inputs, backend) -> bool:
    """Whether a backend takes these inputs."""
    try:
        run_attention(inputs, backend, True)
    except RuntimeError as error:
        if out_of_memory(error) or backend not in SDPA_BACKENDS:
            raise
        return False
    return True


def as_graph(run):
    """A function of one CUDA graph: all kernels of `run`, which has no arguments. For small inputs Python
    launches kernels more slowly than a GPU runs them."""
    run()  # whatever is compiled or allocated at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def captured(step):
    """A step of `training_step` as train.py runs it on a GPU, warmed up."""
    graphed = GraphedStep(step)
    for _ in range(WARMUP_CALLS + 1):
        graphed()
    return graphed


def training_step(model, config, count, bench):
    """A training step of `model` with `count` random clips and prompts for a model of `config`, as a function
    that returns the loss: loss, gradients, clipping, AdamW."""
    device = bench.device
    model.to(device)
    optimizer = make_optimizer(model, {}, torch.tensor(1e-4, device=device))
    clips = torch.randn(count, 3, config.frames, config.size, config.size, device=device)
    noise = torch.randn_like(clips)
    t = torch.rand(count, device=device)
    text = torch.randn(count, TEXT_LENGTH, config.text_dim, device=device)
    mask = torch.ones(count, TEXT_LENGTH, dtype=torch.bool, device=device)

    def step():
        with autocast(device, bench.precision):
            loss = flow_loss(model, clips, t, noise, (text, mask)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_model(config, compiled=False):
    """A DiT of `config` in which no weight is zero, which would cost a GPU less power."""
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if compiled:
        for block in model.blocks:
            block.compile()
    return model


class WanLike(torch.nn.Module):
    """Wan's transformer with the sizes of `config`. Raises ImportError without diffusers."""

    def __init__(self, config):
        from diffusers import WanTransformer3DModel

        super().__init__()
        patch = config.patch_time, config.patch_size, config.patch_size
        self.inner = WanTransformer3DModel(
            patch_size=patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
            in_channels=3, out_channels=3, text_dim=config.text_dim, freq_dim=256,
            ffn_dim=config.mlp_ratio * config.width, num_layers=config.depth,
        )  # fmt: skip

    def forward(self, x, t, text, mask):
        """As `DiT.forward`."""
        return self.inner(x, 1000 * t, text, return_dict=False)[0]


class LatteLike(torch.nn.Module):
    """Latte's transformer with the sizes of `config`. A frame is a token in time there, so `patch_time`
    frames are stacked as channels. Raises ImportError without diffusers."""

    def __init__(self, config):
        from diffusers import LatteTransformer3DModel

        super().__init__()
        self.patch_time = pt = config.patch_time
        self.inner = LatteTransformer3DModel(  # a layer is a spatial and a temporal block
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=3 * pt,
            out_channels=3 * pt, num_layers=config.depth // 2, attention_bias=True, sample_size=config.size,
            patch_size=config.patch_size, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
            caption_channels=config.text_dim, video_length=config.frames // pt,
        )  # fmt: skip

    def forward(self, x, t, text, mask):
        """As `DiT.forward`."""
        pt = self.patch_time
        stacked = x.unflatten(2, (-1, pt)).transpose(2, 3).flatten(1, 2)  # (B, 3 pt, T / pt, H, W)
        out = self.inner(stacked, 1000 * t, text, mask, return_dict=False)[0]
        return out.unflatten(1, (3, pt)).transpose(2, 3).flatten(2, 3)


# --------------------------------------------------------------------------------------------------------
# Parts


def bench_attention(bench) -> list[dict]:
    """Forward and backward pass of each backend at the shapes of training."""
    shapes = QUICK_SHAPES if bench.quick else GPU_SHAPES if bench.gpu else SHAPES
    backends = ["sdpa", "triton", *SDPA_BACKENDS] if bench.gpu else ["sdpa", "eager"]
    rows = []
    for name, shape in shapes.items():
        inputs = attention_inputs(shape, bench)
        able = [backend for backend in backends if can_run(inputs, backend)]
        for backward in (False, True):
            sides = {backend: partial(run_attention, inputs, backend, backward) for backend in able}
            if bench.gpu:
                sides = {backend: as_graph(run) for backend, run in sides.items()}
            times = alternate(sides, bench.repeats, calls=20 if bench.gpu else 1)
            row = {"B x heads x N x L x d": f"{name}: {' x '.join(map(str, shape))}"}
            row["passes"] = "forward and backward" if backward else "forward"
            for backend in backends:
                row[f"{backend}, ms"] = 1e3 * np.median(times[backend]) if backend in able else "cannot"
            row[f"{backends[1]} over sdpa"] = ratio(times, backends[1], "sdpa")
            rows.append(row)
    return rows


def step_cases(bench) -> list:
    """(name, config, clips of a step, whether to compare with the peers) of part train."""
    if bench.quick:
        return [("quick", QUICK, 2, True)]
    if not bench.gpu:
        return [("tiny", PRESETS["tiny"], 32, False), ("width 256, 6 blocks", PEER, 16, True)]
    cases = []
    for name, config in reversed(PRESETS.items()):  # the largest first: the last may be skipped
        count = {"nano": 64, "tiny": 32, "small": 32}.get(name, 16)
        cases.append((name, config, count, name == "small"))
    return [*cases, ("width 256, 6 blocks", PEER, 128, True)]


def make_sides(config, count, with_peers, bench) -> tuple[dict, dict]:
    """The training steps to compare -> {name: a function}, and {name: GiB that it needs} on a GPU."""
    makers = {"eager": our_model}
    if not bench.quick:  # compiling takes a minute
        makers["compiled"] = partial(our_model, compiled=True)
    if bench.gpu:
        makers["captured"] = partial(our_model, compiled=not bench.quick)
    if with_peers and find_spec("diffusers"):
        makers |= {"Wan": WanLike, "Latte": LatteLike}
    sides, memory = {}, {}
    for name, make in makers.items():
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step = training_step(make(config), config, count, bench)
        sides[name] = captured(step) if name == "captured" else step
        sides[name]()
        if bench.gpu:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return sides, memory


def bench_train(bench) -> list[dict]:
    """A training step, eager, compiled, and on a GPU captured as train.py does it, beside the peers, and at
    last a large product of matrices."""
    begin = time.perf_counter()
    peak = matmul_peak(bench)
    rows = []
    for name, config, count, with_peers in step_cases(bench):
        label = f"{name} ({count} clips of {config.tokens()} tokens)"
        if time.perf_counter() - begin > 60 * bench.minutes:
            rows.append({"model": label, "step": "skipped, because the time is over"})
            continue
        torch.compiler.reset()
        sides = None  # the memory of the model before is free
        try:
            sides, memory = make_sides(config, count, with_peers, bench)
            times = alternate(sides, bench.repeats)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rows.append({"model": label, "step": "out of memory"})
            continue
        flops = count * count_flops(DiT(config), [TEXT_LENGTH])
        for side, seconds in times.items():
            row = {"model": label, "step": side, "clips/s": count / np.median(seconds)}
            row |= {f"time over {other}": ratio(times, side, other) for other in times if other in OURS}
            if side in OURS:  # the FLOPs of peers are not counted
                speed = flops / np.median(seconds)
                row |= {"TFLOP/s": speed / 1e12, "share of the peak": speed / peak}
            if side in memory:
                row["GiB"] = memory[side]
            rows.append(row)
    return [*rows, {"model": "a large product of matrices", "TFLOP/s": peak / 1e12}]


def bench_sample(bench) -> list[dict]:
    """Scores and time over the number of steps of the solver."""
    checkpoint = bench.checkpoint or newest_checkpoint()
    print(f"{checkpoint}, {bench.count} seen prompts")
    reader = get_reader(device=bench.device)
    model, metadata = load_model(checkpoint)
    model.to(bench.device)
    scenes, captions = prompt_sets(bench.count)["seen"]
    prompts = Prompts(captions, metadata, model.config.llm_dim, bench.device)
    sample = partial(sample_clips, model, prompts, precision=bench.precision)
    sample(captions[:50], 1)  # the first turn does not count
    rows = []
    for steps in (1, 2) if bench.quick else (1, 2, 3, 4, 6, 8, 10, 16, 20, 32):
        begin = time.perf_counter()
        clips = sample(captions, steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / bench.count
        seen = score(reader, clips, scenes)
        means = {"mean of the attributes": attribute_mean(seen), "all right": seen["all"]}
        rows.append({"steps": steps, **means, "s per clip": seconds})
    return rows


def bench_data(bench) -> list[dict]:
    """How long a step waits for its clips: rendered when they are needed, or taken from memory."""
    count = 4 if bench.quick else 32
    config = QUICK if bench.quick else PRESETS["tiny"]
    dataset = ToyDataset("rich", 16 * count, seed=0, device=bench.device)
    rows = torch.randint(len(dataset), (count,), device=bench.device)
    seeds = itertools.count(1)

    def render_clips():
        ToyDataset("rich", count, seed=next(seeds), device=bench.device)

    sides = {
        "a step of tiny": training_step(our_model(config), config, count, bench),
        "clips from memory": partial(dataset.batch, rows),
        "clips rendered": render_clips,
    }
    times = alternate(sides, bench.repeats)
    results = []
    for name, seconds in times.items():
        over_a_step = ratio(times, name, "a step of tiny")
        results.append({f"{count} clips": name, "ms": 1e3 * np.median(seconds), "over a step": over_a_step})
    return results


# --------------------------------------------------------------------------------------------------------
# The command

PARTS = {"attention": bench_attention, "train": bench_train, "sample": bench_sample, "data": bench_data}


def main(argv=None):
    """Measure: `python -m lab.bench train`."""
    parser = argparse.ArgumentParser(description="Measure speed; writes tables as Markdown, numbers as JSON.")
    add = parser.add_argument
    add("part", choices=(*PARTS, "gpu"), help="what to measure")
    add("--repeats", type=int, help="turns of each side (20; gpu: 8)")
    add("--count", type=int, default=200, help="prompts that sample scores (200)")
    add("--checkpoint", help="run or checkpoint for sample (the newest run, else pretrained/)")
    add("--minutes", type=float, default=5.0, help="that gpu may take (5)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    add("--quick", action="store_true", help="tiny sizes and one turn, to see that everything works")
    add("--out", help="JSON file for the numbers; tables go beside it (runs/bench-PART.json)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else None
    if args.repeats is None:
        args.repeats = 8 if args.part == "gpu" else 20
    if args.repeats < 1 or args.count < 1:
        raise ValueError("--repeats and --count must be at least 1")
    repeats, count = (1, 2) if args.quick else (args.repeats, args.count)
    precision = pick_precision("auto", device)
    minutes = args.minutes if args.part == "gpu" else math.inf
    bench = Bench(device, precision, repeats, args.quick, checkpoint, count, minutes)
    out = Path(args.out or f"runs/bench-{args.part}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.part == "gpu":
        from lab.bench_gpu import SECTIONS, run_sections

        parts = run_sections(SECTIONS, bench)
    else:
        parts = [(args.part, PARTS[args.part](bench))]
    numbers = {"machine": machine_name(), "arguments": vars(args), "result": {}}
    text = numbers["machine"] + "\n"
    print(text, end="")
    for name, rows in parts:  # what is measured is kept, whatever happens to the rest
        section = f"\n## {name}\n\n{table(rows)}\n"
        print(section, end="")
        text += section
        numbers["result"][name] = rows
        out.with_suffix(".md").write_text(text)
        out.write_text(json.dumps(numbers, indent=1))
    print(f"written to {out} and {out.with_suffix('.md')}")
    if any("failed" in row for rows in numbers["result"].values() for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, "close other programs, or give --quick")
