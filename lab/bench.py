"""Speed, measured and not assumed: `python -m lab.bench attention|train|sample|data|gpu`.

**A fair comparison** runs all sides in one process, in turn, many times. Whatever else the machine does then
hits all of them. The ratio of two neighbours is taken each time, and its median and quartiles are printed. A
first turn, in which memory is allocated and graphs are compiled, does not count.

**The floor.** A transformer is matrix products. The speed of the machine at large square ones in the same
precision bounds what a step can reach: its FLOPs (`dit.count_flops`) over that peak. The share of the peak
says how much of the time goes elsewhere: to memory, norms, the optimizer. The nominal peak of a GPU is that
of its data sheet, for dense bf16.

**Peers** are two video transformers of `diffusers`, if that is installed: Wan's (full attention, one kind of
block, as here) and Latte's (space and time in turn, so half of its blocks are temporal). They have the same
number of tokens, channels, blocks, heads and channels of a patch, and the same clips, features, loss,
optimizer and precision. Neither they nor we recompute activations.

`gpu` runs the first two and more, in five minutes on one GPU (lab/bench_gpu.py). Left out: end-to-end
comparisons with trained peers, whose weights are of another size by far.
"""

import argparse
import itertools
import json
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
from data import ToyDataset
from dit import PRESETS, DiT, DiTConfig, count_flops
from flow import flow_loss
from lab.evaluate import evaluate
from lab.reader import get_reader
from lab.report import attribute_mean, markdown_table
from lab.study import machine_name
from machine import autocast, out_of_memory, pick_device, pick_precision, run_command
from run import find_checkpoint, newest_checkpoint

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
NOMINAL_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}

PEER = DiTConfig(patch_time=2, patch_size=4, width=256, depth=6, heads=4)  # 256 tokens
QUICK = DiTConfig(frames=4, size=16, patch_time=2, patch_size=4, width=32, depth=1, heads=2)
TEXT_LENGTH = 32  # tokens of the prompts of a step
STEP_COLUMNS = [
    "model", "step", "clips/s", "time over eager", "time over compiled", "TFLOP/s", "share of the peak",
    "share of the nominal peak", "GiB",
]  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    device: torch.device
    precision: torch.dtype | None  # of autocast, as from `pick_precision`
    repeats: int = 20  # turns of each side
    quick: bool = False  # tiny sizes, to see that everything works
    checkpoint: Path | None = None  # that part sample draws with; None: the newest
    count: int = 200  # prompts of part sample
    minutes: float = 5.0  # of part gpu

    @property
    def dtype(self) -> torch.dtype:
        """The type of matrix products."""
        return self.precision or torch.float32

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


def matmul_peak(bench) -> float:
    """FLOP/s of a product of two large random matrices, the best of ten."""
    n = 64 if bench.quick else 8192 if bench.gpu else 2048
    a, b = torch.randn(2, n, n, device=bench.device, dtype=bench.dtype)
    times = alternate({"product": lambda: a @ b}, 10)["product"]
    return 2 * n**3 / min(times)


def nominal_peak() -> float | None:
    """FLOP/s of this GPU by its data sheet; None if it is not in the list."""
    words = torch.cuda.get_device_name().replace("-", " ").split() if torch.cuda.is_available() else []
    return next((peak for name, peak in NOMINAL_PEAKS.items() if name in words), None)


def attention_inputs(shape, device, dtype):
    """(B, heads, N, L, d) -> q, k, v, which want gradients, and if N and L differ a mask for prompts of 1 to
    L tokens, else None."""
    B, H, N, L, d = shape
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for n in (N, L, L):
        x = torch.randn(B, H, n, d, generator=generator, device=device, dtype=dtype)
        tensors.append(x.requires_grad_())
    if N == L:
        return (*tensors, None)
    lengths = torch.linspace(1, L, B, device=device).unsqueeze(1)
    return (*tensors, torch.arange(L, device=device) < lengths)


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
    """Whether a backend of sdpa takes these inputs."""
    try:
        run_attention(inputs, backend, True)
    except RuntimeError as error:
        if out_of_memory(error) or backend not in SDPA_BACKENDS:
            raise
        return False
    return True


