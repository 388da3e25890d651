"""Growth of diffusers checkpoints: the same bits for every class, and errors in one line.

Every parameter of the tiny models is random, also those that diffusers initializes to zero, so that each
branch and each gate acts.
"""

import errno
import importlib
import inspect
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_docs import ROOT, code_blocks

import command_diffusers
import grow as grow_module
import grow_diffusers
from conftest import random_model, randomize
from grow_diffusers import REFUSED, RULES, grow, is_diffusers, moved, tree_of
from proof_diffusers import INPUTS, largest_difference, load, outputs_of, random_inputs
from run import load_checkpoint, save_model

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
HELIOS = {**WAN, "rope_dim": (4, 4, 4)}
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
COG_I2V = {**COG, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
COG_I2V["sample_width"] = 12
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
    "concat_padding_mask": False,  # else it needs torchvision
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
KANDINSKY6 = {**KANDINSKY, "in_audio_dim": 4, "out_audio_dim": 4, "model_dim_a": 12, "axes_dims_a": (4, 4, 4)}
K6_RELEASED = {"ca_rope": True, "cross_gates": True, "fix_modulation": True}  # as in the released models
KANDINSKY6_SR = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 8,
    "model_dim": 24,
    "ff_dim": 16,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}
MINIMAX = {
    **HEADS,
    "hidden_size": 16,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "ffn_dim": 16,
    "in_channels": 4,
    "audio_in_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "time_embed_hidden_dim": 8,
    "time_embed_dim": 8,
    "rope_freq_dim": 2,
}
JOY = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 8,
    "num_layers": 3,
    "rope_dim_list": [4, 4, 4],
}
REFINER = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
    "caption_channels": 8,
    "num_layers": 3,
}
OMNI = {
    "head_dim": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "latent_channel": 4,
    "patch_latent_dim": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rope_axes_dim": (2, 2, 2),
    "vocab_size": 16,
}
OMNI_SOUND = {"sound_gen": True, "sound_dim": 4, "action_gen": True, "action_dim": 3}
NEMOTRON = {"hidden_act": "relu2", "qk_norm_for_text": False, "use_und_k_norm_for_gen": True}
FRAMEPACK = {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}

CONFIGS = {
    "wan": ("WanTransformer3DModel", WAN),
    "wan-i2v": ("WanTransformer3DModel", {**WAN, **IMAGE}),
    "skyreels": ("SkyReelsV2Transformer3DModel", WAN),
    "skyreels-df": ("SkyReelsV2Transformer3DModel", {**WAN, "inject_sample_info": True}),
    "chronoedit": ("ChronoEditTransformer3DModel", {**WAN, **IMAGE}),
    "anyflow": ("AnyFlowTransformer3DModel", WAN),
    "anyflow-far": ("AnyFlowFARTransformer3DModel", WAN),
    "helios": ("HeliosTransformer3DModel", HELIOS),
    "ltx": ("LTXVideoTransformer3DModel", {**LTX, "caption_channels": 8}),
    "allegro": ("AllegroTransformer3DModel", ALLEGRO),
    "cosmos": ("CosmosTransformer3DModel", COSMOS),
    "sana": ("SanaVideoTransformer3DModel", SANA),
    "latte": ("LatteTransformer3DModel", LATTE),
    "cogvideox": ("CogVideoXTransformer3DModel", COG),
    "cogvideox-rotary": ("CogVideoXTransformer3DModel", {**COG, "use_rotary_positional_embeddings": True}),
    "cogvideox-i2v": ("CogVideoXTransformer3DModel", COG_I2V),
    "easyanimate": ("EasyAnimateTransformer3DModel", ANIMATE),
    "easyanimate-inpaint": ("EasyAnimateTransformer3DModel", {**ANIMATE, "in_channels": 13}),
    "hunyuan": ("HunyuanVideoTransformer3DModel", HUNYUAN),
    "hunyuan-i2v": ("HunyuanVideoTransformer3DModel", {**HUNYUAN, "image_condition_type": "token_replace"}),
    "framepack": ("HunyuanVideoFramepackTransformer3DModel", FRAMEPACK),
    "hunyuan15": ("HunyuanVideo15Transformer3DModel", HUNYUAN15),
    "flux": ("FluxTransformer2DModel", FLUX),
    "kandinsky": ("Kandinsky5Transformer3DModel", KANDINSKY),
    "kandinsky6": ("Kandinsky6Transformer3DModel", {**KANDINSKY6, **K6_RELEASED}),
    "kandinsky6-plain": ("Kandinsky6Transformer3DModel", KANDINSKY6),
    "kandinsky6-sr": ("Kandinsky6SRTransformer3DModel", KANDINSKY6_SR),
    "minimax": ("MiniMaxH3Transformer3DModel", MINIMAX),
    "joyimage": ("JoyImageEditTransformer3DModel", JOY),
    "joyimage-plus": ("JoyImageEditPlusTransformer3DModel", JOY),
    "refiner": ("SanaWMLTX2RefinerTransformer3DModel", REFINER),
    "refiner-split": ("SanaWMLTX2RefinerTransformer3DModel", {**REFINER, "rope_type": "split"}),
    "omni": ("Cosmos3OmniTransformer", OMNI),
    "omni-sound": ("Cosmos3OmniTransformer", {**OMNI, **OMNI_SOUND}),
    "omni-nemotron": ("Cosmos3OmniTransformer", {**OMNI, **NEMOTRON}),
}
GATED = (
    "cogvideox",
    "easyanimate",
    "easyanimate-inpaint",
    "hunyuan",
    "hunyuan-i2v",
    "framepack",
    "hunyuan15",
    "flux",
    "kandinsky",
)
GATED += ("kandinsky6-sr", "minimax")
FP32_OUTPUT = ("minimax",)  # from_pretrained keeps its last layers in float32


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
    classes = importlib.import_module("diffusers.models.transformers")
    others = {"WanModel", "HunyuanVideoTransformer3DModelPacked"}  # which are not of diffusers
    for name in RULES.keys() | REFUSED.keys() - others:
        assert hasattr(classes, name)
    for name in dir(classes):  # every video class is named, yes or no
        if "Transformer3D" in name or "Video" in name:
            assert name in RULES or name in REFUSED


