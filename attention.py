"""Attention by hand, and once more as a Triton kernel.

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v

Only through this line does information pass from one token of a transformer to another. Each query is
compared with all keys, the softmax turns the scores into weights that sum to one, and the values are averaged
with these weights. The scale 1/sqrt(d) keeps the variance of q k^T at one when the entries of q and k have
variance one.

Three backends compute the same function. `eager` is the maths, written out: read this one first. It stores
the (N, L) matrix of weights, so its memory is quadratic in the number of tokens. `sdpa` is torch's fused
`scaled_dot_product_attention`. `triton` is the kernel below, for a GPU. `auto` is `sdpa`, with one exception:
training in bfloat16 on a CPU with at most 256 keys uses `eager`, because the fused backward is slow there
(`python -m lab.bench attention` compares them).

**The kernel** (FlashAttention-2, arXiv 2307.08691) never stores the matrix. Fast memory on the chip holds a
*tile* of a few dozen queries, or keys, at a time. A program takes one tile of queries and walks over the
keys, tile by tile, with three running values per query: the largest score m so far, the sum l of
exp(score - m), and the sum of the values weighted by exp(score - m). When a larger m turns up, what was
summed is multiplied by exp(m_old - m_new): the online softmax. At the end the weighted sum over l is the
result. The log-sum-exp, m + log l, is kept: one number per query.

**Its backward** needs the weights again, and recomputes them: with that number p = exp(score - m - log l) is
one exponential, cheaper than reading N x L weights from slow memory. With o the output and do its gradient,

    dv = p^T do,   dp = do v^T,   ds = p * (dp - sum(do * o)),   dq = ds k / sqrt(d),   dk = ds^T q / sqrt(d)

Two kernels: one walks over keys and sums dq for a tile of queries, the other walks over queries and sums dk
and dv for a tile of keys. No two programs add to the same number, so the result is deterministic.

Exponentials are of base 2, which is what the hardware has. 1 / log 2 goes into the scale, and the scale into
the exponent, where one instruction multiplies and adds. Products are of the tensors' own type, and sums are
in float32. Masked keys and those beyond the end get the score -inf.

**What makes it fast.** The sizes of the tiles decide how much fast memory and how many registers a program
needs, hence how many programs run at once and hide the latency of memory. The best sizes depend on the GPU,
the head size and the pass, so they stand in a table. Where the lengths are multiples of the tiles, nothing
is masked. Queries, keys and values are read in place, through their strides. The kernel for dq computes the
sum of do * o, since it loads both, and the kernel for dk and dv reads it.

Left out, compared with the attention of big libraries: causal masks, dropout, caches and autotuning. A video
diffusion model sees the whole clip at once; the only mask is one over keys, since prompts in a batch differ
in length. Left out too, though newer GPUs have it: loads by the tensor memory accelerator, and warps that
only load while others compute (FlashAttention-3, arXiv 2407.08608).
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl

    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: numpy in place of a GPU
except ImportError:  # there are two other backends
    triton = None

BACKENDS = ("auto", "eager", "sdpa", "triton")
HEAD_DIMS = (32, 64, 128)  # what the kernel can do
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(q, k, v, mask=None, backend="auto"):
    """Scaled dot-product attention ("Attention Is All You Need", arXiv 1706.03762, equation 1).

    q (B, heads, N, d), k and v (B, heads, L, d), mask (B, L) bool, True = attend to this key, at least one
    True per row (a row without any has no defined average) -> (B, heads, N, d) in q's dtype.
    Raises ValueError for an unknown backend, and for what `triton` cannot do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "auto":
        slow = q.device.type == "cpu" and v.dtype == torch.bfloat16 and torch.is_grad_enabled()
        backend = "eager" if slow and k.shape[-2] <= 256 else "sdpa"
    if backend == "triton":
        return triton_attention(q, k, v, mask)
    if mask is not None:
        mask = mask[:, None, None, :]  # (B, 1, 1, L)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v  # (B, heads, N, d)


# --------------------------------------------------------------------------------------------------------
# The launch table: how large tiles are, by GPU, pass and head size.

