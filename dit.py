"""A video diffusion transformer (DiT), from pixels to pixels.

The network sees a noisy clip, a time and a prompt, and predicts the clean clip:

    x_t (B, 3, T, H, W) --patchify--> tokens (B, N, D) --blocks--> tokens --unpatchify--> clean clip (B, 3, T,
    H, W)

**Tokens.** A patch is a little box of `patch_time` frames by `patch_size` x `patch_size` pixels, flattened
and embedded by one linear map. There is no VAE: at toy resolution pixels are few enough, and predicting the
clean clip rather than noise or velocity makes pixels workable for a plain transformer (JiT, arXiv
2511.13720): the clean clip lies on a low-dimensional manifold that a narrow network can represent, noise does
not.

**Block** (figure 2 of ModelGrow, arXiv 2412.18966, with the second cross-attention absent before growth):

    x = x + gate * self_attention(modulate(x))          all tokens of space and time at once
    x = x + gate * cross_attention(modulate(x), text)   what the prompt says
    x = x + gate * cross_attention(modulate(x), llm)    only if llm_dim > 0
    x = x + gate * mlp(modulate(x))

`modulate(x) = norm(x) * (1 + scale) + shift`; shift, scale and gate are linear in the embedded time (adaLN-
zero of DiT, arXiv 2212.09748, one map per block). The gate is the **only** zero factor of a branch: at the
start it is zero and the output projection is not. Growth relies on that: zero one factor and the branch is
silent but learns; zero two and it is dead for ever.

**Positions.** Rotary, in 3-D: the pairs of a head's channels are split between time, height and width, and
rotated by position times frequency, so that q k^T depends on differences. Rotations say nothing about where a
*single* token is, so fixed sines and cosines of its place are added once after the embedding (a sky is
above); this code has the channels of one head and repeats from head to head. Neither has parameters, so a
model runs at any number of frames and any size, and neither changes when heads are added.

**Norms have no parameters**: LayerNorm on tokens, RMSNorm on each head of q and k (qk-norm). Scale and shift
come from adaLN anyway, and without per-channel parameters the width can be doubled exactly (grow.py).

**Adapters.** If lora_rank > 0 each linear map of attention and MLP has a low-rank one beside it (LoRA, arXiv
2106.09685): W x + B A x, A (rank, in) random, B (out, rank) zero at first. The usual factor alpha / rank is
left out; it is a learning rate.

Left out, compared with Open-Sora's STDiT, Latte or Wan: the VAE, split spatial and temporal attention (full
attention is affordable here), adaLN-single, dropout, and any form of registry or base class.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention import attention

TIME_DIM = 128  # sines and cosines of t; with 256 the loss near t = 1, rarely drawn, grew during training


def check_shape(config: "DiTConfig", frames: int, size: int):
    """Raise ValueError unless a clip of `frames` x `size` x `size` can be cut into patches."""
    for name, value, patch in (("frames", frames, config.patch_time), ("size", size, config.patch_size)):
        if value < 1 or value % patch:
            raise ValueError(f"{name} is {value}; this model needs a positive multiple of {patch}")
    if frames * size**2 > 2**28:
        raise ValueError(f"{frames} frames of {size} x {size} are more pixels than a clip may have, {2**28}")


@dataclass(frozen=True)
class DiTConfig:
    """What a model is. Sizes are in pixels, frames and channels."""

    frames: int = 8  # of a training clip; other numbers can be sampled
    size: int = 32  # height and width of a training clip
    patch_time: int = 4  # frames per patch: neighbours in time are nearly equal
    patch_size: int = 4  # pixels per patch side: twice of it is faster by far, and blocky
    width: int = 128  # channels of a token, D
    depth: int = 4  # blocks
    heads: int = 4  # of attention; width / heads channels each
    mlp_ratio: int = 4  # hidden channels of the MLP over width
    text_dim: int = 384  # channels of the text encoder's features (MiniLM: 384)
    llm_dim: int = 0  # channels of the LLM's features; 0: no LLM branch
    lora_rank: int = 0  # of the adapters on attention and MLP; 0: none
    llm_refiner: int = 0  # blocks that let the LLM's features look at each other

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("llm_dim", "lora_rank", "llm_refiner") else 1
            most = 1024 if field.name in ("depth", "heads", "mlp_ratio", "llm_refiner") else 65536
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{field.name} is {value!r}; it must be a whole number from {least} to {most}"
                )
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        check_shape(self, self.frames, self.size)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: 3 colours x frames x pixels."""
        return 3 * self.patch_time * self.patch_size**2

    def tokens(self, frames: int = 0, size: int = 0) -> int:
        """Tokens N of a clip, by default of a training clip."""
        return (frames or self.frames) // self.patch_time * ((size or self.size) // self.patch_size) ** 2

    def flops(self, text_length: int, llm_length: int = 0) -> int:
        """Floating-point operations of a forward pass on one training clip: two per multiplication in a
        matrix product, nothing else counted. Prompts of L tokens each."""
        N, D, R = self.tokens(), self.width, self.mlp_ratio
        contexts = [(text_length, self.text_dim)] + ([(llm_length, self.llm_dim)] if self.llm_dim else [])

        def linear(tokens, a, b):
            return tokens * (a * b + self.lora_rank * (a + b))

        block = linear(N, D, 3 * D) + 2 * N * N * D + linear(N, D, D)  # self-attention
        block += sum(2 * linear(N, D, D) + linear(L, D, 2 * D) + 2 * N * L * D for L, _ in contexts)
        block += linear(N, D, R * D) + linear(N, R * D, D)  # MLP
        block += D * 3 * D * (2 + len(contexts))  # adaLN
        embed = 2 * N * self.patch_dim * D + sum(L * (dim + D) * D for L, dim in contexts)
        embed += (TIME_DIM + 3 * D) * D
        L = llm_length if self.llm_dim else 0
        refiner = linear(L, D, 3 * D) + 2 * L * L * D + linear(L, D, D) + 6 * D * D
        refiner += linear(L, D, R * D) + linear(L, R * D, D)
        return 2 * (self.depth * block + embed + (self.llm_refiner * refiner if L else 0))