@pytest.mark.parametrize("family", ["cogvideox", "latte"])
def test_inputs_are_small(family):
    """Where positions are formulas, whatever the size is that a model was trained with."""
    name, config = CONFIGS[family]
    large = {"sample_size": 64} if family == "latte" else {"sample_width": 90, "sample_height": 60}
    model = getattr(diffusers, name)(**{**config, **large})
    assert random_inputs(model)["hidden_states"].shape[-2:] in [(4, 4), (8, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_growth_keeps_every_bit(family, dtype, folders, tmp_path):
    """Insert, prefix and suffix, with zero projections and zero gates, after the checkpoint is loaded."""
    folder = folders(family, dtype)
    expected = outputs_of(load(folder))
    assert expected.abs().max() > 0.1
    assert expected.dtype == (torch.float32 if family in FP32_OUTPUT else dtype)
    runs = [(where, None) for where in ("insert", "prefix", "suffix")]
    if family in GATED:
        runs.append(("insert", "gate"))
    if family == "latte":
        runs.remove(("prefix", None))
    for where, zero in runs:
        out = tmp_path / f"{where}-{zero}"
        summary = grow(folder, out, 2, where, zero)
        grown = load(out)
        assert len(summary.new) == (4 if family == "latte" else 2)
        assert (outputs_of(grown) - expected).abs().max() == 0, (where, zero)
        assert {p.dtype for p in grown.parameters()} == {p.dtype for p in load(folder).parameters()}


def refiner_with_a_cache(model, first=0):
    """The refiner attends to an earlier block of frames, which every block of the model caches."""
    module = importlib.import_module("diffusers.models.transformers.transformer_sana_wm_refiner")
    cache = module.SanaWMRefinerKVCache(model.config.num_layers)
    inputs = random_inputs(model, first)
    cache.sink_pe = random_inputs(model)["video_rotary_emb"]
    model(**inputs, kv_cache=cache, kv_cache_mode="capture_pre_rope")
    for layer in cache.layer_caches:
        layer.store_sink(*layer.get_captured_pre_rope())
    inputs = random_inputs(model, seed=1)
    return model(**inputs, kv_cache=cache, kv_cache_mode="inject", return_dict=False)[0]


def far_with_a_cache(model, first=0):
    """AnyFlow FAR makes a sixth frame after five that every block of the model caches."""
    c, inputs = model.config, random_inputs(model, first)
    shape = (2, 1, c.num_attention_heads, 64, c.attention_head_dim)
    dtype = inputs["hidden_states"].dtype
    caches = []
    for _ in range(c.num_layers):
        caches.append({name: torch.zeros(shape, dtype=dtype) for name in ("full_cache", "compressed_cache")})
    flag = {"num_cached_chunks": 5, "is_cache_step": True}
    model(**inputs, kv_cache=caches, kv_cache_flag=flag)
    inputs = random_inputs(model, seed=1) | {"chunk_partition": [1] * 6}
    for name in ("hidden_states", "timestep", "r_timestep"):
        inputs[name] = inputs[name][:, :1]
    flag["is_cache_step"] = False
    return model(**inputs, kv_cache=caches, kv_cache_flag=flag, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "run"), [("refiner", refiner_with_a_cache), ("anyflow-far", far_with_a_cache)]
)
@torch.no_grad()
def test_a_copy_keeps_a_cache_of_its_own(family, run, dtype, folders, tmp_path):
    """Insert, prefix and suffix keep every bit of a model with a cache for each block."""
    folder = folders(family, dtype)
    expected = run(load(folder))
    assert (run(load(folder), first=2) - expected).abs().max() > 0.01  # the cache is read
    for where in ("insert", "prefix", "suffix"):
        grow(folder, tmp_path / where, 2, where)
        assert (run(load(tmp_path / where)) - expected).abs().max() == 0, where


def tensors_of(folder):
    """All tensors of a folder, by name."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@torch.no_grad()
def test_a_check_does_not_see_where_a_file_puts_its_tensors(folders, tmp_path):
    """A longer header shifts every tensor, and products with one row round differently at other addresses."""
    shutil.copytree(folders("wan"), tmp_path / "shifted")
    file = tmp_path / "shifted/diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "pad": "x" * 14})  # 24 characters
    headers = [int.from_bytes(f.read_bytes()[:8], "little") for f in (folders("wan") / file.name, file)]
    assert (headers[1] - headers[0]) % 16 == 8
    assert largest_difference(folders("wan"), tmp_path / "shifted")[0] == 0


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


# --------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def sharded(tmp_path):
    """A folder with a tiny Wan model in several shards."""
    tiny("wan").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_shards_give_the_same_tensors(sharded, folders, tmp_path):
    """Sharded and unsharded inputs give the same tensors; each output has the form of its input."""
    grow(folders("wan"), tmp_path / "one", 2)
    grow(sharded, tmp_path / "many", 2)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    index = json.loads((tmp_path / "many/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    largest = max(file.stat().st_size for file in sharded.glob("*.safetensors"))
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 1.2 * largest
    assert largest_difference(folders("wan"), tmp_path / "many")[0] == 0


def test_a_model_grows_twice(folders, tmp_path):
    """A grown model grows again, its history is a tree, and both survive diffusers."""
    grow(folders("flux"), tmp_path / "once", [1, 2], "insert")
    summary = grow(tmp_path / "once", tmp_path / "twice", at=[0, 4, 4])
    assert summary.changed == {"num_layers": [3, 4], "num_single_layers": [5, 7]}
    assert summary.new == [
        "transformer_blocks.1",
        "single_transformer_blocks.2",
        "single_transformer_blocks.3",
    ]
    assert summary.earlier == [
        "transformer_blocks.3",
        "single_transformer_blocks.4",
        "single_transformer_blocks.6",
    ]
    lines = command_diffusers.report(summary)
    assert lines[-2].endswith(f"new numbers: {' '.join(summary.earlier)}")
    lines = command_diffusers.loading_lines(summary, "FluxTransformer2DModel")
    assert '"single_transformer_blocks.6."' in lines[-2]
    load(tmp_path / "twice").save_pretrained(tmp_path / "saved")
    assert largest_difference(folders("flux"), tmp_path / "saved")[0] == 0
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["num_single_layers"] == 7
    assert config["_modelgrow"][0]["new"] == summary.earlier
    lines = tree_of(config).splitlines()
    assert len(lines) == 2 and "num_layers 2 -> 3" in lines[0] and "where at" in lines[1]


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_grows_under_the_usual_names(size, tmp_path):
    """So that from_pretrained finds it without being told of a variant; pickles beside it are not opened."""
    tiny("wan").save_pretrained(tmp_path / "base", variant="fp16", max_shard_size=size)
    (tmp_path / "base/diffusion_pytorch_model.bin").write_text("a pickle")
    grow(tmp_path / "base", tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob("*fp16*"))
    assert largest_difference(tmp_path / "base", tmp_path / "out")[0] == 0
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out")


def test_an_absent_number_has_the_default_of_diffusers(folders, tmp_path):
    """EasyAnimate's mmdit_layers must follow num_layers, also where config.json has only the second."""
    shutil.copytree(folders("easyanimate"), tmp_path / "base")
    file = tmp_path / "base/config.json"
    config = json.loads(file.read_text())
    edit(config, {"mmdit_layers": None})
    file.write_text(json.dumps(config))
    grow(tmp_path / "base", tmp_path / "out", 46)
    assert largest_difference(tmp_path / "base", tmp_path / "out")[0] == 0


def test_other_files_are_copied(folders, tmp_path):
    """All but weights of the model; a pipeline keeps its other parts, and pickles there are not opened."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders("wan"), pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "transformer/README.md").write_text("read me")
    (pipeline / "transformer/diffusion_pytorch_model.bin").write_text("a pickle")
    (pipeline / "transformer/diffusion_pytorch_model.bin.index.json").write_text("{}")
    (pipeline / "transformer/.git").mkdir()
    (pipeline / "transformer/.git/HEAD").touch()
    (pipeline / "text_encoder").mkdir()
    (pipeline / "text_encoder/pytorch_model.bin").write_text("a pickle")
    (pipeline / "vae").mkdir()
    (pipeline / "vae/diffusion_pytorch_model.safetensors").write_text("the weights of another model")
    assert is_diffusers(pipeline) and not is_diffusers(pipeline / "vae") and not is_diffusers(tmp_path)
    summary = grow(pipeline, tmp_path / "out", 1)
    assert summary.folder == tmp_path / "out/transformer"
    files = sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert files == [
        "model_index.json",
        "text_encoder/pytorch_model.bin",
        "transformer/README.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert largest_difference(folders("wan"), summary.folder)[0] == 0


def edit(entries, changes):
    """Change entries of a dictionary in place; None removes one."""
    for name, value in changes.items():
        entries.pop(name, None)
        if value is not None:
            entries[name] = value


def edited(base, folder, changes):
    """A copy of an unsharded model, with other tensors."""
    shutil.copytree(base, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    edit(tensors, changes)
    save_file(tensors, file)


def test_tensors_outside_the_blocks_may_have_any_type(folders, tmp_path):
    """They are copied as they are, empty ones and numbers too, and so is the metadata. A shard that mixes
    types is aligned."""
    extra = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor(0.1, dtype=torch.float64)}
    extra |= {"c": torch.zeros(0, 2), "d": torch.ones(3).to(torch.float8_e4m3fn), "e": torch.tensor([7])}
    shutil.copytree(folders("ltx"), tmp_path / "base")
    (tmp_path / "base/diffusion_pytorch_model.safetensors").rename(tmp_path / "base/2.safetensors")
    save_file(extra, tmp_path / "base/1.safetensors", {"by": "me"})
    weight_map = dict.fromkeys(extra, "1.safetensors")
    weight_map |= dict.fromkeys(load_file(tmp_path / "base/2.safetensors"), "2.safetensors")
    index = tmp_path / "base/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    grow(tmp_path / "base", tmp_path / "out", 1)
    grown = tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "base").items():
        if not name.startswith("transformer_blocks"):
            assert grown[name].dtype == tensor.dtype and torch.equal(grown[name], tensor), name
    for file in (tmp_path / "out").glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        assert header.pop("__metadata__") == {"by": "me", "format": "pt"}
        for name, entry in header.items():
            assert (8 + length + entry["data_offsets"][0]) % grown[name].itemsize == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shard_sizes(tmp_path, dtype):
    """No shard is larger than the largest of the base, and there are not many more of them."""
    tiny("wan").to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    grow(tmp_path / "base", tmp_path / "grown", 2)

    def sizes(folder):
        return [sum(t.nbytes for t in load_file(f).values()) for f in folder.glob("*.safetensors")]

    index = json.loads((tmp_path / "grown/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes(tmp_path / "grown"))
    assert max(sizes(tmp_path / "grown")) <= max(sizes(tmp_path / "base"))
    assert len(sizes(tmp_path / "grown")) <= 2 * len(sizes(tmp_path / "base"))


def test_parameters_are_counted(folders, tmp_path):
    """Before and after, as the models have them."""
    summary = grow(folders("wan"), tmp_path / "out", 1)
    counts = [sum(p.numel() for p in load(f).parameters()) for f in (folders("wan"), tmp_path / "out")]
    assert list(summary.parameters) == counts


def test_a_gate_with_a_bias_alone_is_open(folders, tmp_path):
    """Then the projections of a copy may be zero: it is not dead."""
    shutil.copytree(folders("hunyuan"), tmp_path / "base")
    file = tmp_path / "base/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("norm1.linear.weight", "norm1_context.linear.weight", ".norm.linear.weight")):
            tensors[name].zero_()
    save_file(tensors, file, {"format": "pt"})
    grow(tmp_path / "base", tmp_path / "out", [1, 1], zero="proj")


def test_split_by_size():
    """Lists share copies in proportion."""
    assert grow_diffusers.split(3, [20, 40]) == [1, 2] and grow_diffusers.split(2, [2, 3]) == [0, 2]


# --------------------------------------------------------------------------------------------------------
# Errors, each in one line, and nothing is left behind


def damage(folder, what, changes):
    """Break a sharded checkpoint."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if what == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "absent":
        shard.unlink()
    elif what == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif what == "no index":
        index.unlink()
    elif what == "text":
        (folder / "config.json").write_text(changes)
    elif what == "index":
        entries = json.loads(index.read_text())
        weight_map = entries["weight_map"]
        edit(weight_map, changes)
        if "blocks.9.x" in weight_map:
            weight_map["blocks.9.x"] = shard.name
        index.write_text(json.dumps(entries))
    elif what == "config":
        entries = json.loads((folder / "config.json").read_text())
        edit(entries, changes)
        (folder / "config.json").write_text(json.dumps(entries))


DAMAGES = [
    ("cut", None, "cut off"),
    ("absent", None, "is absent"),
    ("pointer", None, "is a Git LFS pointer: run git lfs pull"),
    ("text", "{", "is not JSON"),
    ("text", "[]", "JSON object"),
    ("index", {"blocks.1.ffn.net.2.bias": None}, "has no entry for blocks.1.ffn.net.2.bias"),
    ("index", {"blocks.0.x": "../x"}, "another folder"),
    ("index", {"blocks.9.x": "a shard"}, "has no tensor blocks.9.x"),
    ("config", {"num_layers": 4}, "num_layers is 4, but the files hold 3 blocks"),
    ("config", {"num_layers": None}, "must have a number num_layers; .* write down how many blocks"),
    ("no index", None, "00001-of-0.*safetensors without a .*index.json: download all files"),
    ("config", {"_class_name": "NewTransformer"}, "no rule for NewTransformer"),
    ("config", {"_class_name": "WanModel"}, "download the -Diffusers repository"),
    ("config", {"_class_name": "HunyuanVideoTransformer3DModelPacked"}, "write that name into config.json"),
    ("config", {"_class_name": "WanVACETransformer3DModel"}, "cannot be grown: .* vace_layers"),
    ("config", {"_class_name": "LatteTransformer3DModel"}, "hold 0 transformer_blocks"),
    ("config", {"_class_name": None}, "has no _class_name"),
    ("config", {"quantization_config": {}}, "quantized"),
    ("config", {"_modelgrow": [{"grow": "depth"}]}, "not a history"),
]


@pytest.mark.parametrize(("what", "changes", "message"), DAMAGES)
def test_a_damaged_folder_is_refused(what, changes, message, sharded, tmp_path):
    """One line, and no output."""
    damage(sharded, what, changes)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        grow(sharded, tmp_path / "out", 1)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["sharded"]


TENSORS = [
    ({"blocks.0.camera.weight": 1, "blocks.1.camera.weight": 1, "blocks.2.camera.weight": 1}, "not know"),
    ({"blocks.1.attn1.norm_z.weight": 1}, "blocks differ: 1 and 0"),
    ({f"blocks.{i}.attn2.to_out.0.weight": None for i in range(3)}, "no attn2.to_out.0.weight"),
    ({"blocks.3.ffn.net.2.bias": 1}, "the files hold 4 blocks"),
]


@pytest.mark.parametrize(("changes", "message"), TENSORS)
def test_blocks_that_the_rule_does_not_know_are_refused(changes, message, folders, tmp_path):
    """A branch that would stay open in a copy is not grown by a guess."""
    changes = {name: value and torch.ones(3) for name, value in changes.items()}
    edited(folders("wan"), tmp_path / "base", changes)
    with pytest.raises(ValueError, match=message):
        grow(tmp_path / "base", tmp_path / "out", 1)


def test_blocks_of_another_type_are_refused(folders, tmp_path):
    """Most of them are quantized."""
    weight = {"blocks.0.ffn.net.2.bias": torch.ones(24).to(torch.float8_e4m3fn)}
    edited(folders("wan"), tmp_path / "base", weight)
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.net\.2\.bias is F8_E4M3: take weights that were"):
        grow(tmp_path / "base", tmp_path / "out", 1)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "old.safetensors.index.json"])
