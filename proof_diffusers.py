"""A diffusers model on random inputs: the proof of a growth, and the importance of blocks.

`python grow.py FOLDER --depth insert --add 6 --out OUT --check` prints the largest difference; without
--depth and --add it compares FOLDER with an OUT that is there. It loads both models, one after the other, so
it takes the memory of the larger one. diffusers must be installed. The inputs are small: a few frames, a few
tokens. Each class takes other inputs, so there is a function for each kind.

`python grow.py FOLDER --importance` prints 1 - cos(input, output) of each block, the block importance of
SANA-1.5 (arXiv 2501.18427), for diffusers folders and for checkpoints of this project. SANA-1.5 takes a
calibration set of real data and prunes by it. Here the inputs are random, so that nothing else is needed: the
numbers show outliers, not fine differences.

Left out: control nets, IP adapters and caches, which no checkpoint holds.
"""

import importlib.util
import math
from pathlib import Path

import torch

from grow_diffusers import TYPES, BlockList, Source, block_lists, is_diffusers, model_folder, read_source
from run import load_model

TOKENS = 5  # of text
TEXT_FIRST = ("FluxTransformer2DModel", "Cosmos3OmniTransformer")  # their blocks return text, then video


class Draw:
    """Random inputs of one type, from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def wan_inputs(c, draw):
    """Wan, SkyReelsV2, ChronoEdit, JoyImageEdit."""
    inputs = {
        "hidden_states": draw(1, c.in_channels, 3 * c.patch_size[0], 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_dim),
    }
    if c.get("image_dim"):
        images = 2 if c.pos_embed_seq_len else 1  # the first and the last frame
        tokens = (c.pos_embed_seq_len or 2 * 257) // 2
        inputs["encoder_hidden_states_image"] = draw(images, tokens, c.image_dim)
    if c.get("inject_sample_info"):  # of SkyReelsV2
        inputs["fps"] = [1]  # a number of a list of frame rates
    return inputs


def anyflow_inputs(c, draw):
    """AnyFlow: two timesteps for each frame."""
    return {
        "hidden_states": draw(1, 3, c.in_channels, 4, 4),
        "timestep": torch.full((1, 3), 500.0),
        "r_timestep": torch.full((1, 3), 250.0),
        "encoder_hidden_states": draw(1, TOKENS, c.text_dim),
    }


def helios_inputs(c, draw):
    """Helios: two frames of history, and three to make."""
    inputs = wan_inputs(c, draw)
    if c.has_multi_term_memory_patch:
        inputs["latents_history_short"] = draw(1, c.in_channels, 2, 4, 4)
        inputs["indices_latents_history_short"] = torch.arange(2)[None]
        inputs["indices_hidden_states"] = torch.arange(2, 5)[None]
    return inputs


def ltx_inputs(c, draw):
    """LTX-Video."""
    return {
        "hidden_states": draw(1, 3 * 2 * 2, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        "num_frames": 3,
        "height": 2,
        "width": 2,
    }


def cogvideox_inputs(c, draw):
    """CogVideoX. Positions that were learned have one height and width."""
    frames, height, width = 2 * (c.patch_size_t or 1), 4 * c.patch_size, 4 * c.patch_size
    if c.use_learned_positional_embeddings:
        height, width = c.sample_height, c.sample_width
    inputs = {
        "hidden_states": draw(1, frames, c.in_channels, height, width),
        "encoder_hidden_states": draw(1, c.max_text_seq_length, c.text_embed_dim),
        "timestep": torch.tensor([500]),
    }
    if c.use_rotary_positional_embeddings:
        tokens = 2 * (height // c.patch_size) * (width // c.patch_size)
        angle = torch.rand(tokens, c.attention_head_dim, generator=draw.generator)
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    if c.ofs_embed_dim:
        inputs["ofs"] = torch.tensor([2.0])
    return inputs


def hunyuan_inputs(c, draw):
    """HunyuanVideo."""
    inputs = {
        "hidden_states": draw(1, c.in_channels, 2 * c.patch_size_t, 2 * c.patch_size, 2 * c.patch_size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "pooled_projections": draw(1, c.pooled_projection_dim),
    }
    if c.guidance_embeds:
        inputs["guidance"] = torch.tensor([6000.0]).to(draw.dtype)
    return inputs


def framepack_inputs(c, draw):
    """HunyuanVideo Framepack: an image and three kinds of history."""
    inputs = hunyuan_inputs(c, draw)
    size = inputs["hidden_states"].shape[-1]
    inputs["image_embeds"] = draw(1, 3, c.image_proj_dim)
    inputs["indices_latents"] = torch.arange(inputs["hidden_states"].shape[2])
    for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
        inputs[f"latents_{name}"] = draw(1, c.in_channels, frames, size, size)
        inputs[f"indices_latents_{name}"] = torch.arange(frames)
    return inputs


def hunyuan15_inputs(c, draw):
    """HunyuanVideo 1.5: two texts and an image."""
    return {
        "hidden_states": draw(1, c.in_channels, 2 * c.patch_size_t, 2 * c.patch_size, 2 * c.patch_size),
        "timestep": torch.tensor([500.0]).to(draw.dtype),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "encoder_hidden_states_2": draw(1, TOKENS, c.text_embed_2_dim),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0]]),
        "image_embeds": draw(1, 3, c.image_embed_dim),
    }


def sana_inputs(c, draw):
    """SanaVideo."""
    inputs = {
        "hidden_states": draw(1, c.in_channels, 2 * c.patch_size[0], 4, 4),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }
    if c.guidance_embeds:
        inputs["guidance"] = torch.tensor([4.5])
    return inputs


def latte_inputs(c, draw):
    """Latte: clips of one length."""
    return {
        "hidden_states": draw(1, c.in_channels, c.video_length, 2 * c.patch_size, 2 * c.patch_size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels),
    }


def allegro_inputs(c, draw):
    """Allegro."""
    angle = torch.rand(2 * 2 * 2, c.attention_head_dim // 3, generator=draw.generator)
    positions = torch.arange(8)[None]
    return {
        "hidden_states": draw(1, c.in_channels, 2 * c.patch_size_t, 2 * c.patch_size, 2 * c.patch_size),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "image_rotary_emb": (((angle.cos(), angle.sin()),) * 3, (positions,) * 3),
    }


def cosmos_inputs(c, draw):
    """Cosmos 2 and 2.5. Raises ValueError if a package is absent with which they resize a mask."""
    if c.concat_padding_mask and importlib.util.find_spec("torchvision") is None:
        raise ValueError("this model needs torchvision: pip install torchvision")
    inputs = {
        "hidden_states": draw(1, c.in_channels, 2, 4, 4),
        "timestep": torch.tensor([500.0]).to(draw.dtype),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim),
        "padding_mask": torch.zeros(1, 1, 8, 8, dtype=draw.dtype),
    }
    if c.use_crossattn_projection:
        inputs["encoder_hidden_states"] = draw(1, TOKENS, c.crossattn_proj_in_channels)
    if c.img_context_dim_in:
        image = draw(1, c.img_context_num_tokens, c.img_context_dim_in)
        inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], image)
    return inputs


def easyanimate_inputs(c, draw):
    """EasyAnimate, perhaps with the latents of a control or of a video to fill in."""
    size = (2, 2 * c.patch_size, 2 * c.patch_size)
    inputs = {
        "hidden_states": draw(1, c.out_channels, *size),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim),
    }
    if c.in_channels > c.out_channels:
        inputs["inpaint_latents"] = draw(1, c.in_channels - c.out_channels, *size)
    return inputs


def flux_inputs(c, draw):
    """FLUX."""
    inputs = {
        "hidden_states": draw(1, 6, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim),
        "pooled_projections": draw(1, c.pooled_projection_dim),
        "timestep": torch.tensor([0.5]).to(draw.dtype),
        "img_ids": torch.arange(18.0).view(6, 3) % 4,
        "txt_ids": torch.zeros(TOKENS, 3),
    }
    if c.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5]).to(draw.dtype)
    return inputs


def kandinsky_inputs(c, draw):
    """Kandinsky 5."""
    channels = 2 * c.in_visual_dim + 1 if c.visual_cond else c.in_visual_dim
    return {
        "hidden_states": draw(1, 2, 4, 4, channels),
        "encoder_hidden_states": draw(1, TOKENS, c.in_text_dim),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": draw(1, c.in_text_dim2),
        "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
        "text_rope_pos": torch.arange(TOKENS),
    }


def kandinsky6_inputs(c, draw):
    """Kandinsky 6: video and audio."""
    inputs = kandinsky_inputs(c, draw)
    del inputs["visual_rope_pos"], inputs["text_rope_pos"]
    return inputs | {"audio_hidden_states": draw(1, 3, c.in_audio_dim)}


def kandinsky6_sr_inputs(c, draw):
    """Kandinsky 6 super-resolution: its attention takes tiles of 8 x 8 tokens."""
    _, height, width = c.patch_size
    return {
        "hidden_states": draw(1, 2 * c.patch_size[0], 8 * height, 16 * width, 2 * c.in_visual_dim + 1),
        "timestep": torch.tensor([500.0]),
    }


def minimax_inputs(c, draw):
    """MiniMax H3: rows of text, video and audio, packed into one sequence."""
    video, audio = 4, 3
    rows = torch.arange(TOKENS + video + audio)
    return {
        "hidden_states": draw(1, video, c.in_channels * math.prod(c.patch_size)),
        "audio_hidden_states": draw(1, audio, c.audio_in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.text_dim),
        "timestep": torch.tensor([0.5, 0.7]),
        "timestep_indices": rows % 2,
        "token_tags": torch.tensor([1] * TOKENS + [0] * video + [2] * audio),
        "position_ids": rows[:, None] % torch.tensor([2, 3, 5]),
        "text_indices": rows[:TOKENS],
        "video_indices": rows[TOKENS : TOKENS + video],
        "audio_indices": rows[TOKENS + video :],
    }


def joyimage_plus_inputs(c, draw):
    """JoyImage Edit Plus: patches of an image of 2 x 2 and of one of 2 x 3."""
    return {
        "hidden_states": draw(1, 10, c.in_channels, *c.patch_size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_dim),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "shape_list": [[(1, 2, 2), (1, 2, 3)]],
    }


def refiner_inputs(c, draw):
    """The refiner of SanaWM, on one block of frames, without a cache."""
    heads, size = c.num_attention_heads, c.num_attention_heads * c.attention_head_dim
    shape = (1, 8, size) if c.rope_type == "interleaved" else (1, heads, 8, c.attention_head_dim // 2)
    angle = torch.rand(shape, generator=draw.generator)
    return {
        "hidden_states": draw(1, 8, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels),
        "timestep": torch.full((1, 8), 500.0),
        "video_rotary_emb": (angle.cos(), angle.sin()),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }


def omni_inputs(c, draw):
    """Cosmos 3: text, two frames of 2 x 2 patches, and three steps of sound and actions, in one sequence."""
    video = torch.arange(TOKENS, TOKENS + 8)
    side = 2 * c.latent_patch_size
    inputs = {
        "input_ids": torch.arange(TOKENS) % c.vocab_size,
        "text_indexes": torch.arange(TOKENS),
        "und_len": TOKENS,
        "vision_tokens": [draw(1, c.latent_channel, 2, side, side)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((8,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }
    length = TOKENS + 8
    if c.sound_gen:
        inputs |= omni_steps("sound", draw(c.sound_dim, 3), length)
        length += 3
    if c.action_gen:
        inputs |= omni_steps("action", draw(3, c.action_dim), length)
        inputs["action_domain_ids"] = [torch.tensor(1)]
        length += 3
    inputs["sequence_length"] = length
    inputs["position_ids"] = torch.arange(length) % torch.tensor([[17], [3], [2]])
    return inputs


def omni_steps(kind, tokens, start):
    """Three noisy steps of sound or actions, from place `start` of the sequence on."""
    places = torch.arange(start, start + 3)
    return {
        f"{kind}_tokens": [tokens],
        f"{kind}_token_shapes": [(3, 1, 1)],
        f"{kind}_sequence_indexes": places,
        f"{kind}_mse_loss_indexes": places,
        f"{kind}_timesteps": torch.full((3,), 500.0),
        f"{kind}_noisy_frame_indexes": [torch.arange(3)],
    }


def anyflow_far_inputs(c, draw):
    """AnyFlow FAR: five chunks of one frame, of which the first ones are compressed."""
    _, height, width = c.compressed_patch_size
    return {
        "hidden_states": draw(1, 5, c.in_channels, 2 * height, 2 * width),
        "timestep": torch.full((1, 5), 500.0),
        "r_timestep": torch.full((1, 5), 250.0),
        "encoder_hidden_states": draw(1, TOKENS, c.text_dim),
        "chunk_partition": [1] * 5,
    }


INPUTS = {
    "WanTransformer3DModel": wan_inputs,
    "SkyReelsV2Transformer3DModel": wan_inputs,
    "ChronoEditTransformer3DModel": wan_inputs,
    "AnyFlowTransformer3DModel": anyflow_inputs,
    "AnyFlowFARTransformer3DModel": anyflow_far_inputs,
    "HeliosTransformer3DModel": helios_inputs,
    "LTXVideoTransformer3DModel": ltx_inputs,
    "AllegroTransformer3DModel": allegro_inputs,
    "CosmosTransformer3DModel": cosmos_inputs,
    "SanaVideoTransformer3DModel": sana_inputs,
    "LatteTransformer3DModel": latte_inputs,
    "CogVideoXTransformer3DModel": cogvideox_inputs,
    "EasyAnimateTransformer3DModel": easyanimate_inputs,
    "HunyuanVideoTransformer3DModel": hunyuan_inputs,
    "HunyuanVideoFramepackTransformer3DModel": framepack_inputs,
    "HunyuanVideo15Transformer3DModel": hunyuan15_inputs,
    "FluxTransformer2DModel": flux_inputs,
    "Kandinsky5Transformer3DModel": kandinsky_inputs,
    "Kandinsky6Transformer3DModel": kandinsky6_inputs,
    "Kandinsky6SRTransformer3DModel": kandinsky6_sr_inputs,
    "MiniMaxH3Transformer3DModel": minimax_inputs,
    "JoyImageEditTransformer3DModel": wan_inputs,
    "JoyImageEditPlusTransformer3DModel": joyimage_plus_inputs,
    "SanaWMLTX2RefinerTransformer3DModel": refiner_inputs,
    "Cosmos3OmniTransformer": omni_inputs,
}


def random_inputs(model, seed: int = 0) -> dict:
    """Small random inputs of a diffusers model, by the names of its forward, in its type."""
    name = type(model).__name__
    return INPUTS[name](model.config, Draw(model.dtype, seed))


def main_type(source: Source) -> torch.dtype:
    """The type that most of a model's bytes have."""
    sizes = dict.fromkeys(TYPES, 0)
    for entry in source.tensors.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.size
    return TYPES[max(sizes, key=sizes.get)]