def training_step(model, forward, clips, prompt, precision):
    """A training step of `model` as a function: loss, gradients, clipping, AdamW. `forward` takes (x_t, t,
    features, mask) and predicts a clip."""
    device = clips.device
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    t = torch.rand(len(clips), device=device)
    noise = torch.randn_like(clips)

    def step():
        with autocast(device, precision):
            loss = flow_loss(forward, clips, t, noise, prompt).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_batch(config, count, device):
    """`count` clips and prompts for a model of `config`."""
    clips = torch.randn(count, 3, config.frames, config.size, config.size, device=device)
    features = torch.randn(count, TEXT_LENGTH, config.text_dim, device=device)
    mask = torch.ones(count, TEXT_LENGTH, dtype=torch.bool, device=device)
    return clips, (features, mask)


def our_step(config, count, bench, compiled):
    """A training step of a DiT of `config` with `count` clips, as a function."""
    model = DiT(config).to(bench.device)
    for parameter in model.parameters():  # zeros would cost a GPU less power
        torch.nn.init.normal_(parameter, std=0.02)
    if compiled:
        for block in model.blocks:
            block.compile()
    clips, prompt = random_batch(config, count, bench.device)
    return training_step(model, model, clips, prompt, bench.precision)


def wan_like(config):
    """Wan's transformer with the sizes of `config` -> (model, forward). Raises ImportError without
    diffusers."""
    from diffusers import WanTransformer3DModel

    patch = config.patch_time, config.patch_size, config.patch_size
    hidden = config.mlp_ratio * config.width
    model = WanTransformer3DModel(
        patch_size=patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        in_channels=3, out_channels=3, text_dim=config.text_dim, freq_dim=256, ffn_dim=hidden,
        num_layers=config.depth,
    )  # fmt: skip

    def forward(x, t, text, mask):
        return model(x, 1000 * t, text, return_dict=False)[0]

    return model, forward


def latte_like(config):
    """Latte's transformer with the sizes of `config` -> (model, forward). A frame is a token in time there,
    so `patch_time` frames are stacked as channels. Raises ImportError without diffusers."""
    from diffusers import LatteTransformer3DModel

    pt = config.patch_time
    model = LatteTransformer3DModel(  # a layer is a spatial and a temporal block
        num_attention_heads=config.heads, attention_head_dim=config.head_dim, in_channels=3 * pt,
        out_channels=3 * pt, num_layers=config.depth // 2, attention_bias=True, sample_size=config.size,
        patch_size=config.patch_size, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=config.text_dim, video_length=config.frames // pt,
    )  # fmt: skip

    def forward(x, t, text, mask):
        stacked = x.unflatten(2, (-1, pt)).transpose(2, 3).flatten(1, 2)  # (B, 3 pt, T / pt, H, W)
        out = model(stacked, 1000 * t, text, mask, return_dict=False)[0]
        return out.unflatten(1, (3, pt)).transpose(2, 3).flatten(2, 3)

    return model, forward


def peer_step(make, config, count, bench):
    """A training step of a peer of a DiT of `config`, as a function. Raises ImportError without diffusers."""
    model, forward = make(config)
    model.to(bench.device)
    clips, prompt = random_batch(config, count, bench.device)
    return training_step(model, forward, clips, prompt, bench.precision)


# --------------------------------------------------------------------------------------------------------
# Parts