PRESETS: dict[str, DiTConfig] = {
    "nano": DiTConfig(patch_time=2, patch_size=8, width=128, depth=4, heads=4),  # study and tests
    "tiny": DiTConfig(patch_size=4, width=128, depth=4, heads=4),  # the default on CPU
    "small": DiTConfig(
        frames=16, size=64, patch_time=2, patch_size=4, width=384, depth=12, heads=6
    ),  # one GPU
    "base": DiTConfig(
        frames=16, size=64, patch_time=2, patch_size=4, width=768, depth=12, heads=12
    ),  # one GPU
}


def rms_norm(x):
    """Divide by the root mean square over the last axis, in x's type; no parameters."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)


def layer_norm(x):
    """Mean 0 and variance 1 over the last axis; no parameters."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x, shift, scale):
    """LayerNorm, then scale and shift by time: x (B, N, D), shift and scale (B, 1, D) -> (B, N, D), in their
    type: 16 bits under autocast, as of the matrix product that comes next."""
    return layer_norm(x).to(scale.dtype) * (1 + scale) + shift


def grid_positions(t, h, w, device):
    """-> (N, 3) float: the place (t, y, x) of each token in a grid of t x h x w patches, in the tokens'
    order."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (t, h, w)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def sincos(positions, dim, highest_period=10_000.0):
    """Sines and cosines of positions (...,) at dim/2 frequencies (arXiv 1706.03762, section 3.5)
    -> (..., dim). Periods run from 2 pi up to 2 pi times `highest_period`."""
    half = dim // 2
    frequencies = highest_period ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.unsqueeze(-1).float() * frequencies
    return F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, dim - 2 * half))


def rope_angles(positions, head_dim):
    """positions (N, 3) -> cos, sin, each (N, head_dim/2). Of the channel pairs a quarter turns with time,
    the rest with height and width, half each; periods run from 2 pi patches up to 100 times that."""
    pairs = head_dim // 2
    split = [pairs // 4, (pairs - pairs // 4) // 2]
    split.append(pairs - sum(split))
    angle = []
    for axis, n in enumerate(split):
        frequencies = 100.0 ** (-torch.arange(n, device=positions.device, dtype=torch.float32) / max(n, 1))
        angle.append(positions[:, axis : axis + 1] * frequencies)  # (N, n)
    angle = torch.cat(angle, -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864): turn pair (i, i + d/2) of x (..., N, d) by its angle."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Linear(nn.Linear):
    """A linear map, and if `rank` > 0 its adapter: W x + bias + B A x."""

    def __init__(self, width_in, width_out, rank=0):
        super().__init__(width_in, width_out)
        self.lora_a = nn.Parameter(torch.empty(rank, width_in)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(width_out, rank)) if rank else None

    def forward(self, x):
        """(..., width_in) -> (..., width_out)."""
        y = super().forward(x)
        return y if self.lora_a is None else y + F.linear(F.linear(x, self.lora_a), self.lora_b)


class SelfAttention(nn.Module):
    """All tokens of a clip look at each other."""

    def __init__(self, width, heads, rank):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, rank)
        self.proj = Linear(width, width, rank)

    def forward(self, x, rope=None, mask=None):
        """x (B, N, D), rope from `rope_angles`, or None for tokens without a place; mask (B, N) -> (B, N,
        D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        qk, v = qkv.contiguous().split((2, 1))  # products are faster on what lies in order
        qk = rms_norm(qk)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k, v = *qk, *v
        return self.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, N, D)