def test_a_second_checkpoint_is_refused(name, sharded, folders, tmp_path):
    """It would not fit the new config, and nothing says which of the two to grow."""
    (sharded / name).write_text("{}")
    with pytest.raises(
        ValueError, match=rf"several checkpoints: move all but one of .*json, .*{name[-12:]} away"
    ):
        grow(sharded, tmp_path / "out", 1)


REQUESTS = [
    ("wan", {"add": 1, "zero": "both"}, "never gets a gradient"),
    ("flux", {"add": 1, "zero": "both"}, "never gets a gradient"),
    ("wan", {"add": 1, "zero": "gate"}, "cannot be grown with zero 'gate'; it can with proj"),
    ("easyanimate", {"add": 1, "zero": "proj"}, "it can with gate"),
    ("latte", {"add": 1, "where": "prefix"}, "prefix"),
    ("wan", {"add": 1, "where": "middle"}, "no stacking"),
    ("wan", {"add": 0}, "nothing to add"),
    ("wan", {"add": -1}, "cannot add"),
    ("wan", {"add": [1, 2]}, "2 numbers of blocks for 1 list"),
    ("wan", {"at": [3]}, "there is no block 3; there are 3"),
    ("wan", {"at": [0], "add": 1}, "not both"),
    ("wan", {}, "how many"),
]


