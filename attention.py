"""Attention by hand, and once more as a Triton kernel.

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v

Three lines, and everything a transformer knows about space, time and language goes through them: each query
asks all keys, the softmax turns the answers into weights that sum to one, and the values are averaged with
those weights. The scale 1/sqrt(d) keeps the variance of q k^T at one when the entries of q and k have
variance one.

Three backends compute the same function. `eager` is the maths, written out; it stores the (N, L) matrix of
weights, which costs memory quadratic in the number of tokens and is the way to read. `sdpa` is torch's fused
`scaled_dot_product_attention`. `triton` is the kernel below, for a GPU. `auto` is `sdpa`; but with gradients
in bfloat16 on a CPU and no more than 256 keys it is `eager`, since the backward of the fused one is slow
there (`python -m lab.bench attention` compares them).

**The kernel** (FlashAttention-2, arXiv 2307.08691) never stores the matrix. Fast memory on the chip holds a
*tile* of a few dozen queries, or keys, at a time. A program takes one tile of queries and walks over the
keys, tile by tile, with three running values per query: the largest score m so far, the sum l of
exp(score - m), and the sum of the values weighted by exp(score - m). When a larger m turns up, what was
summed is multiplied by exp(m_old - m_new): the online softmax. At the end the last one over l is the result,
and m + log l is kept, one number per query.

**Its backward** needs the weights again, and recomputes them: with that number p = exp(score - m - log l) is
one exponential, cheaper than reading N x L weights from slow memory. With o the output and do its gradient,

    dv = p^T do,   dp = do v^T,   ds = p * (dp - sum(do * o)),   dq = ds k / sqrt(d),   dk = ds^T q / sqrt(d)

Two kernels: one walks over keys and sums dq for a tile of queries, the other walks over queries and sums dk
and dv for a tile of keys. Nobody adds to what somebody else adds to, so the result is the same each time.

Exponentials are of base 2, which is what the hardware has; 1 / log 2 goes into the scale. Products are of
the tensors' own type, and sums in float32. Masked keys and those beyond the end get the score -inf.

Unlike the attention of big libraries there is no causal mask, no dropout, no cache, no tuning of tiles by
trial, and inputs are made contiguous instead of passing strides: a video diffusion model sees the whole clip
at once. The only mask is one over keys, since prompts in a batch have different lengths.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # there are two other backends
    triton = None

BACKENDS = ("auto", "eager", "sdpa", "triton")
HEAD_DIMS = (32, 64, 128)  # what the kernel can do
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(q, k, v, mask=None, backend="auto"):
    """Scaled dot-product attention ("Attention Is All You Need", arXiv 1706.03762, equation 1).

    q (B, heads, N, d), k and v (B, heads, L, d), mask (B, L) bool, True = this key may be looked at, at least
    one True per row (a row without any has no defined average) -> (B, heads, N, d) in q's dtype.
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
# The kernel. A tensor (B, heads, N, d) is B * heads matrices (N, d) in a row; a program works in one of them.


def tile_size(dtype, head_dim) -> int:
    """Queries or keys that a program holds at a time: as many as fit the registers of its threads."""
    return 64 if dtype.itemsize == 2 else 32 if head_dim < 128 else 16


LAUNCH = {"num_warps": 8, "num_stages": 2}  # 256 threads; the next tile is loaded while this one is computed