class CrossAttention(nn.Module):
    """Tokens of the clip look at tokens of the prompt."""

    def __init__(self, width, heads, rank):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, rank)
        self.kv = Linear(width, 2 * width, rank)
        self.proj = Linear(width, width, rank)

    def forward(self, x, context, mask):
        """x (B, N, D), context (B, L, D), mask (B, L) -> (B, N, D)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k, v = (
            self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # 2 x (B, heads, L, d)
        return self.proj(attention(rms_norm(q), rms_norm(k), v, mask).transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two linear maps with a GELU between, for each token alone."""

    def __init__(self, width_in, hidden, width_out, rank=0):
        super().__init__()
        self.up = Linear(width_in, hidden, rank)
        self.down = Linear(hidden, width_out, rank)

    def forward(self, x):
        """(..., width_in) -> (..., width_out)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text (and to the LLM), MLP; each branch modulated and gated
    by time."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D, heads, rank = config.width, config.heads, config.lora_rank
        self.attn = SelfAttention(D, heads, rank)
        self.cross = CrossAttention(D, heads, rank)
        self.mlp = MLP(D, config.mlp_ratio * D, D, rank)
        self.adaln = nn.Linear(D, 9 * D)  # (shift, scale, gate) of attn, cross and mlp, in this order
        self.cross_llm = CrossAttention(D, heads, rank) if config.llm_dim else None
        self.adaln_llm = nn.Linear(D, 3 * D) if config.llm_dim else None  # its own, since it comes later

    def forward(self, x, c, rope, text, text_mask, llm=None, llm_mask=None):
        """x (B, N, D), c (B, D) embedded time, text and llm (B, L, D) with masks (B, L) -> (B, N, D)."""
        branches = [lambda h: self.attn(h, rope), lambda h: self.cross(h, text, text_mask), self.mlp]
        modulation = list(self.adaln(c).unflatten(-1, (3, 3, 1, -1)).unbind(1))  # each (B, 3, 1, D)
        if self.cross_llm is not None:
            branches.insert(2, lambda h: self.cross_llm(h, llm, llm_mask))
            modulation.insert(2, self.adaln_llm(c).unflatten(-1, (3, 1, -1)))
        for branch, (shift, scale, gate) in zip(branches, (m.unbind(1) for m in modulation), strict=True):
            x = x + gate * branch(modulate(x, shift, scale))
        return x


class Refiner(nn.Module):
    """A block in front of the LLM branch. A causal LLM hides later words from earlier ones; here they all
    meet (LI-DiT, arXiv 2406.11831). Its gates start at zero: at first it passes the features on."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.width
        self.attn = SelfAttention(D, config.heads, config.lora_rank)
        self.mlp = MLP(D, config.mlp_ratio * D, D, config.lora_rank)
        self.adaln = nn.Linear(D, 6 * D)

    def forward(self, x, c, mask):
        """x (B, L, D), c (B, D), mask (B, L) -> (B, L, D)."""
        modulation = self.adaln(c).unflatten(-1, (2, 3, 1, -1)).unbind(1)
        for branch, (shift, scale, gate) in zip(
            (lambda h: self.attn(h, mask=mask), self.mlp), (m.unbind(1) for m in modulation), strict=True
        ):
            x = x + gate * branch(modulate(x, shift, scale))
        return x