SMALL = {32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 2)}  # fits any GPU and type; not fast
LAUNCHES = {  # head size: queries and keys in a tile, warps (of 32 threads), stages (loads on their way)
    # H100, H200, B200: 227 KiB of shared memory; the fastest without spills of 7 to 12 tried on an H200
    ("sm_90", "forward"): {32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
    ("sm_90", "dq"): {32: (128, 32, 4, 3), 64: (64, 64, 4, 3), 128: (128, 32, 8, 3)},
    ("sm_90", "dkv"): {32: (32, 128, 4, 3), 64: (64, 64, 4, 3), 128: (32, 128, 8, 3)},  # two sums
    # A100, and RTX 30 to 50, which have 99 KiB
    ("sm_80", "forward"): {32: (128, 64, 4, 3), 64: (128, 32, 4, 3), 128: (128, 32, 8, 3)},
    ("sm_80", "dq"): {32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 32, 4, 2)},
    ("sm_80", "dkv"): {32: (64, 64, 4, 3), 64: (32, 64, 4, 3), 128: (64, 64, 8, 2)},
}


def generation(device) -> str:
    """The rows of LAUNCHES for types of 16 bits on this device."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    if major in (9, 10):
        return "sm_90"
    return "sm_80" if major >= 8 else "older"


# As torch.compiler.assume_constant_result would mark it; that import takes a second.
generation._dynamo_marked_constant = True


# --------------------------------------------------------------------------------------------------------
# The kernels. One program makes one tile, of TQ queries or of TK keys, of one head. In the arguments q is a
# pointer, and qb, qh and qn are the distances to the next batch element, head and row.


def launch(part, kernel, q, k, v, mask, *given):
    """Run the kernel of "forward", "dq" or "dkv" on all tiles. `given` are its other tensors."""
    (B, H, N, D), L = q.shape, k.shape[2]
    row = "float32" if q.dtype == torch.float32 else generation(q.device)
    tile_q, tile_k, warps, stages = LAUNCHES.get((row, part), SMALL)[D]
    tiles = triton.cdiv(L, tile_k) if part == "dkv" else triton.cdiv(N, tile_q)
    even = N % tile_q == 0 and L % tile_k == 0  # then no tile reaches beyond the end
    scale = D**-0.5 / math.log(2)  # a constant of the kernels: inductor passes other floats in 64 bits
    sizes = H, N, L, mask is not None, even, D, scale, tile_q, tile_k
    strided = [*(q, *q.stride()[:3]), *(k, *k.stride()[:3]), *(v, *v.stride()[:3])]
    mask = q if mask is None else mask.contiguous()  # without a mask any tensor: it is not read
    kernel[tiles, H, B](*strided, mask, *given, *sizes, num_warps=warps, num_stages=stages)


if triton:

    @triton.jit
    def place(TILE: tl.constexpr):
        """-> this program's first row, head and batch element; in 64 bits, as offsets grow large."""
        first = tl.program_id(0) * TILE
        return first.to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)

    @triton.jit
    def load_tile(matrix, stride, first, N, ROWS: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
        """Rows of a matrix (N, D) from `first` on -> (ROWS, D), with zeros beyond the end."""
        rows = tl.arange(0, ROWS)[:, None]
        places = matrix + tl.cast(first, tl.int64) * stride + rows * stride + tl.arange(0, D)[None, :]
        return tl.load(places, mask=(first + rows < N) | EVEN, other=0.0)  # no mask at all if EVEN

    @triton.jit
    def store_tile(matrix, stride, first, N, tile, EVEN: tl.constexpr):
        """The inverse of `load_tile`, in the matrix's own type."""
        rows = first + tl.arange(0, tile.shape[0])[:, None]
        places = matrix + rows * stride + tl.arange(0, tile.shape[1])[None, :]
        tl.store(places, tile.to(matrix.dtype.element_ty), mask=(rows < N) | EVEN)

    @triton.jit
    def product(a, b):
        """a b, summed in float32; float32 itself is not rounded to TF32."""
        if INTERPRETED:  # numpy has no bfloat16; its products are exact in float32
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def seen_keys(mask, cols, L, MASKED: tl.constexpr, EVEN: tl.constexpr):
        """Which keys of a batch element may be looked at."""
        seen = (cols < L) | EVEN
        return tl.load(mask + cols, mask=seen, other=0) != 0 if MASKED else seen

    @triton.jit
    def forward_kernel(
        q, qb, qh, qn, k, kb, kh, kn, v, vb, vh, vn, mask, out, log_sums, H, N, L,
        MASKED: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
        TQ: tl.constexpr, TK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries -> their outputs, and log2 of the sums of their exponentials."""
        first, head, batch = place(TQ)
        queries = load_tile(q + batch * qb + head * qh, qn, first, N, TQ, D, EVEN)
        most = tl.full([TQ], -1e30, tl.float32)  # finite, so that -inf - most is no nan
        total = tl.zeros([TQ], tl.float32)
        summed = tl.zeros([TQ, D], tl.float32)
        for start in range(0, L, TK):
            keys = load_tile(k + batch * kb + head * kh, kn, start, L, TK, D, EVEN)
            seen = seen_keys(mask + batch * L, start + tl.arange(0, TK), L, MASKED, EVEN)
            scores = tl.where(seen[None, :], product(queries, tl.trans(keys)), float("-inf"))
            larger = tl.maximum(most, tl.max(scores, 1) * SCALE)
            weights = tl.exp2(scores * SCALE - larger[:, None])  # one multiply-add: scaling costs nothing
            shrink = tl.exp2(most - larger)
            values = load_tile(v + batch * vb + head * vh, vn, start, L, TK, D, EVEN)
            total = total * shrink + tl.sum(weights, 1)
            summed = summed * shrink[:, None] + product(weights.to(values.dtype), values)
            most = larger
        store_tile(out + (batch * N * H + head) * D, H * D, first, N, summed / total[:, None], EVEN)
        store_tile(log_sums + (batch * H + head) * N, 1, first, N, (most + tl.log2(total))[:, None], EVEN)

    @triton.jit
    def dq_kernel(
        q, qb, qh, qn, k, kb, kh, kn, v, vb, vh, vn, mask, out, do, log_sums, deltas, dq, H, N, L,
        MASKED: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
        TQ: tl.constexpr, TK: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries -> their gradient, by a walk over the keys; and delta, for the next kernel."""
        first, head, batch = place(TQ)
        queries = load_tile(q + batch * qb + head * qh, qn, first, N, TQ, D, EVEN)
        here = (batch * N * H + head) * D
        slopes = load_tile(do + here, H * D, first, N, TQ, D, EVEN)
        outputs = load_tile(out + here, H * D, first, N, TQ, D, EVEN)
        delta = tl.sum(slopes.to(tl.float32) * outputs.to(tl.float32), 1)[:, None]
        store_tile(deltas + (batch * H + head) * N, 1, first, N, delta, EVEN)
        log_sum = load_tile(log_sums + (batch * H + head) * N, 1, first, N, TQ, 1, EVEN)
        summed = tl.zeros([TQ, D], tl.float32)
        for start in range(0, L, TK):
            keys = load_tile(k + batch * kb + head * kh, kn, start, L, TK, D, EVEN)
            values = load_tile(v + batch * vb + head * vh, vn, start, L, TK, D, EVEN)
            seen = seen_keys(mask + batch * L, start + tl.arange(0, TK), L, MASKED, EVEN)
            scores = tl.where(seen[None, :], product(queries, tl.trans(keys)), float("-inf"))
            p = tl.exp2(scores * SCALE - log_sum)
            ds = p * (product(slopes, tl.trans(values)) - delta)
            summed += product(ds.to(keys.dtype), keys)
        store_tile(dq + here, H * D, first, N, summed * D**-0.5, EVEN)

    @triton.jit
    def dkv_kernel(
        q, qb, qh, qn, k, kb, kh, kn, v, vb, vh, vn, mask, do, log_sums, deltas, dk, dv, H, N, L,
        MASKED: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
        TQ: tl.constexpr, TK: tl.constexpr,
    ):  # fmt: skip
        """A tile of keys -> the gradients of keys and values, by a walk over the queries. p and ds are
        transposed, (keys, queries), so that they are the left factors of their products."""
        first, head, batch = place(TK)
        keys = load_tile(k + batch * kb + head * kh, kn, first, L, TK, D, EVEN)
        values = load_tile(v + batch * vb + head * vh, vn, first, L, TK, D, EVEN)
        summed_k, summed_v = tl.zeros([TK, D], tl.float32), tl.zeros([TK, D], tl.float32)
        for start in range(0, N, TQ):
            queries = load_tile(q + batch * qb + head * qh, qn, start, N, TQ, D, EVEN)
            log_sum = load_tile(log_sums + (batch * H + head) * N, 1, start, N, TQ, 1, EVEN)
            p = tl.exp2(product(keys, tl.trans(queries)) * SCALE - tl.trans(log_sum))
            slopes = load_tile(do + (batch * N * H + head) * D, H * D, start, N, TQ, D, EVEN)
            summed_v += product(p.to(slopes.dtype), slopes)  # slopes beyond the end are zero
            delta = load_tile(deltas + (batch * H + head) * N, 1, start, N, TQ, 1, EVEN)
            ds = p * (product(values, tl.trans(slopes)) - tl.trans(delta))
            summed_k += product(ds.to(queries.dtype), queries)
        cols = first + tl.arange(0, TK)  # no sum mixes keys, so it is enough to hide them here
        seen = seen_keys(mask + batch * L, cols, L, MASKED, EVEN)[:, None]
        here = (batch * L * H + head) * D
        store_tile(dk + here, H * D, first, L, tl.where(seen, summed_k * D**-0.5, 0.0), EVEN)
        store_tile(dv + here, H * D, first, L, tl.where(seen, summed_v, 0.0), EVEN)


class TritonAttention(torch.autograd.Function):
    """The kernels as a function of torch, with a gradient. Inputs as `attention`, all of one type; they need
    not be contiguous. Results lie in memory as (B, N, heads, d), as the linear maps before and after do."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        """-> (B, heads, N, d)."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, H, N, D = q.shape
        out, log_sums = q.new_empty(B, N, H, D), q.new_empty(B, H, N, dtype=torch.float32)
        launch("forward", forward_kernel, q, k, v, mask, out, log_sums)
        ctx.save_for_backward(q, k, v, mask, out, log_sums)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        """The gradient of the output -> those of q, k, v, and of the mask, which has none."""
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        do = do.transpose(1, 2).contiguous()  # as `out`; it comes so from a linear map
        deltas, dq = torch.empty_like(log_sums), torch.empty_like(out)
        launch("dq", dq_kernel, q, k, v, mask, out, do, log_sums, deltas, dq)
        dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (k, v))  # (B, L, heads, d)
        launch("dkv", dkv_kernel, q, k, v, mask, do, log_sums, deltas, dk, dv)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


def triton_attention(q, k, v, mask=None):
    """As `attention`, by the kernel; under autocast in its type. CUDA allows B and heads up to 65,535 each.
    Raises ValueError for what it cannot do."""
    if triton is None:
        raise ValueError("the backend triton needs the package triton: pip install triton")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if q.shape[-1] not in HEAD_DIMS or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"the backend triton is for heads of {HEAD_DIMS} channels in float32, bfloat16 or float16, "
            f"not for {q.shape[-1]} in {', '.join(str(x.dtype)[6:] for x in (q, k, v))}"
        )
    if q.device.type == "cpu" and not INTERPRETED.value:
        raise ValueError("the backend triton needs a GPU, or TRITON_INTERPRET=1 to run it in numpy, slowly")
    return TritonAttention.apply(q, k, v, mask)


