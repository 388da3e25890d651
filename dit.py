"""A video diffusion transformer (DiT), from pixels to pixels.

The network sees a noisy clip, a timestep and a prompt, and predicts the clean clip:

    x_t (B, 3, T, H, W)  --patchify-->    tokens (B, N, D)
                         --blocks-->      tokens (B, N, D)
                         --unpatchify-->  clean clip (B, 3, T, H, W)

**Tokens.** A patch is a small box of `patch_time` frames by `patch_size` x `patch_size` pixels, flattened and
embedded by one linear map. There is no VAE: at toy resolution pixels are few enough. The network predicts the
clean clip and not noise or velocity (JiT, arXiv 2511.13720): clean clips lie on a low-dimensional manifold
that a narrow network can represent, noise does not.

**Block** (ModelGrow, arXiv 2412.18966, figure 2; the second cross-attention is absent before growth):

    x = x + gate * self_attention(modulate(x))          all tokens of space and time at once
    x = x + gate * cross_attention(modulate(x), text)   the prompt, as the small text encoder reads it
    x = x + gate * cross_attention(modulate(x), llm)    the prompt, as the LLM reads it; only if llm_dim > 0
    x = x + gate * mlp(modulate(x))

with modulate(x) = norm(x) * (1 + scale) + shift. Shift, scale and gate are linear in the embedded timestep
(adaLN-zero of DiT, arXiv 2212.09748, one map per block). The gate is the **only** zero factor of a branch: at
the start it is zero and the output projection is not. Growth relies on this: a branch with one zero factor
adds nothing, but it gets a gradient and learns; a branch with two zero factors gets no gradient, ever.

**Timestep.** Sines and cosines of 1000 t, then an MLP. DiT's frequencies are made for the 1000 timesteps of
DDPM (arXiv 2006.11239), and 1000 t brings t to that scale. A slower embedding, of 20 t, had the same loss and
drew fewer prompts right (docs/choices.md).

**Positions.** Rotary, in 3-D: the channel pairs of a head are split between time, height and width, and are
rotated by position times frequency, so that q k^T depends on differences of positions. A rotation does not
say where a *single* token is, so fixed sines and cosines of its position are added once, after the patch
embedding (`head_dim` channels, repeated for every head). Neither has parameters: any number of frames and
any size can be sampled, and nothing changes when heads are added.

**Norms have no parameters**: LayerNorm on tokens, RMSNorm on each head of q and k (qk-norm). Scale and shift
come from adaLN, and the width can be doubled exactly (grow.py).

**Types.** Under autocast (machine.py) linear maps and attention run in bfloat16. The residual stream x stays
float32: `patch_embed` gives bfloat16, the float32 position embedding makes it float32, and `x + gate *
branch` adds bfloat16 to float32. LayerNorm computes in float32; `modulate` casts to the type of the shift,
bfloat16, as the next product would, and c is bfloat16. Without autocast all has the type of the input.

**Adapters.** If lora_rank > 0, every linear map of attention and MLP has a low-rank one beside it (LoRA,
arXiv 2106.09685): W x + B A x, with A random and B zero at first, without the usual factor alpha / rank.

Left out, compared with Open-Sora's STDiT, Latte or Wan: the VAE, separate spatial and temporal attention
(full attention is affordable here), adaLN-single, dropout, and any registry or base class.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention

TIME_SCALE = 1000  # radians per unit of t of the fastest sine of the timestep
TIME_DIM = 128  # sines and cosines of t; with 256 the loss near t = 1, rarely drawn, grew during training
ROPE_PERIOD = 100.0  # rotations fall from 1 radian per patch to a little more than 1 / ROPE_PERIOD
MOST_PIXELS = 2**28  # of a clip; a checkpoint from elsewhere may ask for anything

# --------------------------------------------------------------------------------------------------------
# Configuration


def check_shape(config: "DiTConfig", frames: int, size: int):
    """Raise ValueError unless a clip of `frames` x `size` x `size` can be cut into patches."""
    for name, value, patch in (("frames", frames, config.patch_time), ("size", size, config.patch_size)):
        if value < 1 or value % patch:
            raise ValueError(f"{name} is {value}; this model needs a positive multiple of {patch}")
    if frames * size**2 > MOST_PIXELS:
        raise ValueError(f"{frames} frames of {size} x {size} are more pixels than a clip may have")


@dataclass(frozen=True)
class DiTConfig:
    """What a model is. Sizes are in pixels, frames and channels. Raises ValueError for impossible ones."""

    frames: int = 8  # T of a training clip; other numbers can be sampled
    size: int = 32  # H and W of a training clip
    patch_time: int = 4  # frames per patch: neighbours in time are nearly equal
    patch_size: int = 4  # pixels per patch side: twice as many is much faster, and blocky
    width: int = 128  # channels of a token, D
    depth: int = 4  # blocks
    heads: int = 4  # attention heads, with width / heads channels each
    mlp_ratio: int = 4  # hidden channels of the MLP over width
    text_dim: int = 384  # channels of the text encoder's features (MiniLM: 384)
    llm_dim: int = 0  # channels of the LLM's features; 0: no LLM branch
    lora_rank: int = 0  # rank of the adapters on attention and MLP; 0: none

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("llm_dim", "lora_rank") else 1
            most = 1024 if field.name in ("depth", "heads", "mlp_ratio") else 65536
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{field.name} is {value!r}; it must be an integer from {least} to {most}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        check_shape(self, self.frames, self.size)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: 3 colours x frames x pixels."""
        return 3 * self.patch_time * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    def tokens(self) -> int:
        """Number of tokens N of a training clip."""
        return (self.frames // self.patch_time) * (self.size // self.patch_size) ** 2


PRESETS: dict[str, DiTConfig] = {
    # for the study; for two CPU cores (the default); for one GPU; for one GPU and patience
    "nano": DiTConfig(frames=8, size=32, patch_time=2, patch_size=8, width=128, depth=4, heads=4),
    "tiny": DiTConfig(frames=8, size=32, patch_time=4, patch_size=4, width=128, depth=4, heads=4),
    "small": DiTConfig(frames=16, size=64, patch_time=2, patch_size=4, width=384, depth=12, heads=6),
    "base": DiTConfig(frames=16, size=64, patch_time=2, patch_size=4, width=768, depth=12, heads=12),
}

# --------------------------------------------------------------------------------------------------------
# Maths


def rms_norm(x):
    """Divide by the root mean square over the last axis, in x's type; no parameters."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)


def layer_norm(x):
    """Mean 0 and variance 1 over the last axis; no parameters."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x, shift, scale):
    """LayerNorm, then scale and shift: x (B, N, D), shift and scale (B, 1, D) -> (B, N, D) in their type."""
    return layer_norm(x).to(scale.dtype) * (1 + scale) + shift


def grid_positions(t, h, w, device):
    """-> (N, 3) float: the position (t, y, x) of each token in a grid of t x h x w patches, in token
    order."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (t, h, w)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def sincos(positions, dim, max_period):
    """Cosines and sines of positions (...,) at dim/2 frequencies (arXiv 1706.03762, section 3.5): from 1 down
    to nearly 1 / max_period radians per unit -> (..., dim), the last channel zero if dim is odd."""
    half = dim // 2
    exponents = -torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angle = positions.unsqueeze(-1).float() * max_period**exponents
    return F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, dim - 2 * half))


def position_embedding(positions, head_dim):
    """positions (N, 3) -> (N, head_dim): sines and cosines of t, y and x, about a third of the channels
    each."""
    third = head_dim // 6 * 2  # even, since sines and cosines come in pairs
    channels = (head_dim - 2 * third, third, third)
    parts = [sincos(positions[:, axis], n, ROPE_PERIOD) for axis, n in enumerate(channels)]
    return torch.cat(parts, -1)


def rope_cos_sin(positions, head_dim):
    """positions (N, 3) -> cos and sin of the rotary angles, each (N, head_dim / 2). A quarter of the channel
    pairs turns with time, the rest with height and width, half each."""
    pairs = head_dim // 2
    in_time = pairs // 4
    in_height = (pairs - in_time) // 2
    angles = []
    for axis, n in enumerate((in_time, in_height, pairs - in_time - in_height)):
        exponents = -torch.arange(n, device=positions.device, dtype=torch.float32) / max(n, 1)
        angles.append(positions[:, axis : axis + 1] * ROPE_PERIOD**exponents)  # (N, n)
    angle = torch.cat(angles, -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864): turn pair (i, i + d/2) of x (..., N, d) by its angle."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# --------------------------------------------------------------------------------------------------------
# Layers


class LoRALinear(nn.Linear):
    """A linear map, and if `rank` > 0 its adapter: W x + bias + B A x."""

    def __init__(self, width_in, width_out, rank=0):
        super().__init__(width_in, width_out)
        self.lora_a = nn.Parameter(torch.empty(rank, width_in)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(width_out, rank)) if rank else None

    def forward(self, x):
        """(..., width_in) -> (..., width_out)."""
        y = super().forward(x)
        if self.lora_a is None:
            return y
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b)


class SelfAttention(nn.Module):
    """All tokens of a clip attend to each other."""

    def __init__(self, width, heads, rank):
        super().__init__()
        self.heads = heads
        self.backend = "auto"  # see attention.py; `set_attention` changes it
        self.qkv = LoRALinear(width, 3 * width, rank)
        self.proj = LoRALinear(width, width, rank)

    def forward(self, x, rope):
        """x (B, N, D), rope from `rope_cos_sin` -> (B, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        if x.device.type == "cpu":
            qkv = qkv.contiguous()  # products are faster in order; the kernels of a GPU take views
        qk, v = qkv.split((2, 1))  # q and k are normalized and turned as one tensor
        q, k = rotate(rms_norm(qk), *rope)
        out = attention(q, k, v[0], backend=self.backend)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class CrossAttention(nn.Module):
    """Tokens of the clip attend to tokens of the prompt."""

    def __init__(self, width, heads, rank):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.q = LoRALinear(width, width, rank)
        self.kv = LoRALinear(width, 2 * width, rank)
        self.proj = LoRALinear(width, width, rank)

    def forward(self, x, context, mask):
        """x (B, N, D), context (B, L, D), mask (B, L) bool, True = a real token -> (B, N, D)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        kv = self.kv(context).unflatten(-1, (2, self.heads, -1))  # (B, L, 2, heads, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        out = attention(rms_norm(q), rms_norm(k), v, mask, self.backend)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


def set_attention(model: nn.Module, backend: str):
    """Let every attention of the model use a backend of attention.py."""
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.backend = backend


class MLP(nn.Module):
    """Two linear maps with a GELU between, for each token alone."""

    def __init__(self, width_in, hidden, width_out, rank=0):
        super().__init__()
        self.up = LoRALinear(width_in, hidden, rank)
        self.down = LoRALinear(hidden, width_out, rank)

    def forward(self, x):
        """(..., width_in) -> (..., width_out)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text and to the LLM, MLP; each branch is modulated and gated by
    the timestep."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D, heads, rank = config.width, config.heads, config.lora_rank
        self.attn = SelfAttention(D, heads, rank)
        self.cross = CrossAttention(D, heads, rank)
        self.mlp = MLP(D, config.mlp_ratio * D, D, rank)
        self.adaln = nn.Linear(D, 9 * D)  # shift, scale, gate of attn, then of cross, then of mlp
        self.cross_llm = CrossAttention(D, heads, rank) if config.llm_dim else None
        self.adaln_llm = nn.Linear(D, 3 * D) if config.llm_dim else None  # a map of its own: it comes later

    def forward(self, x, c, rope, text, text_mask, llm=None, llm_mask=None):
        """x (B, N, D); c (B, D), the embedded timestep; text and llm (B, L, D) with masks (B, L) -> (B, N,
        D)."""
        modulation = self.adaln(c).unsqueeze(1).chunk(9, -1)  # 9 x (B, 1, D)
        shift_a, scale_a, gate_a, shift_t, scale_t, gate_t, shift_m, scale_m, gate_m = modulation
        x = x + gate_a * self.attn(modulate(x, shift_a, scale_a), rope)
        x = x + gate_t * self.cross(modulate(x, shift_t, scale_t), text, text_mask)
        if self.cross_llm is not None:
            shift_l, scale_l, gate_l = self.adaln_llm(c).unsqueeze(1).chunk(3, -1)
            x = x + gate_l * self.cross_llm(modulate(x, shift_l, scale_l), llm, llm_mask)
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))