class DiT(nn.Module):
    """The video diffusion transformer. `DiT(config)` has zero gates and a zero output: it predicts grey."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # set by train.py
        D = config.width
        self.patch_embed = nn.Linear(config.patch_dim, D)
        self.time_embed = MLP(TIME_DIM, D, D)
        self.text_embed = MLP(config.text_dim, D, D)
        self.llm_embed = MLP(config.llm_dim, D, D) if config.llm_dim else None
        self.refiner = nn.ModuleList(
            Refiner(config) for _ in range(config.llm_refiner if config.llm_dim else 0)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_adaln = nn.Linear(D, 2 * D)  # shift and scale before the output
        self.final = nn.Linear(D, config.patch_dim)
        self.initialise()

    def initialise(self):
        """Xavier for every linear map, zero for biases, adaLN maps, the output and the second half of
        adapters. Fails on an unknown parameter."""
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("bias", "lora_b") or "adaln" in name or name == "final.weight":
                nn.init.zeros_(parameter)
            elif kind in ("weight", "lora_a") and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                raise ValueError(f"no rule to initialise {name}")

    def forward(self, x_t, t, text, text_mask, llm=None, llm_mask=None):
        """Predict the clean clip.

        x_t (B, 3, T, H, W), a mix of noise and a clip in [-1, 1]; t (B,) in [0, 1], 1 = clean; text (B, L,
        text_dim) and text_mask (B, L) bool, True = a real token; llm and llm_mask alike, (B, L', llm_dim),
        needed by a model with llm_dim > 0 and no other -> (B, 3, T, H, W).
        """
        config = self.config
        if (llm is not None) != (config.llm_dim > 0):
            raise ValueError(
                f"this model has llm_dim {config.llm_dim}: {'give' if config.llm_dim else 'it takes no'} llm"
            )
        x, grid = patchify(x_t, config)  # (B, N, patch_dim)
        positions = grid_positions(*grid, x.device)  # (N, 3)
        head_dim = config.width // config.heads
        place = [sincos(positions[:, i], n, 100.0) for i, n in enumerate(split_in_3(head_dim))]
        x = self.patch_embed(x) + torch.cat(place, -1).repeat(1, config.heads).to(x.dtype)  # (B, N, D)
        c = F.silu(self.time_embed(sincos(1000 * t, TIME_DIM).to(x.dtype)))  # (B, D)
        rope = rope_angles(positions, head_dim)
        text = layer_norm(self.text_embed(layer_norm(text.to(x.dtype))))  # (B, L, D)
        if llm is not None:
            llm = self.llm_embed(layer_norm(llm.to(x.dtype)))  # (B, L', D)
            for block in self.refiner:
                llm = block(llm, c, llm_mask)
            llm = layer_norm(llm)
        for block in self.blocks:
            given = x, c, rope, text, text_mask, llm, llm_mask
            if self.checkpoint_activations and torch.is_grad_enabled():  # keep x only, compute the rest again
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)  # (B, N, D)
        shift, scale = self.final_adaln(c).unsqueeze(1).chunk(2, -1)  # (B, 1, D) each
        return unpatchify(self.final(modulate(x, shift, scale)), config, grid)


def split_in_3(channels):
    """Three even numbers that add up to `channels`, an even number, the first taking what is over."""
    third = channels // 6 * 2
    return channels - 2 * third, third, third


def patchify(x, config):
    """(B, 3, T, H, W) -> tokens (B, N, 3 * pt * ps * ps) in order t, y, x, and the grid (T / pt, H / ps, W
    / ps)."""
    pt, ps = config.patch_time, config.patch_size
    B, C, T, H, W = x.shape
    check_shape(config, T, H)
    check_shape(config, T, W)
    grid = (T // pt, H // ps, W // ps)
    x = x.view(B, C, grid[0], pt, grid[1], ps, grid[2], ps).permute(
        0, 2, 4, 6, 1, 3, 5, 7
    )  # (B, t, h, w, C, pt, ps, ps)
    return x.reshape(B, math.prod(grid), -1), grid


def unpatchify(x, config, grid):
    """The inverse of `patchify`."""
    pt, ps = config.patch_time, config.patch_size
    x = x.unflatten(-1, (3, pt, ps, ps)).unflatten(1, grid)  # (B, t, h, w, C, pt, ps, ps)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # (B, C, t, pt, h, ps, w, ps)
    return x.reshape(x.shape[0], 3, grid[0] * pt, grid[1] * ps, grid[2] * ps)


def count_flops(model, lengths) -> int:
    """Floating-point operations of a training step on one clip with prompts of `lengths` tokens, forward and
    backward, as torch counts them on tensors without data. Frozen weights have no gradient to compute."""
    config = model.config
    with torch.device("meta"):
        ghost = DiT(config)
    for mine, other in zip(ghost.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(other.requires_grad)
    x = torch.empty(1, 3, config.frames, config.size, config.size, device="meta")
    prompt = []
    for length, dim in zip(lengths, (config.text_dim, config.llm_dim), strict=False):
        mask = torch.ones(1, length, dtype=torch.bool, device="meta")
        prompt += [torch.empty(1, length, dim, device="meta"), mask]
    with FlopCounterMode(display=False) as counter:
        ghost(x, torch.empty(1, device="meta"), *prompt).sum().backward()
    return counter.get_total_flops()


def main():
    """Print the presets: `python dit.py`."""
    row = "{:6}  {:>6}  {:>4}  {:5}  {:>5}  {:>5}  {:>5}  {:>6}  {:>10}  {}"
    titles = ("preset", "frames", "size", "patch", "width", "depth", "heads", "tokens", "parameters")
    print(row.format(*titles, "GFLOPs per clip, forward"))
    for name, c in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DiT(c).parameters())
        patch = f"{c.patch_time}x{c.patch_size}x{c.patch_size}"
        sizes = c.frames, c.size, patch, c.width, c.depth, c.heads, c.tokens(), f"{parameters / 1e6:.1f} M"
        print(row.format(name, *sizes, f"{c.flops(text_length=16) / 1e9:.2f}"))


if __name__ == "__main__":
    main()