if triton:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: numpy in place of a GPU
    LOG2_E = tl.constexpr(1.4426950408889634)  # a constant: torch.compile would pass a float in 64 bits

    @triton.jit
    def load_tile(tensor, head, rows, N, D: tl.constexpr):
        """Some rows of matrix `head` of a contiguous (B * heads, N, D) -> (rows, D), zeros beyond the end."""
        places = head.to(tl.int64) * N * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        return tl.load(tensor + places, mask=rows[:, None] < N, other=0.0)

    @triton.jit
    def store_tile(tensor, head, rows, N, D: tl.constexpr, tile):
        """The inverse of `load_tile`, in the tensor's own type."""
        places = head.to(tl.int64) * N * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(tensor + places, tile.to(tensor.dtype.element_ty), mask=rows[:, None] < N)

    @triton.jit
    def product(a, b):
        """a b, summed in float32; float32 itself is not rounded to TF32."""
        if INTERPRETED:  # numpy has no bfloat16; its products are exact in float32
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def score_tile(q, k, mask, head, cols, H, L, MASKED: tl.constexpr):
        """q (n, D), k (l, D) -> (n, l), scores times log2(e); -inf for keys that must not be looked at."""
        SCALE: tl.constexpr = q.shape[1] ** -0.5 * LOG2_E
        seen = cols < L
        if MASKED:
            seen = tl.load(mask + (head // H).to(tl.int64) * L + cols, mask=seen, other=0) != 0
        return tl.where(seen[None, :], product(q, tl.trans(k)) * SCALE, float("-inf"))

    @triton.jit
    def forward_kernel(
        q, k, v, mask, out, log_sums, H, N, L,
        MASKED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries -> their outputs, and log2 of the sums of their exponentials."""
        head = tl.program_id(1)
        rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
        queries = load_tile(q, head, rows, N, D)
        most = tl.full([TILE], -1e30, tl.float32)  # finite, so that -inf - most is no nan
        total = tl.zeros([TILE], tl.float32)
        summed = tl.zeros([TILE, D], tl.float32)
        for start in range(0, L, TILE):
            cols = start + tl.arange(0, TILE)
            keys, values = load_tile(k, head, cols, L, D), load_tile(v, head, cols, L, D)
            scores = score_tile(queries, keys, mask, head, cols, H, L, MASKED)
            larger = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - larger[:, None])
            shrink = tl.exp2(most - larger)
            total = total * shrink + tl.sum(weights, 1)
            summed = summed * shrink[:, None] + product(weights.to(values.dtype), values)
            most = larger
        store_tile(out, head, rows, N, D, summed / total[:, None])
        tl.store(log_sums + head.to(tl.int64) * N + rows, most + tl.log2(total), mask=rows < N)

    @triton.jit
    def slope_tile(
        q, k, v, do, log_sums, deltas, mask, head, rows, cols, H, N, L, MASKED: tl.constexpr
    ):  # fmt: skip
        """Tiles q, do (n, D) and k, v (l, D) -> the weights p (n, l) and ds (n, l) of the formulas above."""
        inside, places = rows < N, head.to(tl.int64) * N + rows
        log_sum = tl.load(log_sums + places, mask=inside, other=float("inf"))  # no weight beyond the end
        delta = tl.load(deltas + places, mask=inside, other=0.0)
        p = tl.exp2(score_tile(q, k, mask, head, cols, H, L, MASKED) - log_sum[:, None])
        return p, p * (product(do, tl.trans(v)) - delta[:, None])

    @triton.jit
    def dq_kernel(
        q, k, v, mask, do, log_sums, deltas, dq, H, N, L,
        MASKED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """A tile of queries -> their gradient: a walk over the keys."""
        head = tl.program_id(1)
        rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
        queries, slopes = load_tile(q, head, rows, N, D), load_tile(do, head, rows, N, D)
        summed = tl.zeros([TILE, D], tl.float32)
        for start in range(0, L, TILE):
            cols = start + tl.arange(0, TILE)
            keys, values = load_tile(k, head, cols, L, D), load_tile(v, head, cols, L, D)
            _, ds = slope_tile(
                queries, keys, values, slopes, log_sums, deltas, mask,
                head, rows, cols, H, N, L, MASKED,
            )  # fmt: skip
            summed += product(ds.to(keys.dtype), keys)
        store_tile(dq, head, rows, N, D, summed * D**-0.5)

    @triton.jit
    def dkv_kernel(
        q, k, v, mask, do, log_sums, deltas, dk, dv, H, N, L,
        MASKED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """A tile of keys -> the gradients of keys and values: a walk over the queries."""
        head = tl.program_id(1)
        cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
        keys, values = load_tile(k, head, cols, L, D), load_tile(v, head, cols, L, D)
        summed_k, summed_v = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
        for start in range(0, N, TILE):
            rows = start + tl.arange(0, TILE)
            queries, slopes = load_tile(q, head, rows, N, D), load_tile(do, head, rows, N, D)
            p, ds = slope_tile(
                queries, keys, values, slopes, log_sums, deltas, mask,
                head, rows, cols, H, N, L, MASKED,
            )  # fmt: skip
            summed_v += product(tl.trans(p.to(slopes.dtype)), slopes)
            summed_k += product(tl.trans(ds.to(queries.dtype)), queries)
        store_tile(dk, head, cols, L, D, summed_k * D**-0.5)
        store_tile(dv, head, cols, L, D, summed_v)


class TritonAttention(torch.autograd.Function):
    """The kernels as a function of torch, with a gradient. Inputs as `attention`, all of one type."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        """-> (B, heads, N, d)."""
        B, H, N, D = q.shape
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        bytes_ = q.new_empty(0, dtype=torch.uint8) if mask is None else mask.contiguous().to(torch.uint8)
        out, log_sums = torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)
        tile = tile_size(q.dtype, D)
        ctx.how = H, N, k.shape[2], mask is not None, D, tile
        forward_kernel[triton.cdiv(N, tile), B * H](q, k, v, bytes_, out, log_sums, *ctx.how, **LAUNCH)
        ctx.save_for_backward(q, k, v, bytes_, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        """The gradient of the output -> those of q, k, v, and of the mask, which has none."""
        q, k, v, mask, out, log_sums = ctx.saved_tensors
        B, H, N, D = q.shape
        do, tile = do.contiguous(), tile_size(q.dtype, D)
        deltas = (do.float() * out.float()).sum(-1)  # (B, H, N)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = q, k, v, mask, do, log_sums, deltas
        dq_kernel[triton.cdiv(N, tile), B * H](*given, dq, *ctx.how, **LAUNCH)
        dkv_kernel[triton.cdiv(k.shape[2], tile), B * H](*given, dk, dv, *ctx.how, **LAUNCH)
        return dq, dk, dv, None


def triton_attention(q, k, v, mask=None):
    """As `attention`, by the kernel; under autocast in its type. Raises ValueError for what it cannot do."""
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
    main()
