"""Speed, measured and not assumed: `python bench.py attention|train|sample|data`.

**A fair comparison** runs both sides in one process, in turn, many times. Whatever else the machine does then
hits both; the ratio of two neighbours is taken each time, and its median and quartiles are what is printed. A
first turn, in which memory is found and graphs are compiled, does not count.

**The floor.** A transformer is matrix products. The machine's speed at those, measured here on large square
ones in the same precision, bounds what a step can reach: its FLOPs (dit.py counts them) over that peak. What
is printed as a share of the peak says how much of the time goes elsewhere: to memory, norms, the optimiser.

**Peers** are the video transformers of `diffusers` if that is installed: Wan's (full attention, one block for
all, as here) and Latte's (space and time in turn, so half of its blocks are temporal), at the same number of
tokens, channels, blocks, heads and channels of a patch, on the same clips and features, with the same loss,
optimiser and precision. Neither they nor we recompute activations.

Left out: end-to-end comparisons with trained peers, whose weights are of another size by far.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import attention as kernels
from attention import attention
from data import ToyWorld
from dit import PRESETS, DiT, DiTConfig, count_flops
from evaluate import evaluate
from flow import flow_loss
from grow import randomise
from reader import get_reader
from report import attributes, markdown
from sample import STEPS, autocast, newest_checkpoint, pick_device, pick_precision
from study import machine
from train import update_ema

SHAPES = {  # of attention in training: (B, heads, N, L, d)
    "nano, self": (32, 4, 64, 64, 32),
    "tiny, self": (32, 4, 128, 128, 32),
    "tiny, text": (32, 4, 128, 16, 32),
    "256 tokens": (16, 4, 256, 256, 64),
    "512 tokens": (8, 6, 512, 512, 64),
    "small, self": (4, 6, 2048, 2048, 64),
    "small, text": (4, 6, 2048, 77, 64),
}
PEER = DiTConfig(patch_time=2, patch_size=4, width=256, depth=6, heads=4)  # 256 tokens


def alternate(sides, repeats) -> dict[str, list[float]]:
    """{name: something to call} -> {name: seconds of each of its `repeats` calls}, all sides in turn."""
    seconds = {name: [] for name in sides}
    for turn in tqdm(range(repeats + 1), "turns", leave=False):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds, name, other) -> str:
    """How many times as long `name` takes as `other`: the median over turns, and the quartiles."""
    low, middle, high = np.percentile(np.divide(seconds[name], seconds[other]), (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def peak(device, precision, n=2048) -> float:
    """FLOP/s of a product of two n x n matrices, the best of some."""
    a, b = torch.randn(2, n, n, device=device, dtype=precision or torch.float32)
    return 2 * n**3 / min(alternate({"product": lambda: a @ b}, 10)["product"])


# --------------------------------------------------------------------------------------------------------
# What is measured


def kernel_resources():
    """Compile the Triton kernels for GPUs that need not be here -> rows (GPU, kernel, type, d, registers of a
    thread, bytes of shared memory, bytes spilled to slow memory). Raises ImportError without triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    known = {"mask": "*u8", "log_sums": "*fp32", "deltas": "*fp32", "scale": "fp32"}
    known |= dict.fromkeys("HNL", "i32") | dict.fromkeys(("MASKED", "D", "TILE"), "constexpr")
    made = (kernels.forward_kernel, kernels.dq_kernel, kernels.dkv_kernel)
    for sm, kernel, dtype, d in itertools.product((80, 90), made, kernels.DTYPES, kernels.HEAD_DIMS):
        signature = {name: known.get(name, f"*{names[dtype]}") for name in kernel.arg_names}
        fixed = {"MASKED": True, "D": d, "TILE": kernels.tile_size(dtype, d)}
        pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}  # as tensors are
        source = ASTSource(kernel, signature, fixed, aligned)
        built = triton.compile(source, GPUTarget("cuda", sm, 32), options=kernels.LAUNCH)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            told = subprocess.run([tool, "-res-usage", file.name], stdout=-1, text=True, check=True)
        used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told.stdout)
        registers, stack, local = map(int, used.groups())
        shared = built.metadata.shared
        yield f"sm_{sm}", kernel.__name__, names[dtype], d, registers, shared, stack + local