def bench_attention(bench):
    """Forward and backward pass of each backend at the shapes of training."""
    shapes = QUICK_SHAPES if bench.quick else GPU_SHAPES if bench.gpu else SHAPES
    backends = ["sdpa", "triton", *SDPA_BACKENDS] if bench.gpu else ["sdpa", "eager"]
    calls = 20 if bench.gpu else 1
    rows, result = [], {}
    for name, shape in shapes.items():
        inputs = attention_inputs(shape, bench.device, bench.dtype)
        able = [backend for backend in backends if can_run(inputs, backend)]
        for passes in ("forward", "forward and backward"):
            sides = {
                backend: partial(run_attention, inputs, backend, passes != "forward") for backend in able
            }
            times = alternate(sides, bench.repeats, calls)
            cells = [f"{name}: {' x '.join(map(str, shape))}", passes]
            for backend in backends:
                cells.append(f"{1e3 * np.median(times[backend]):.3f}" if backend in able else "cannot")
            rows.append([*cells, ratio(times, backends[1], "sdpa")])
            result[f"{name}, {passes}"] = times
    titles = [f"{backend}, ms" for backend in backends]
    titles = ["B x heads x N x L x d", "passes", *titles, f"{backends[1]} over sdpa"]
    return markdown_table(titles, rows), result


def step_cases(bench) -> list:
    """(name, config, clips of a step, whether to compare with the peers) of part train."""
    if bench.quick:
        return [("quick", QUICK, 2, True)]
    if not bench.gpu:
        return [("tiny", PRESETS["tiny"], 32, False), ("width 256, 6 blocks", PEER, 16, True)]
    cases = [("width 256, 6 blocks", PEER, 128, True)]
    for name, config in PRESETS.items():
        count = {"nano": 64, "tiny": 32, "small": 32}.get(name, 16)
        cases.append((name, config, count, name == "small"))
    return cases


def make_sides(config, count, with_peers, bench) -> tuple[dict, dict]:
    """The training steps to compare -> {name: a function}, and {name: GiB that it needs} on a GPU."""
    makers = {"eager": partial(our_step, config, count, bench, False)}
    if not bench.quick:  # compiling takes a minute
        makers["compiled"] = partial(our_step, config, count, bench, True)
    for name, make in (("Wan", wan_like), ("Latte", latte_like)) if with_peers else ():
        makers[name] = partial(peer_step, make, config, count, bench)
    sides, memory = {}, {}
    for name, make in makers.items():
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            sides[name] = make()
        except ImportError:  # no diffusers
            continue
        sides[name]()
        if bench.gpu:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return sides, memory


def bench_train(bench):
    """A training step, eager and compiled, beside the peers."""
    peak = matmul_peak(bench)
    text = [f"Matrix products in {str(bench.dtype)[6:]}: at best {peak / 1e12:.4g} TFLOP/s."]
    rows, result = [], {"peak": peak}
    for name, config, count, with_peers in step_cases(bench):
        torch.compiler.reset()
        label = f"{name} ({count} clips of {config.tokens()} tokens)"
        try:
            sides, memory = make_sides(config, count, with_peers, bench)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rows.append([label, "out of memory", *[""] * (len(STEP_COLUMNS) - 2)])
            continue
        times = alternate(sides, bench.repeats)
        flops = count * count_flops(DiT(config), [TEXT_LENGTH])
        for side, seconds in times.items():
            speed = flops / np.median(seconds)
            cells = [label, side, f"{count / np.median(seconds):.1f}"]
            cells += [ratio(times, side, other) if other in times else "" for other in ("eager", "compiled")]
            if side in ("eager", "compiled"):
                nominal = f"{speed / nominal_peak():.2f}" if nominal_peak() else ""
                cells += [f"{speed / 1e12:.4g}", f"{speed / peak:.2f}", nominal]
            else:  # the FLOPs of peers are not counted
                cells += [""] * 3
            rows.append([*cells, f"{memory[side]:.1f}" if side in memory else ""])
        result[label] = {"seconds": times, "GiB": memory}
    text.append(markdown_table(STEP_COLUMNS, rows))
    if find_spec("diffusers") is None:
        text.append("Without peers, because diffusers is not installed.")
    return "\n\n".join(text), result


