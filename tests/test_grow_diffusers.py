"""Growth of diffusers checkpoints: the same bits for every class, and errors in one line.

Every parameter of the tiny models is random, also those that diffusers initializes to zero, so that each
branch and each gate acts.
"""

import pytest
import torch
from safetensors.torch import load_file

from conftest import randomize
from grow_diffusers import REFUSED, RULES, grow
from proof_diffusers import INPUTS, largest_difference, load, random_inputs

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 3,
}
IMAGE = {"image_dim": 6, "added_kv_proj_dim": 24, "pos_embed_seq_len": 4}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}
LATTE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "cross_attention_dim": 16,
    "attention_bias": True,
    "sample_size": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 8,
    "video_length": 2,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    **HEADS,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_size": 4,
}
ALLEGRO = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "cross_attention_dim": 48,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 2,
    "caption_channels": 8,
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    **HEADS,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 8),
    "extra_pos_embed_type": None,
    "concat_padding_mask": False,  # it would need torchvision
}
LTX = {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24, "num_layers": 3}
ANIMATE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 3,
    "mmdit_layers": 3,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "sample_width": 4,
    "sample_height": 4,
}
HUNYUAN15 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "text_embed_2_dim": 8,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    **HEADS,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 4),
    "guidance_embeds": True,
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 8,
    "model_dim": 24,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}
FRAMEPACK = {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}

CONFIGS = {
    "wan": ("WanTransformer3DModel", WAN),
    "wan-i2v": ("WanTransformer3DModel", {**WAN, **IMAGE}),
    "skyreels": ("SkyReelsV2Transformer3DModel", WAN),
    "chronoedit": ("ChronoEditTransformer3DModel", {**WAN, **IMAGE}),
    "ltx": ("LTXVideoTransformer3DModel", {**LTX, "caption_channels": 8}),
    "allegro": ("AllegroTransformer3DModel", ALLEGRO),
    "cosmos": ("CosmosTransformer3DModel", COSMOS),
    "sana": ("SanaVideoTransformer3DModel", SANA),
    "latte": ("LatteTransformer3DModel", LATTE),
    "cogvideox": ("CogVideoXTransformer3DModel", COG),
    "cogvideox-rotary": ("CogVideoXTransformer3DModel", {**COG, "use_rotary_positional_embeddings": True}),
    "easyanimate": ("EasyAnimateTransformer3DModel", ANIMATE),
    "hunyuan": ("HunyuanVideoTransformer3DModel", HUNYUAN),
    "hunyuan-i2v": ("HunyuanVideoTransformer3DModel", {**HUNYUAN, "image_condition_type": "token_replace"}),
    "framepack": ("HunyuanVideoFramepackTransformer3DModel", FRAMEPACK),
    "hunyuan15": ("HunyuanVideo15Transformer3DModel", HUNYUAN15),
    "flux": ("FluxTransformer2DModel", FLUX),
    "kandinsky": ("Kandinsky5Transformer3DModel", KANDINSKY),
}
GATED = ("cogvideox", "easyanimate", "hunyuan", "hunyuan-i2v", "framepack", "hunyuan15", "flux", "kandinsky")


def tiny(family, seed=0):
    """A random model of a family."""
    name, config = CONFIGS[family]
    return randomize(getattr(diffusers, name)(**config), seed).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a family to the folder of its tiny model, which no test may change."""
    root = tmp_path_factory.mktemp("models")

    def folder(family, dtype=torch.float32):
        path = root / f"{family}-{dtype}"
        if not path.exists():
            tiny(family).to(dtype).save_pretrained(path)
        return path

    return folder


def test_gate_and_proj_rules_cover_every_class():
    """Each class with a rule has a tiny model and inputs; no class is both grown and refused."""
    assert {name for name, _ in CONFIGS.values()} == RULES.keys() == INPUTS.keys()
    assert not RULES.keys() & REFUSED.keys()
    for name in RULES.keys() | REFUSED.keys():
        assert hasattr(diffusers, name)


def output_of(model):
    """What a model computes on random inputs."""
    with torch.no_grad():
        return model(**random_inputs(model), return_dict=False)[0]


def contiguous_start(model):
    """SanaVideo's first block gets a transposed view. In bfloat16 a layer rounds differently on it."""

    def hook(block, positional, named):
        return (positional[0].contiguous(), *positional[1:]), named

    model.transformer_blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_growth_keeps_every_bit(family, dtype, folders, tmp_path):
    """Insert, prefix and suffix, with zero projections and zero gates, after the checkpoint is loaded."""
    fix = contiguous_start if family == "sana" else torch.nn.Module.eval
    folder = folders(family, dtype)
    expected = output_of(fix(load(folder)))
    assert expected.abs().max() > 0.1 and expected.dtype == dtype
    runs = [(where, None) for where in ("insert", "prefix", "suffix")]
    if family in GATED:
        runs.append(("insert", "gate"))
    if family == "latte":
        runs.remove(("prefix", None))
    for where, zero in runs:
        out = tmp_path / f"{where}-{zero}"
        summary = grow(folder, out, 2, where, zero)
        grown = fix(load(out))
        assert len(summary.new) == (4 if family == "latte" else 2)
        assert (output_of(grown) - expected).abs().max() == 0, (where, zero)
        assert {p.dtype for p in grown.parameters()} == {p.dtype for p in load(folder).parameters()}


def tensors_of(folder):
    """All tensors of a folder, by name."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def is_zero(tensors, name):
    """Whether all entries of a linear map are zero."""
    return all(not tensor.any() for key, tensor in tensors.items() if key.startswith(f"{name}."))


def test_only_the_named_tensors_are_zero(folders, tmp_path):
    """A copy differs from its block in the zeros alone, and the type of every tensor stays."""
    base = tensors_of(folders("hunyuan", torch.bfloat16))
    for zero in ("proj", "gate"):
        grow(folders("hunyuan", torch.bfloat16), tmp_path / zero, [1, 0], "suffix", zero)
        grown = tensors_of(tmp_path / zero)
        for name, tensor in base.items():
            assert torch.equal(grown[name], tensor) and grown[name].dtype == tensor.dtype
        changed = set()
        for name in grown.keys() - base.keys():
            assert name.startswith("transformer_blocks.2.")
            if not torch.equal(grown[name], base[name.replace(".2.", ".1.", 1)]):
                changed.add(name.removeprefix("transformer_blocks.2.").rpartition(".")[0])
        assert changed == set(getattr(RULES["HunyuanVideoTransformer3DModel"][0], zero))
        assert is_zero(grown, "transformer_blocks.2.attn.to_add_out") == (zero == "proj")
    gates = grown["transformer_blocks.2.norm1.linear.bias"].view(6, -1)
    assert [bool(rows.any()) for rows in gates] == [True, True, False, True, True, False]


def test_half_precision_stays(folders, tmp_path):
    """float16 goes through too."""
    grow(folders("ltx", torch.float16), tmp_path / "grown", 2)
    assert largest_difference(folders("ltx", torch.float16), tmp_path / "grown")[0] == 0
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "grown").values()} == {torch.float16}
