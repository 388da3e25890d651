"""Attention by hand.

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v

Three lines, and everything a transformer knows about space, time and language goes through them: each query
asks all keys, the softmax turns the answers into weights that sum to one, and the values are averaged with
those weights. The scale 1/sqrt(d) keeps the variance of q k^T at one when the entries of q and k have
variance one.

Two backends compute the same function. `eager` is the maths, written out; it stores the (N, L) matrix of
weights, which costs memory quadratic in the number of tokens and is the way to read. `sdpa` is torch's fused
`scaled_dot_product_attention`, which never stores the matrix: it walks over blocks of keys with a running
maximum and a running sum (the online softmax of FlashAttention, arXiv 2205.14135). `auto` is `sdpa` on a GPU
and `eager` on a CPU, where batched matrix products over a few hundred tokens beat the fused loop and above
all its backward.

Unlike the attention of big libraries there is no causal mask, no dropout and no cache: a video diffusion
model sees the whole clip at once. The only mask is one over keys, since prompts in a batch have different
lengths.
"""

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "eager", "sdpa")


def attention(q, k, v, mask=None, backend="auto"):
    """Scaled dot-product attention ("Attention Is All You Need", arXiv 1706.03762, equation 1).

    q (B, heads, N, d), k and v (B, heads, L, d), mask (B, L) bool, True = this key may be looked at, at least
    one True per row (a row without any has no defined average) -> (B, heads, N, d) in q's dtype.
    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend is called {backend!r}; there are {', '.join(BACKENDS)}")
    if mask is not None:
        mask = mask[:, None, None, :]  # (B, 1, 1, L)
    if backend == "auto":
        backend = "eager" if q.device.type == "cpu" else "sdpa"
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v  # (B, heads, N, d)


def main():
    """Check the backends against each other: `python attention.py`."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 32, dtype=torch.float64) for n in (48, 20, 20))
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    truth = attention(q, k, v, mask, "eager")
    for dtype in (torch.float32, torch.bfloat16):
        for backend in ("eager", "sdpa"):
            out = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, backend)
            error = ((out.double() - truth).norm() / truth.norm()).item()
            print(f"{backend:6} {str(dtype)[6:]:9} relative error against eager float64: {error:.1e}")


if __name__ == "__main__":
    main()