@pytest.mark.parametrize(("family", "request_", "message"), REQUESTS)
def test_a_growth_that_is_not_possible_is_refused(family, request_, message, folders, tmp_path):
    """The reason is given, and no output."""
    with pytest.raises(ValueError, match=message):
        grow(folders(family), tmp_path / "out", **request_)
    assert list(tmp_path.iterdir()) == []


def test_configs_that_cannot_grow_exactly_are_refused():
    """Some classes can be grown with some configs only."""
    cosmos = {"extra_pos_embed_type": None}
    for name, config in (
        ("CosmosTransformer3DModel", {"extra_pos_embed_type": "learnable"}),
        ("CosmosTransformer3DModel", {}),  # diffusers takes "learnable"
        ("CosmosTransformer3DModel", cosmos | {"controlnet_block_every_n": 2}),
        ("EasyAnimateTransformer3DModel", {"num_layers": 3, "mmdit_layers": 2}),
        *((name, {}) for name in REFUSED),
    ):
        with pytest.raises(ValueError, match=f"{name} .*cannot be grown"):
            grow_diffusers.block_lists(name, config)
    assert grow_diffusers.block_lists("CosmosTransformer3DModel", cosmos)


def test_absent_entries_are_what_diffusers_takes():
    diffusers = pytest.importorskip("diffusers")
    for name, conditions in grow_diffusers.CONDITIONS.items():
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        for entry, default, _ in conditions:
            assert parameters[entry].default == default