# --------------------------------------------------------------------------------------------------------
# The network


class DiT(nn.Module):
    """The video diffusion transformer. `DiT(config)` has zero gates and a zero output: it predicts grey."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.width
        self.config = config
        self.checkpoint_activations = False  # train.py sets it: recompute blocks in the backward pass
        self.patch_embed = nn.Linear(config.patch_dim, D)
        self.time_embed = MLP(TIME_DIM, D, D)
        self.text_embed = MLP(config.text_dim, D, D)
        self.llm_embed = MLP(config.llm_dim, D, D) if config.llm_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_adaln = nn.Linear(D, 2 * D)  # shift and scale before the output
        self.final = nn.Linear(D, config.patch_dim)
        self.initialize()

    def initialize(self):
        """Xavier for every linear map; zero for biases, adaLN maps, the output and the second half of
        adapters. Raises ValueError for a parameter that has no rule."""
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("bias", "lora_b") or "adaln" in name or name == "final.weight":
                nn.init.zeros_(parameter)
            elif kind in ("weight", "lora_a") and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                raise ValueError(f"no rule to initialize {name}")

    def forward(self, x_t, t, text, text_mask, llm=None, llm_mask=None):
        """Predict the clean clip.

        x_t (B, 3, T, H, W), a mix of noise and a clip in [-1, 1]; t (B,) in [0, 1], 1 = clean; text (B, L,
        text_dim) and text_mask (B, L) bool, True = a real token; llm and llm_mask alike, (B, L', llm_dim),
        for a model with llm_dim > 0 and no other -> (B, 3, T, H, W).
        """
        config = self.config
        if (llm is not None) != (config.llm_dim > 0):
            raise ValueError(
                f"this model has llm_dim {config.llm_dim}; llm was{' not' * (llm is None)} given"
            )
        dtype = x_t.dtype  # of the residual stream
        x, grid = patchify(x_t, config)  # (B, N, patch_dim)
        positions = grid_positions(*grid, x.device)  # (N, 3)
        rope = rope_cos_sin(positions, config.head_dim)  # 2 x (N, d / 2)
        pos_embed = position_embedding(positions, config.head_dim).repeat(1, config.heads)  # (N, D)
        x = self.patch_embed(x) + pos_embed.to(dtype)  # (B, N, D)
        c = sincos(TIME_SCALE * t, TIME_DIM, max_period=10_000)  # (B, TIME_DIM)
        c = F.silu(self.time_embed(c.to(dtype)))  # (B, D)
        text = layer_norm(self.text_embed(layer_norm(text.to(dtype))))  # (B, L, D)
        if llm is not None:
            llm = layer_norm(self.llm_embed(layer_norm(llm.to(dtype))))  # (B, L', D)
        for block in self.blocks:
            inputs = x, c, rope, text, text_mask, llm, llm_mask
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)  # keeps x, computes the rest again
            else:
                x = block(*inputs)  # (B, N, D)
        shift, scale = self.final_adaln(c).unsqueeze(1).chunk(2, -1)  # 2 x (B, 1, D)
        return unpatchify(self.final(modulate(x, shift, scale)), config, grid)  # (B, 3, T, H, W)


def patchify(x, config):
    """(B, 3, T, H, W) -> tokens (B, N, 3 * pt * ps * ps) in order t, y, x, and the grid (T/pt, H/ps,
    W/ps)."""
    pt, ps = config.patch_time, config.patch_size
    B, C, T, H, W = x.shape
    check_shape(config, T, H)
    check_shape(config, T, W)
    t, h, w = T // pt, H // ps, W // ps
    x = x.view(B, C, t, pt, h, ps, w, ps)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, t, h, w, C, pt, ps, ps)
    return x.reshape(B, t * h * w, config.patch_dim), (t, h, w)


def unpatchify(x, config, grid):
    """The inverse of `patchify`: tokens (B, N, patch_dim) and the grid -> (B, 3, T, H, W)."""
    pt, ps = config.patch_time, config.patch_size
    t, h, w = grid
    x = x.unflatten(-1, (3, pt, ps, ps)).unflatten(1, grid)  # (B, t, h, w, C, pt, ps, ps)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # (B, C, t, pt, h, ps, w, ps)
    return x.reshape(x.shape[0], 3, t * pt, h * ps, w * ps)