def main():
    """Check the backends against each other: `python attention.py`; the kernel as well where there is a GPU,
    and in numpy by `TRITON_INTERPRET=1 python attention.py`."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = triton and (device == "cuda" or INTERPRETED.value)
    q, k, v = (torch.randn(2, 4, n, 32, dtype=torch.float64, device=device) for n in (100, 70, 70))
    mask = torch.arange(70, device=device) < torch.tensor([[70], [7]], device=device)

    def run(dtype, backend):
        """-> the output and the gradients of q, k and v, in float64."""
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, mask, backend)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out) + out.detach())
        return [x.detach().double() for x in (out, *gradients)]

    truth = run(torch.float64, "eager")
    print(f"relative errors against eager in float64, on {device}:  output    dq       dk       dv")
    for dtype in (torch.float32, torch.bfloat16):
        for backend in ("eager", "sdpa", *(["triton"] if runs else [])):
            errors = [(a - b).norm() / b.norm() for a, b in zip(run(dtype, backend), truth, strict=True)]
            print(f"{backend:6} {str(dtype)[6:]:9}", " " * 31, "  ".join(f"{e:.1e}" for e in errors))
    if not runs:
        print("the kernel needs a GPU, or, to run in numpy, TRITON_INTERPRET=1; in both cases triton")


if __name__ == "__main__":
    from machine import run_command

    run_command(main)