def bench_sample(bench):
    """Scores and time over the number of steps of the solver."""
    checkpoint = bench.checkpoint or newest_checkpoint()
    reader = get_reader()
    rows, result = [], {}
    for steps in (1, 2) if bench.quick else (1, 2, 3, 4, 6, 8, 10, 16, 20, 32):
        begin = time.perf_counter()
        scores = evaluate(checkpoint, reader, bench.count, steps, device=str(bench.device), only=("seen",))
        seconds = (time.perf_counter() - begin) / bench.count
        right = attribute_mean(scores["seen"])
        rows.append([str(steps), f"{right:.3f}", f"{scores['seen']['all']:.3f}", f"{seconds:.3f}"])
        result[steps] = {"scores": scores["seen"], "seconds per clip": seconds}
    table = markdown_table(["steps", "mean of the attributes", "all right", "s per clip"], rows)
    return f"{checkpoint}, {bench.count} seen prompts:\n\n{table}", result


def bench_data(bench):
    """How long a step waits for its clips: rendered when they are needed, or taken from memory."""
    count = 4 if bench.quick else 32
    dataset = ToyDataset("rich", 16 * count, seed=0, device=bench.device)
    rows = torch.randint(len(dataset), (count,), device=bench.device)
    seeds = itertools.count(1)

    def render_clips():
        ToyDataset("rich", count, seed=next(seeds), device=bench.device)

    sides = {
        "a step of tiny": our_step(QUICK if bench.quick else PRESETS["tiny"], count, bench, False),
        "clips from memory": partial(dataset.batch, rows),
        "clips rendered": render_clips,
    }
    times = alternate(sides, bench.repeats)
    cells = []
    for name, seconds in times.items():
        cells.append([name, f"{1e3 * np.median(seconds):.1f}", ratio(times, name, "a step of tiny")])
    return markdown_table([f"{count} clips", "ms", "over a step"], cells), times


def bench_gpu(bench):
    """Everything about one GPU."""
    from lab.bench_gpu import SECTIONS, run_sections

    return run_sections(SECTIONS, bench)


# --------------------------------------------------------------------------------------------------------
# The command. A part returns a text with tables, and numbers for JSON.

PARTS = {
    "attention": bench_attention,
    "train": bench_train,
    "sample": bench_sample,
    "data": bench_data,
    "gpu": bench_gpu,
}


def main(argv=None):
    """Measure: `python -m lab.bench train`."""
    parser = argparse.ArgumentParser(description="Measure speed; writes tables as Markdown, numbers as JSON.")
    add = parser.add_argument
    add("part", choices=PARTS, help="what to measure")
    add("--repeats", type=int, default=20, help="turns of each side (20)")
    add("--count", type=int, default=200, help="prompts that sample scores (200)")
    add("--checkpoint", help="run or checkpoint for sample (the newest run, else pretrained/)")
    add("--minutes", type=float, default=5.0, help="that gpu may take (5)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    add("--quick", action="store_true", help="tiny sizes and one turn, to see that everything works")
    add("--out", help="JSON file for the numbers; tables go beside it (runs/bench-PART.json)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else None
    repeats, count = (1, 2) if args.quick else (args.repeats, args.count)
    precision = pick_precision("auto", device)
    bench = Bench(device, precision, repeats, args.quick, checkpoint, count, args.minutes)
    out = Path(args.out or f"runs/bench-{args.part}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    text, result = PARTS[args.part](bench)
    text = f"{machine_name()}\n\n{text}\n"
    print(text)
    out.with_suffix(".md").write_text(text)
    numbers = {"machine": machine_name(), "arguments": vars(args), "result": result}
    out.write_text(json.dumps(numbers, indent=1))
    print(f"written to {out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    run_command(main, "close other programs, or give --quick")