def test_a_copy_cannot_be_dead(folders, tmp_path):
    """A copy of a copy that was never trained would have zero gates and zero projections."""
    grow(folders("hunyuan"), tmp_path / "proj", [1, 1], "suffix", "proj")
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.attn\.to_out\.0 are zero already"):
        grow(tmp_path / "proj", tmp_path / "out", [1, 1], "suffix", "gate")
    grow(tmp_path / "proj", tmp_path / "other", [1, 1], "prefix", "gate")
    with pytest.raises(ValueError, match=r"gates of transformer_blocks\.0\.norm1\.linear are zero already"):
        grow(tmp_path / "other", tmp_path / "out", at=[0], zero="proj")
    grow(tmp_path / "other", tmp_path / "third", at=[0], zero="gate")
    assert largest_difference(folders("hunyuan"), tmp_path / "third")[0] == 0


def full_disk(*_):
    """write_tensors on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_half_written(folders, tmp_path, monkeypatch):
    """An existing folder stays as it is; a disk that is full, or fills up, leaves nothing."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there already"):
        grow(folders("wan"), tmp_path / "there", 1)
    (tmp_path / "there").rmdir()
    (tmp_path / "there").symlink_to("nowhere")
    with pytest.raises(ValueError, match="there already"):
        grow(folders("wan"), tmp_path / "there", 1)
    with pytest.raises(ValueError, match="name a folder elsewhere"):
        grow(folders("wan"), folders("wan") / "deeper/out", 1)
    with monkeypatch.context() as patch:
        patch.setattr(grow_diffusers, "write_tensors", full_disk)
        with pytest.raises(OSError, match=r"out could not be written: .* No space left"):
            grow(folders("wan"), tmp_path / "out", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"it takes 0\.1 MB, and the disk has 0\.0 MB left"):
        grow(folders("wan"), tmp_path / "out", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_room_for_copied_files_is_needed_too(folders, tmp_path, monkeypatch):
    """A link that leads nowhere is an error with one reason."""
    shutil.copytree(folders("wan"), tmp_path / "base")
    (tmp_path / "base/notes").write_bytes(bytes(10**6))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"it takes 1\.1 MB"):
            grow(tmp_path / "base", tmp_path / "out", 1)
    (tmp_path / "base/link").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"written: \[Errno 2\] No such file or directory: '[^']*link'$"):
        grow(tmp_path / "base", tmp_path / "out", 1)


@pytest.mark.parametrize("name", ["out.new", ".out.new"])
def test_a_folder_with_another_name_stays(name, folders, tmp_path):
    """Growth deletes only what it has made, also if the source has a name like the output's."""
    shutil.copytree(folders("wan"), tmp_path / name)
    grow(tmp_path / name, tmp_path / "out", at=[0])
    assert largest_difference(tmp_path / name, tmp_path / "out")[0] == 0