def bench_attention(args):
    """Forward and backward of each backend at the training shapes; what the kernel would use on a GPU."""
    device = pick_device(args.device)
    precision = pick_precision("auto", device) or torch.float32
    backends = ["sdpa", "eager", *(["triton"] if device.type == "cuda" and kernels.triton else [])]
    rows, seconds = [], {}
    for shape_name, (B, H, N, L, d) in SHAPES.items():
        q, k, v = (
            torch.randn(B, H, n, d, device=device, dtype=precision, requires_grad=True) for n in (N, L, L)
        )
        mask = torch.ones(B, L, dtype=torch.bool, device=device) if N != L else None
        for passes in ("forward", "forward and backward"):

            def run(backend, train=passes != "forward", given=(q, k, v, mask)):
                with torch.set_grad_enabled(train):
                    out = attention(*given, backend)
                    if train:
                        torch.autograd.grad(out, given[:3], torch.ones_like(out))

            times = alternate({backend: partial(run, backend) for backend in backends}, args.repeats)
            seconds[f"{shape_name}, {passes}"] = times
            medians = [f"{1e3 * np.median(times[backend]):.2f}" for backend in backends]
            ratios = [ratio(times, backend, "sdpa") for backend in backends[1:]]
            rows.append([shape_name, f"{B} x {H} x {N} x {L} x {d}", passes, *medians, *ratios])
    titles = ["attention", "B x heads x N x L x d", "passes", *(f"{b}, ms" for b in backends)]
    print(markdown([*titles, *(f"{b} over sdpa" for b in backends[1:])], rows))
    resources = []
    if kernels.triton:
        resources = list(tqdm(kernel_resources(), "compiling the kernel", total=54, leave=False))
        titles = ["GPU", "kernel", "type", "d", "registers", "shared memory", "spilled"]
        print("\n" + markdown(titles, [map(str, row) for row in resources]))
    return {"seconds": seconds, "resources": resources}


def stepper(model, forward, clips, prompt, precision):
    """A training step of `model` as something to call: loss, gradients, clipping, AdamW. `forward` takes
    (x_t, t, features, mask) and predicts a clip."""
    device = clips.device
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    t, noise = torch.rand(len(clips), device=device), torch.randn_like(clips)

    def step():
        with autocast(device, precision):
            loss = flow_loss(forward, clips, t, noise, prompt).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def peers(config, device) -> dict:
    """Peers of a DiT of `config` -> {name: (model, forward)}; none without diffusers."""
    try:
        from diffusers import LatteTransformer3DModel, WanTransformer3DModel
    except ImportError:
        return {}
    head = config.width // config.heads
    pt, ps, hidden = config.patch_time, config.patch_size, config.mlp_ratio * config.width
    wan = WanTransformer3DModel(
        patch_size=(pt, ps, ps), num_attention_heads=config.heads, attention_head_dim=head, in_channels=3,
        out_channels=3, text_dim=config.text_dim, freq_dim=256, ffn_dim=hidden, num_layers=config.depth,
    ).to(device)  # fmt: skip
    latte = LatteTransformer3DModel(  # a frame is a token in time, so `pt` frames are stacked as channels
        num_attention_heads=config.heads, attention_head_dim=head, in_channels=3 * pt, out_channels=3 * pt,
        num_layers=config.depth // 2, attention_bias=True, sample_size=config.size, patch_size=ps,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=config.text_dim,
        video_length=config.frames // pt,
    ).to(device)  # fmt: skip

    def of_wan(x, t, text, mask):
        return wan(x, 1000 * t, text, return_dict=False)[0]

    def of_latte(x, t, text, mask):
        stacked = x.unflatten(2, (-1, pt)).transpose(2, 3).flatten(1, 2)  # (B, 3 pt, T / pt, H, W)
        out = latte(stacked, 1000 * t, text, mask, return_dict=False)[0]
        return out.unflatten(1, (3, pt)).transpose(2, 3).flatten(2, 3)

    return {"Wan": (wan, of_wan), "Latte": (latte, of_latte)}