def import_diffusers():
    """The package, or ValueError if it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("this needs diffusers: pip install diffusers") from None
    return diffusers


def contiguous_tokens(block, positional, named):
    """A hook. SanaVideo gives its first block a transposed view, on which layers round differently."""
    return (positional[0].contiguous(), *positional[1:]), named


def load(folder: Path | str):
    """A folder -> the diffusers model in eval mode, in the type of most bytes. Raises ValueError if diffusers
    is not installed, if the class has no rule, or if tensors are missing.

    The tensors are cloned, which aligns them. As `from_pretrained` gives them, they begin where the header of
    the file ends. On a CPU in float32, a product with one row, such as the time embedding of a batch of one,
    rounds differently where the address of the weight is 8 modulo 16 instead of 0."""
    diffusers = import_diffusers()
    source = read_source(Path(folder))
    name = str(source.config.get("_class_name"))
    block_lists(name, source.config)
    if not hasattr(diffusers, name):
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}: pip install -U diffusers")
    options = {"torch_dtype": main_type(source), "variant": source.variant, "use_safetensors": True}
    model, found = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True, **options)
    if found["missing_keys"]:
        raise ValueError(
            f"{folder} has no {sorted(found['missing_keys'])[0]}: a part of its weights is missing"
        )
    model.eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    if name == "SanaVideoTransformer3DModel":
        model.transformer_blocks[0].register_forward_pre_hook(contiguous_tokens, with_kwargs=True)
    return model


def tensors_in(outputs) -> list[torch.Tensor]:
    """All tensors of an output: video, and sound where a model makes it."""
    if outputs is None:
        return []
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in tensors_in(part)]


def outputs_of(model, seed: int = 0) -> torch.Tensor:
    """All outputs of a model on random inputs, as one flat tensor."""
    outputs = model(**random_inputs(model, seed), return_dict=False)
    return torch.cat([tensor.flatten() for tensor in tensors_in(outputs)])


@torch.no_grad()
def largest_difference(base, grown) -> tuple[float, float]:
    """Two folders -> the largest |grown - base| and |base| over all outputs, on random inputs."""
    outputs = []
    for folder in (base, grown):
        model = load(folder)
        outputs.append(outputs_of(model).float())
        del model  # before the other one is loaded
    return (outputs[1] - outputs[0]).abs().max().item(), outputs[0].abs().max().item()


# --------------------------------------------------------------------------------------------------------
# Importance


class Meter:
    """A hook that adds up 1 - cos(input, output) over the calls of a block."""

    def __init__(self, position: int):
        self.position = position  # of the video's tokens, if a block takes or returns several tensors
        self.total, self.calls = 0.0, 0

    def __call__(self, block, positional, named, output):
        before = named["hidden_states"] if "hidden_states" in named else positional[self.position]
        after = output if isinstance(output, torch.Tensor) else output[self.position]
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += 1 - cosine.mean().item()
        self.calls += 1


@torch.no_grad()
def importance(path: Path | str, draws: int = 4) -> list[tuple[int, str, float]]:
    """A diffusers folder, or a checkpoint of this project -> (number for --at, block, 1 - cos(input, output))
    of each block, the mean over tokens and `draws` random inputs. 0 is a block that does nothing."""
    if is_diffusers(path):
        model, run = load(model_folder(path)), outputs_of
        rules = block_lists(type(model).__name__, model.config)
    else:
        model, run, rules = load_model(path)[0], run_own, (BlockList("blocks", "depth", ()),)
    meters, firsts, total = [], {}, 0
    for rule in rules:
        blocks = model.get_submodule(rule.name)
        first = firsts.setdefault(rule.count, total)  # lists that share a count share its numbers
        total = first + len(blocks)
        for i, block in enumerate(blocks):
            meter = Meter(1 if type(model).__name__ in TEXT_FIRST else 0)
            block.register_forward_hook(meter, with_kwargs=True)
            meters.append((first + i, f"{rule.name}.{i}", meter))
    for seed in range(draws):
        run(model, seed)
    return [(number, block, meter.total / meter.calls) for number, block, meter in meters]


def run_own(model, seed: int):
    """One random clip, timestep and prompt."""
    c, draw = model.config, Draw(torch.float32, seed)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    prompt = [draw(1, TOKENS, c.text_dim), mask]
    if c.llm_dim:
        prompt += [draw(1, TOKENS, c.llm_dim), mask]
    t = torch.rand(1, generator=draw.generator)
    model(draw(1, 3, c.frames, c.size, c.size), t, *prompt)