def test_a_read_only_source_grows(folders, tmp_path):
    """The files and folders of the output have the usual modes, whatever those of the source are."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders("wan"), pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    for path in (*pipeline.rglob("*"), pipeline):
        path.chmod(0o555 if path.is_dir() else 0o444)
    grow(pipeline, tmp_path / "out", 1)
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual/file").touch()
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        usual = tmp_path / ("usual" if path.is_dir() else "usual/file")
        assert path.stat().st_mode == usual.stat().st_mode, path


def test_sigterm_leaves_nothing(folders, tmp_path, monkeypatch):
    """The command takes SIGTERM as Ctrl-C."""

    def terminate(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the process would end"))
    monkeypatch.setattr(grow_diffusers, "split_into_shards", terminate)
    try:
        with pytest.raises(KeyboardInterrupt):
            grow_module.main(f"{folders('wan')} --at 1 --out {tmp_path / 'out'}".split())
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------
# Training


def train(model, steps):
    """Adam on four random batches, the same ones for every model -> the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        output = outputs_of(model, seed=step % 4)
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step % 4))
        loss = (output - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def has_gradient(parameter):
    """Whether any entry has one."""
    return parameter.grad is not None and bool(parameter.grad.any())


LEARNERS = [(family, "proj") for family in ("wan", "ltx", "sana", "latte", "cogvideox", "hunyuan", "flux")]
LEARNERS += [(family, "proj") for family in ("kandinsky6", "minimax", "joyimage", "refiner", "omni")]
LEARNERS += [(family, "gate") for family in ("cogvideox", "hunyuan", "flux", "kandinsky", "minimax")]
TEXT_ENDS = ("joyimage", "omni")  # nothing reads the text after their last block, so a copy of it learns less


@pytest.mark.parametrize(("family", "zero"), LEARNERS)
def test_every_new_parameter_learns_by_the_second_step(family, zero, folders, tmp_path):
    """Wherever a block of the base has a gradient, its copy has one in the second step."""
    add = [1, 1] if family in ("hunyuan", "flux") else 1
    at = None
    if family in TEXT_ENDS:
        add, at = None, [0]
    summary = grow(folders(family), tmp_path / "grown", add, zero=zero, at=at)
    grown = load(tmp_path / "grown")
    train(grown, 2)
    parameters = dict(grown.named_parameters())
    checked = 0
    for block in summary.new:
        lists, _, number = block.partition(".")
        for name, parameter in grown.get_submodule(block).named_parameters():
            if has_gradient(parameters[f"{lists}.{int(number) - 1}.{name}"]):
                assert has_gradient(parameter), f"{block}.{name}"
                checked += 1
    assert checked >= 8 * len(summary.new)


@pytest.mark.parametrize("family", ["wan", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_training_uses_the_new_blocks(family, folders, tmp_path):
    """After fifty steps the grown model has a lower loss than the base after the same steps."""
    grow(folders(family), tmp_path / "grown", 4)
    base = train(load(folders(family)), 50)
    grown = train(load(tmp_path / "grown"), 50)
    assert grown[0] == base[0]
    assert sum(grown[-4:]) < sum(base[-4:])


# --------------------------------------------------------------------------------------------------------
# The command


def test_the_command(folders, tmp_path, capsys):
    """It grows, checks, prints lines of Python that work, and prints the history."""
    base, out = str(folders("hunyuan")), str(tmp_path / "out")
    grow_module.main(f"{base} --depth suffix --add 1,2 --out {out} --check".split())
    printed = capsys.readouterr().out
    assert "num_layers: 2 -> 3 blocks" in printed and "num_single_layers: 3 -> 5 blocks" in printed
    assert "new blocks: transformer_blocks.2 single_transformer_blocks.3" in printed
    assert "the same bits" in printed and "peak memory" in printed
    code = printed[printed.index("import torch") : printed.index("\nlargest difference")]
    assert len(code.splitlines()) == 5
    namespace = {}
    exec(code, namespace)
    count = sum(p.numel() for p in namespace["new"])
    assert count == sum(p.numel() for p in namespace["model"].parameters()) - sum(
        p.numel() for p in load(base).parameters()
    )
    grow_module.main([out])
    assert "num_single_layers 3 -> 5" in capsys.readouterr().out
    grow_module.main([base])
    assert capsys.readouterr().out == "HunyuanVideoTransformer3DModel, never grown\n"


def importance_of(path, capsys):
    """The numbers that the command prints. --at copies the blocks of its first column."""
    grow_module.main([str(path), "--importance"])
    values, numbers = {}, {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        number, value, block = line.split()
        values[block] = float(value)
        numbers.setdefault(int(number), set()).add(block)
    if not (path / "config.json").is_file():  # of this project
        return values
    for number, blocks in numbers.items():
        source = grow_diffusers.read_source(path)
        targets, _, _ = grow_diffusers.make_targets(source, "proj", None, "at", [number])
        copied = {".".join(target.source.split(".")[:2]) for target in targets if target.zero}
        assert copied == blocks
    return values


@pytest.mark.parametrize("family", ["wan", "latte", "hunyuan", "flux", "kandinsky", "kandinsky6", "minimax"])
def test_the_importance_of_a_copy_is_zero(family, folders, tmp_path, capsys):
    """And that of all other blocks stays."""
    before = importance_of(folders(family), capsys)
    summary = grow(folders(family), tmp_path / "grown", 2, "suffix")
    after = importance_of(tmp_path / "grown", capsys)
    assert all(value > 0.001 for value in before.values())
    for block in after:
        assert after[block] == (0 if block in summary.new else before[block])


def test_the_importance_of_own_blocks(tmp_path, capsys):
    """A checkpoint of this project: a copy of a block has none."""
    grown = grow_module.grow_depth(random_model(), 1, where="suffix")
    save_model(tmp_path, grown.state_dict(), grown.config)
    values = list(importance_of(tmp_path, capsys).values())
    assert len(values) == 4 and values[3] == 0 and min(values[:3]) > 0.001


OPTIONS = [
    ("--depth insert --add 1", "with --out"),
    ("--depth insert --out out", "with --add"),
    ("--add 1 --out out", "--add is for a growth"),
    ("--at 1 --depth insert --add 1 --out out", "give one of them"),
    ("--check", "with --out"),
    ("--out out", "--out is for a growth"),
    ("--zero proj --check --out out", "--zero is for a growth"),
    ("--importance --at 1 --out out", "does not grow"),
]


@pytest.mark.parametrize(("line", "message"), OPTIONS)
def test_options_that_need_another_are_refused(line, message, folders):
    """One line says which."""
    with pytest.raises(ValueError, match=message):
        grow_module.main([str(folders("wan")), *line.split()])


WRONG_PATHS = [
    ("part", "did you mean its folder transformer"),
    ("nowhere", "no such folder"),
    ("Wan-AI/Wan2.1", "a model on the Hub has to be downloaded first"),
    ("empty", "no model.safetensors"),
    ("text_encoder", "it is a model of another library"),
    (
        "text_encoder/model.safetensors",
        r"name the folder .* from_single_file\(FILE\)\.save_pretrained\(FOLDER\)",
    ),
    ("model.gguf", "GGUF is quantized"),
    ("quantized", "GGUF is quantized"),
    ("pickled", "never loaded"),
    ("models--Wan-AI--Wan", r"name its folder snapshots/\.\.\."),
    ("unet", r"with transformer/config\.json it can grow"),
    ("cut", r"cut/config\.json is not JSON"),
]


@pytest.mark.parametrize(("path", "message"), WRONG_PATHS)
def test_a_wrong_path_is_named(path, message, folders, tmp_path, monkeypatch):
    """One line says what it is, also with an option that grow.py has for diffusers alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("wan"), "part/transformer")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_text('{"architectures": ["UMT5EncoderModel"]}')
    save_file({"shared.weight": torch.zeros(1)}, "text_encoder/model.safetensors")
    files = ["model.gguf", "quantized/model.gguf", "pickled/model.bin", "models--Wan-AI--Wan/snapshots/0/x"]
    for file in [*files, "unet/model_index.json", "cut/config.json"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{")
    for line in ("--depth insert --add 1 --out out", "--at 0 --out out"):
        if "--at" in line and path == "text_encoder":
            message = "are for a folder in diffusers' format"
        with pytest.raises((ValueError, OSError), match=message) as caught:
            grow_module.main([path, *line.split()])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.gguf", "diffusion_pytorch_model.bin"])
def test_other_formats_of_weights_are_named(name, folders, tmp_path):
    """A diffusers folder with no safetensors."""
    shutil.copytree(folders("wan"), tmp_path / "base")
    (tmp_path / "base/diffusion_pytorch_model.safetensors").rename(tmp_path / "base" / name)
    with pytest.raises(ValueError, match=rf"has no \.safetensors, only {name}: .* never loaded"):
        grow(tmp_path / "base", tmp_path / "out", 1)


def test_an_output_that_is_there_says_nothing_of_the_input(folders):
    """grow.py pretrained --out FOLDER is of this project, although FOLDER is of diffusers."""
    words = ["pretrained", "--depth", "insert", "--add", "1", "--out", str(folders("wan"))]
    with pytest.raises(ValueError, match="is there already: name another directory"):
        grow_module.main(words)


def test_a_diffusers_folder_is_not_for_train_and_sample(folders, tmp_path):
    """Their error says where to read on."""
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path, folders("wan")):
        with pytest.raises(FileNotFoundError, match=r"docs/real_models\.md says which grow and how to train"):
            load_checkpoint(folder)


def test_help_names_the_help_for_diffusers(folders, capsys):
    """Each folder has options of its own."""
    for words, option in (
        (["--help"], "python grow.py FOLDER --help"),
        ([folders("wan"), "--help"], "--importance"),
    ):
        with pytest.raises(SystemExit):
            grow_module.main([str(word) for word in words])
        assert option in " ".join(capsys.readouterr().out.split())


def test_a_second_transformer_is_named(folders, tmp_path, capsys):
    """A pipeline of Wan 2.2 has two; the command grows the first and says so."""
    for name in ("transformer", "transformer_2"):
        shutil.copytree(folders("wan"), tmp_path / "my wan" / name)
    (tmp_path / "my wan/model_index.json").write_text("{}")
    grow_module.main([str(tmp_path / "my wan"), "--at", "1", "--out", str(tmp_path / 'my "out"')])
    printed = capsys.readouterr().out
    assert (
        f"transformer_2 did not grow: run `python grow.py '{tmp_path / 'my wan/transformer_2'}' " in printed
    )
    exec(printed[printed.index("import torch") :], {})


def test_a_check_finds_another_function(folders, tmp_path, monkeypatch, capsys):
    """--check refuses a model whose copies act, however little, once it has said what was written."""
    rule = RULES["WanTransformer3DModel"][0]
    monkeypatch.setitem(RULES, "WanTransformer3DModel", (rule._replace(proj=rule.proj[:2]),))
    small = {}
    for name, tensor in tensors_of(folders("wan")).items():
        if ".ffn.net.2." in name:
            small[name] = tensor * 1e-3
    edited(folders("wan"), tmp_path / "base", small)
    with pytest.raises(ValueError, match="computes something else"):
        grow_module.main(f"{tmp_path / 'base'} --at 1 --out {tmp_path / 'out'} --check".split())
    assert "written: " in capsys.readouterr().out


def test_a_check_of_two_models_that_are_there(folders, tmp_path, capsys):
    """Without a growth, --check compares FOLDER and OUT; what fails in diffusers is one line."""
    grow(folders("wan"), tmp_path / "out", 1)
    for out in (tmp_path / "out", folders("ltx"), tmp_path / "nowhere"):
        words = [str(folders("wan")), "--check", "--out", str(out)]
        if out == tmp_path / "out":
            grow_module.main(words)
            assert " 0 (largest output " in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match=r"^the check failed: [^\n]*$"):
                grow_module.main(words)


def test_a_check_finds_that_tensors_are_missing(folders, tmp_path):
    """diffusers would draw them from random numbers."""
    edited(folders("wan"), tmp_path / "base", {"proj_out.weight": None})
    with pytest.raises(
        ValueError, match=r"^the check failed: .* has no proj_out\.weight: a part of its weights"
    ):
        grow_module.main(f"{tmp_path / 'base'} --at 1 --out {tmp_path / 'out'} --check".split())


def test_a_copy_at_the_start_is_mentioned(folders, tmp_path, capsys):
    """Its residual is zero, and a cache of diffusers takes that for "nothing has changed"."""
    for where in ("prefix", "insert"):
        grow_module.main(f"{folders('wan')} --depth {where} --add 3 --out {tmp_path / where}".split())
        assert ("FirstBlockCache" in capsys.readouterr().out) == (where == "prefix")


@pytest.mark.parametrize("package", ["diffusers", "torchvision"])
def test_a_package_that_a_check_needs_is_named(package, tmp_path, monkeypatch):
    """In one line; without diffusers, before the growth."""
    name, config = CONFIGS["cosmos"]
    getattr(diffusers, name)(**{**config, "concat_padding_mask": True}).save_pretrained(tmp_path / "base")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install {package}$"):
        grow_module.main(f"{tmp_path / 'base'} --at 1 --out {tmp_path / 'out'} --check".split())
    assert (tmp_path / "out").exists() == (package == "torchvision")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MochiTransformer3DModel", "cannot be grown"),
        ("NewTransformer3DModel", r"has no New.*: pip install -U"),
    ],
)
def test_importance_of_an_unknown_class(name, message, folders, tmp_path, monkeypatch):
    """One line, and nothing is loaded."""
    monkeypatch.setitem(RULES, "NewTransformer3DModel", RULES["WanTransformer3DModel"])
    shutil.copytree(folders("wan"), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "_class_name": name}))
    with pytest.raises(ValueError, match=message):
        grow_module.main([str(tmp_path / "base"), "--importance"])


def tiny_pipeline(folder):
    """A random Wan pipeline, without a text encoder: prompts are features."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {"transformer": tiny("wan"), "vae": randomize(vae), "scheduler": scheduler}
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, **parts)
    pipeline.save_pretrained(folder)


def video_of(folder):
    """Two steps of sampling."""
    pipeline = diffusers.WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()  # as in proof_diffusers.load
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, 1, 5, 8, generator=generator)
    return pipeline(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], height=16, width=16, num_frames=5,
        num_inference_steps=2, max_sequence_length=5, generator=generator, output_type="pt"
    ).frames  # fmt: skip


def test_a_grown_pipeline_makes_the_same_video(tmp_path):
    """Bit for bit."""
    tiny_pipeline(tmp_path / "pipeline")
    grow(tmp_path / "pipeline", tmp_path / "grown", 3)
    base, grown = video_of(tmp_path / "pipeline"), video_of(tmp_path / "grown")
    assert torch.equal(base, grown) and base.std() > 0.01


# --------------------------------------------------------------------------------------------------------
# The code in docs/real_models.md


_, LORA, *TRAINING = code_blocks(ROOT / "docs" / "real_models.md")


def test_names_that_do_not_move():
    """Text encoders have lists of the same names, and a part behind a list's name may be no number."""
    assert moved("blocks.1.x", ["blocks.1"]) == "blocks.2.x"
    assert moved("transformer.blocks.x.blocks.1.y", ["blocks.1"]) == "transformer.blocks.x.blocks.2.y"
    assert moved("text_encoder.layers.5.x", ["layers.1"]) == "text_encoder.layers.5.x"


@pytest.mark.parametrize(
    "name", ["lora_unet_blocks_2_ffn_0.lora_down.weight", "double_blocks.2.linear.lora_A"]
)
def test_a_lora_of_another_format_is_refused(name, folders, tmp_path, monkeypatch):
    """Its names would not be moved."""
    monkeypatch.chdir(tmp_path)
    grow(folders("wan"), "wan-36/transformer", 2)
    save_file({name: torch.zeros(1)}, "lora.safetensors")
    with pytest.raises(ValueError, match="no name has the form"):
        exec(LORA, {})


def merge_lora(folder, file):
    """Add the products B A of a LoRA file to the weights of a folder."""
    weights_file = folder / "diffusion_pytorch_model.safetensors"
    weights, lora = load_file(weights_file), load_file(file)
    for name in lora:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix("lora_A.weight")
            weight = weights[module.removeprefix("transformer.") + "weight"]
            weight += lora[module + "lora_B.weight"] @ lora[name]
    save_file(weights, weights_file, {"format": "pt"})


def test_a_lora_moves_to_the_grown_model(folders, tmp_path, monkeypatch):
    """Base and LoRA compute the same bits as the grown model and the renumbered LoRA, after two growths."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, weight in tensors_of(folders("wan")).items():
        if name.startswith("blocks.") and weight.ndim == 2:
            module = "transformer." + name.removesuffix("weight")
            lora[module + "lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
            lora[module + "lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
    save_file(lora, "lora.safetensors", {"rank": "2"})
    shutil.copytree(folders("wan"), "base")
    grow("base", "once", 2)
    grow("once", "wan-36/transformer", 2, "prefix")
    shutil.copytree("wan-36/transformer", "wrong")
    exec(LORA, {})
    with safe_open("lora-36.safetensors", "pt") as file:
        assert file.metadata()["rank"] == "2"
    merge_lora(tmp_path / "base", "lora.safetensors")
    merge_lora(tmp_path / "wrong", "lora.safetensors")
    merge_lora(tmp_path / "wan-36/transformer", "lora-36.safetensors")
    assert largest_difference("base", "wrong")[0] > 0.1
    assert largest_difference("base", "wan-36/transformer")[0] == 0
    assert largest_difference("base", folders("wan"))[0] > 0.1


def test_the_training_in_the_docs_runs(tmp_path, monkeypatch):
    """It trains the blocks that a growth of Wan 1.3B makes, and nothing else, for two steps."""
    monkeypatch.chdir(tmp_path)
    model = diffusers.WanTransformer3DModel(**{**WAN, "num_layers": 30})
    randomize(model, 0).save_pretrained("wan/transformer")
    summary = grow("wan/transformer", "wan-36/transformer", 6)
    batches = [(torch.randn(2, 4, 1, 4, 4), torch.randn(2, 5, 8)) for _ in range(2)]
    namespace = {"batches": batches}
    for code in TRAINING:
        exec(code, namespace)
    before, after = load("wan-36/transformer"), load("wan-36-trained")
    changed = set()
    for name, parameter in after.named_parameters():
        if not torch.equal(parameter, before.get_parameter(name)):
            changed.add(name)
    assert {".".join(name.split(".")[:2]) for name in changed} == set(summary.new)
    for module in RULES["WanTransformer3DModel"][0].proj:
        assert {f"{block}.{module}.weight" for block in summary.new} <= changed
    assert 0 < namespace["loss"].item() < 100
    assert all(parameter.grad is None for parameter in namespace["model"].parameters())  # the base had none
    assert after.config["_modelgrow"] == before.config["_modelgrow"]