def bench_train(args):
    """A training step, eager and compiled, beside the peers; and how its cost grows."""
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    best = peak(device, precision)
    print(f"{str(precision or torch.float32)[6:]} matrix products: {best / 1e9:.0f} GFLOP/s at their best")

    def batch(config, count):
        clips = torch.randn(count, 3, config.frames, config.size, config.size, device=device)
        features = torch.randn(count, 32, config.text_dim, device=device)
        return clips, (features, torch.ones(count, 32, dtype=torch.bool, device=device))

    def ours(config, count, compiled):
        model = randomise(DiT(config)).to(device)
        for block in model.blocks if compiled else ():
            block.compile()
        return stepper(model, model, *batch(config, count), precision)

    result = {"peak": best}
    for name, config, count in (("tiny", PRESETS["tiny"], 32), ("width 256, 6 blocks", PEER, 16)):
        sides = {"eager": ours(config, count, False), "compiled": ours(config, count, True)}
        if config is PEER:
            for peer, (model, forward) in peers(config, device).items():
                sides[peer] = stepper(model, forward, *batch(config, count), precision)
        times = alternate(sides, args.repeats)
        flops = count * count_flops(DiT(config), [32])
        rows = []
        for side, seconds in times.items():
            share = f"{flops / np.median(seconds) / best:.2f}" if side in ("eager", "compiled") else ""
            speed = f"{count / np.median(seconds):.1f}"
            rows.append([side, speed, *(ratio(times, side, s) for s in ("eager", "compiled")), share])
        print(f"\n{name}, {config.tokens()} tokens, batch {count}:")
        titles = ["step", "clips/s", "time over eager", "time over compiled", "share of the peak"]
        print(markdown(titles, rows))
        result[name] = times
    print("\nThe exponents of cost: a step takes about as long as the size to the power of")
    ways = {
        "tokens": [(replace(PEER, frames=8 * n), 4) for n in (1, 2, 4, 8)],
        "depth": [(replace(PEER, depth=2 * n), 4) for n in (1, 2, 4, 8)],
        "batch": [(PEER, 2 * n) for n in (1, 2, 4, 8)],
    }
    rows = []
    for way, sizes in ways.items():
        sides = {2**i: ours(config, count, False) for i, (config, count) in enumerate(sizes)}
        times = alternate(sides, max(3, args.repeats // 3))
        medians = [np.median(seconds) for seconds in times.values()]
        exponent = np.polyfit(np.log(list(times)), np.log(medians), 1)[0]
        told = ", ".join(f"{1e3 * m:.0f}" for m in medians)
        rows.append([way, f"{exponent:.2f}", told])
        result[f"cost over {way}"] = times
    print(markdown(["size", "exponent", "ms at 1, 2, 4 and 8 times of it"], rows))
    return result


def bench_sample(args):
    """Scores and time over the number of steps of the solver, of the newest run: a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    checkpoint, reader, points = newest_checkpoint(), get_reader(), {}
    for steps in (1, 2, 3, 4, 6, 8, 10, 16, 32):
        begin = time.perf_counter()
        scores = evaluate(checkpoint, reader, args.count, steps, only=("seen",))["seen"]
        seconds = (time.perf_counter() - begin) / args.count
        right = {"mean of the attributes": attributes(scores), "all right": scores["all"]}
        points[steps] = {**right, "s per clip": seconds}
    rows = [[str(steps), *(f"{value:.3f}" for value in row.values())] for steps, row in points.items()]
    print(markdown(["steps", *points[1]], rows))
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for title in right:
        axes.plot(list(points), [row[title] for row in points.values()], "o-", label=title)
    axes.axvline(STEPS, color="0.7", zorder=0, label=f"the default, {STEPS}")
    axes.set(xscale="log", xlabel="steps (Heun)", ylabel="share right", ylim=(0, 1), xticks=list(points))
    axes.set_xticklabels(points)
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(args.out).with_suffix(".png"), dpi=100)
    return points


def bench_data(args):
    """How long a step waits for its clips: rendered as they are needed, or taken from memory."""
    world, device = ToyWorld("rich", 512, 0), pick_device(args.device)
    rows, seeds = torch.randint(len(world), (32,)), itertools.count()
    config = PRESETS["tiny"]
    clips = world.batch(rows)[0].to(device)
    prompt = torch.randn(32, 64, config.text_dim, device=device), torch.ones(32, 64, device=device) > 0
    model = DiT(config).to(device)
    ema = DiT(config).to(device).requires_grad_(False)
    step = stepper(model, model, clips, prompt, pick_precision("auto", device))
    sides = {
        "a step": lambda: (step(), update_ema(ema, model, 1, 0.99)),
        "clips from memory": lambda: world.batch(rows),
        "clips rendered": lambda: ToyWorld("rich", 32, next(seeds)).batch(range(32)),
    }
    times = alternate(sides, args.repeats)
    rows = [[name, f"{1e3 * np.median(s):.1f}", ratio(times, name, "a step")] for name, s in times.items()]
    print(markdown(["32 clips", "ms", "over a step"], rows))
    return times


def main(argv=None):
    """Measure: `python bench.py train`."""
    parts = {"attention": bench_attention, "train": bench_train, "sample": bench_sample, "data": bench_data}
    parser = argparse.ArgumentParser(description="Measure speed; prints a table and writes JSON.")
    parser.add_argument("part", choices=parts, help="what to measure")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each side (20)")
    parser.add_argument("--count", type=int, default=200, help="prompts that sample scores (200)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument("--out", help="file for the numbers (runs/bench-PART.json)")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/bench-{args.part}.json"
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(machine())
    result = parts[args.part](args)
    out.write_text(json.dumps({"machine": machine(), "arguments": vars(args), "result": result}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
