"""Depth growth of diffusers checkpoints: Wan, LTX-Video, CogVideoX, HunyuanVideo and others, on disk.

The paper grows a trained foundation model. This chapter does it for checkpoints that people have: a folder
in, a larger folder out, and the grown model computes the same bits (function-preserving depth growth).

**Why a copy can change nothing.** A block of a transformer adds its branches to a residual stream: x + gate *
proj(branch(x)). A copy is the identity if one factor of each branch is zero: the output projections, weights
and biases (`zero="proj"`), or the rows of the adaLN map that produce the gates (`"gate"`). x + 0 is x, in
every precision. Zero one factor only. Then the zero tensor gets a gradient in the first step, and the rest of
the copy in the second. If both are zero, neither ever gets a gradient. So `grow` refuses to zero the gates of
a block whose projections are zero already, as in a copy that was never trained, and the other way round.

**No model is built.** The tensors of block i are called LIST.i.NAME. Growth renumbers the blocks by the
`stacking_plan` of stacking.py, copies tensors, zeroes some of the copies, and writes new counts to
config.json. It reads and writes one tensor at a time, so the memory is that of the largest tensor. Every
tensor keeps its type.

**What is special by index** breaks this, and each class has its own traps. `RULES` has the classes that were
read and tested: each difference in tests/test_grow_diffusers.py is exactly 0, in float32 and bfloat16, with
every parameter random. `REFUSED` has the other video transformers of diffusers 0.42, with the reason. All
others are refused too, and so is a block with a branch that its rule does not know: nothing is guessed. A
table of classes, and of what can be zero in each, is in docs/real_models.md.

Traps:

- Wan, LTX, SanaVideo, Latte: the gate is a table plus the shared time embedding. A zero table does not close
  it, and the cross-attention has no gate. Only the projections can be zero.
- Latte adds its temporal positions inside the loop, at block 0. A copy before it would take them (no prefix).
- Cosmos 1.0 adds learnable positions again in every block, so that a copy adds them once more.
- EasyAnimate may have a norm with a bias behind its projections. Only the gates can be zero.
- SanaVideo gives its first block a transposed view, and a copy before it makes that contiguous. On a CPU in
  bfloat16, a layer rounds differently on the two. So a check makes it contiguous in both models.
- AnyFlowFAR and the refiner of SanaWM cache keys for each block. Pipelines make as many caches as config.json
  has blocks, so a copy gets one.
- MiniMaxH3 makes its gates three times, for video, text and audio, in one map.
- Kandinsky6 has gates in maps of 9 and of 3 pieces, which may be unequal. Only the projections can be zero.
- The refiner of SanaWM does not run the audio part of its blocks. Its projections are zeroed as well.

How it differs from other tools: mergekit moves layers of language models and does not preserve the function.
Left out: training; width, MLP and LLM growth; quantized checkpoints; pickles, which may run code; control
nets and LoRA adapters, which name blocks of the base (`moved` gives their new names).
"""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from machine import fsync
from run import PICKLES, history_tree
from stacking import WHERE, stacking_plan

STEM = "diffusion_pytorch_model"  # of the names of files that from_pretrained looks for
HISTORY = "_modelgrow"  # an entry of config.json; diffusers ignores and keeps names that begin with _
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that blocks may have
TOOLS = (".git", ".cache")  # folders that are not copied
WEIGHTS = {".safetensors", ".msgpack", ".gguf", *PICKLES}  # suffixes; those of the model are not copied

# --------------------------------------------------------------------------------------------------------
# Rules


class BlockList(NamedTuple):
    """A list of blocks that a class runs one after the other. All names are modules inside a block."""

    name: str  # of the list
    count: str  # its length in config.json
    parts: tuple[str, ...]  # all modules and parameters that a block may have
    proj: tuple[str, ...] = ()  # output projections, one per branch
    gate: tuple[str, ...] = ()  # linear maps that produce gates
    pieces: int = 6  # of the output of such a map: shift, scale, gate, shift, ...; piece 2, 5, ... gates


TABLE_PARTS = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff", "scale_shift_table")
WAN_PARTS = ("norm1", "attn1", "norm2", "attn2", "norm3", "ffn", "scale_shift_table")
DUAL_PARTS = ("norm1", "norm1_context", "attn", "norm2", "norm2_context", "ff", "ff_context")
DUAL_PROJ = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
DUAL_GATE = ("norm1.linear", "norm1_context.linear")
SINGLE_PARTS = ("attn", "norm", "proj_mlp", "proj_out")
JOY_PARTS = ("img_mod", "img_norm1", "img_norm2", "img_mlp", "txt_mod", "txt_norm1", "txt_norm2", "txt_mlp")
JOY_PROJ = ("attn.img_attn_proj", "attn.txt_attn_proj", "img_mlp.net.2", "txt_mlp.net.2")
H3_PARTS = ("norm1", "attn", "norm2", "ff", "adaln_proj")
H3_PROJ = ("attn.to_out.0", "ff.net.2")
REFINER_PARTS = ("audio_norm1", "audio_attn1", "audio_norm2", "audio_attn2", "audio_norm3", "audio_ff")
REFINER_PARTS += ("audio_to_video_norm", "audio_to_video_attn", "video_to_audio_norm", "video_to_audio_attn")
REFINER_PARTS += ("audio_scale_shift_table", "video_a2v_cross_attn_scale_shift_table")
REFINER_PARTS += ("audio_a2v_cross_attn_scale_shift_table",)
REFINER_PROJ = ("audio_attn1.to_out.0", "audio_attn2.to_out.0", "audio_ff.net.2")
REFINER_PROJ += ("audio_to_video_attn.to_out.0", "video_to_audio_attn.to_out.0")
OMNI_PARTS = ("self_attn", "mlp", "mlp_moe_gen", "input_layernorm", "input_layernorm_moe_gen")
OMNI_PARTS += ("post_attention_layernorm", "post_attention_layernorm_moe_gen")
OMNI_PROJ = ("self_attn.to_out", "self_attn.to_add_out", "mlp.down_proj", "mlp_moe_gen.down_proj")
FUSED_PARTS = ("video_dec_block", "audio_dec_block", "va_cross_attention", "av_cross_attention")
FUSED_PARTS += ("va_modulation", "av_modulation")
FUSED_PROJ = ("video_dec_block.self_attention.out_layer", "video_dec_block.cross_attention.out_layer")
FUSED_PROJ += ("audio_dec_block.self_attention.out_layer", "audio_dec_block.cross_attention.out_layer")
FUSED_PROJ += ("video_dec_block.feed_forward.net.2", "audio_dec_block.feed_forward.net.2")
FUSED_PROJ += ("va_cross_attention.out_layer", "av_cross_attention.out_layer")
MODULATION = ("visual_modulation.out_layer",)
SR_PARTS = ("visual_modulation", "self_attention_norm", "self_attention", "feed_forward_norm", "feed_forward")
SR_PROJ = ("self_attention.out_layer", "feed_forward.net.2")
KANDINSKY_PARTS = ("visual_modulation", "self_attention_norm", "self_attention", "cross_attention_norm")
KANDINSKY_PARTS += ("cross_attention", "feed_forward_norm", "feed_forward")
KANDINSKY_PROJ = ("self_attention.out_layer", "cross_attention.out_layer", "feed_forward.out_layer")
ANIMATE_PARTS = ("norm1", "attn1", "norm2", "ff", "txt_ff", "norm3")
NORM_GATES = ("norm1.linear", "norm2.linear")
CROSS_PROJ = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
WAN_PROJ = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
SANA_PROJ = ("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point")
SELF_PROJ = ("attn1.to_out.0", "ff.net.2")

WAN = BlockList("blocks", "num_layers", WAN_PARTS, WAN_PROJ)
TABLE = BlockList("transformer_blocks", "num_layers", TABLE_PARTS, CROSS_PROJ)
SANA = BlockList("transformer_blocks", "num_layers", TABLE_PARTS, SANA_PROJ)
TEMPORAL = BlockList("temporal_transformer_blocks", "num_layers", TABLE_PARTS, SELF_PROJ)
COG = BlockList("transformer_blocks", "num_layers", ANIMATE_PARTS[:4], SELF_PROJ, NORM_GATES)
ANIMATE = BlockList("transformer_blocks", "num_layers", ANIMATE_PARTS, (), NORM_GATES)
DUAL = BlockList("transformer_blocks", "num_layers", DUAL_PARTS, DUAL_PROJ, DUAL_GATE)
SINGLE = BlockList(
    "single_transformer_blocks", "num_single_layers", SINGLE_PARTS, ("proj_out",), ("norm.linear",), 3
)
VISUAL = BlockList(
    "visual_transformer_blocks", "num_visual_blocks", KANDINSKY_PARTS, KANDINSKY_PROJ, MODULATION, 9
)
FUSED = BlockList("visual_transformer_blocks", "num_visual_blocks", FUSED_PARTS, FUSED_PROJ)
SR = BlockList("visual_transformer_blocks", "num_visual_blocks", SR_PARTS, SR_PROJ, MODULATION)
H3 = BlockList("transformer_blocks", "num_layers", H3_PARTS, H3_PROJ, ("adaln_proj.linear",), 18)
JOY = BlockList("double_blocks", "num_layers", (*JOY_PARTS, "attn"), JOY_PROJ)
REFINER = BlockList(
    "transformer_blocks", "num_layers", TABLE_PARTS + REFINER_PARTS, CROSS_PROJ + REFINER_PROJ
)
OMNI = BlockList("layers", "num_hidden_layers", OMNI_PARTS, OMNI_PROJ)

RULES = {
    "WanTransformer3DModel": (WAN,),
    "SkyReelsV2Transformer3DModel": (WAN,),
    "ChronoEditTransformer3DModel": (WAN,),
    "AnyFlowTransformer3DModel": (WAN,),
    "AnyFlowFARTransformer3DModel": (WAN,),
    "HeliosTransformer3DModel": (WAN,),
    "LTXVideoTransformer3DModel": (TABLE,),
    "AllegroTransformer3DModel": (TABLE,),
    "CosmosTransformer3DModel": (TABLE,),
    "SanaVideoTransformer3DModel": (SANA,),
    "LatteTransformer3DModel": (TABLE, TEMPORAL),  # run in turns; they share a count
    "CogVideoXTransformer3DModel": (COG,),
    "EasyAnimateTransformer3DModel": (ANIMATE,),
    "HunyuanVideoTransformer3DModel": (DUAL, SINGLE),
    "HunyuanVideoFramepackTransformer3DModel": (DUAL, SINGLE),
    "HunyuanVideo15Transformer3DModel": (DUAL,),
    "FluxTransformer2DModel": (DUAL, SINGLE),
    "Kandinsky5Transformer3DModel": (VISUAL,),
    "Kandinsky6Transformer3DModel": (FUSED,),
    "Kandinsky6SRTransformer3DModel": (SR,),
    "MiniMaxH3Transformer3DModel": (H3,),
    "JoyImageEditTransformer3DModel": (JOY,),
    "JoyImageEditPlusTransformer3DModel": (JOY,),
    "SanaWMLTX2RefinerTransformer3DModel": (REFINER,),
    "Cosmos3OmniTransformer": (OMNI,),
}

LEARNABLE = "every block adds the learnable positions, and so would a copy"
CONTROL_NET = "a control net adds to blocks by index"
CONDITIONS = {  # class: entry of config.json that must be null, what diffusers takes if it is absent, and why
    "CosmosTransformer3DModel": (
        ("extra_pos_embed_type", "learnable", LEARNABLE),
        ("controlnet_block_every_n", None, CONTROL_NET),
    ),
}

EASY_LAYERS = 48  # EasyAnimate's num_layers and mmdit_layers where config.json has none
INDEXED = "a block takes something by its index: "
REFUSED = {
    "WanVACETransformer3DModel": INDEXED + "vace_layers",
    "WanAnimateTransformer3DModel": INDEXED + "a face adapter for every fifth block",
    "LTX2VideoTransformer3DModel": INDEXED + "its guidance skips blocks (stg_blocks)",
    "ConsisIDTransformer3DModel": INDEXED + "a face cross-attention for every second block",
    "MochiTransformer3DModel": INDEXED + "the last block has no text branch",
    "SD3Transformer2DModel": INDEXED + "the last block has no text branch",
    "SanaWMTransformer3DModel": INDEXED + "softmax attention in every n-th block",
    "MotifVideoTransformer3DModel": INDEXED + "the text of the encoder or of the decoder part",
    "ChromaTransformer2DModel": INDEXED + "its modulation, from one network for all blocks",
    "HunyuanDiT2DModel": INDEXED + "skip connections from the first half to the second",
    "WanAnimate2Transformer3DModel": INDEXED + "its guidance skips block 9",
    "TransformerTemporalModel": "it is a part of a UNet, and no rule was tried",
    "WanModel": "it is in Wan's original format: convert it, or download the -Diffusers repository",
    "HunyuanVideoTransformer3DModelPacked": "diffusers calls it HunyuanVideoFramepackTransformer3DModel:"
    " write that name into config.json",
}


def block_lists(name: str, config: dict) -> tuple[BlockList, ...]:
    """The rule for class `name` with this config.json. Raises ValueError if it cannot be grown exactly."""
    if name in REFUSED:
        raise ValueError(f"{name} cannot be grown: {REFUSED[name]}")
    if name not in RULES:
        raise ValueError(f"there is no rule for {name[:80]}; docs/real_models.md lists those that have one")
    if "quantization_config" in config:
        raise ValueError("a quantized checkpoint cannot be grown: take the original weights")
    for entry, default, reason in CONDITIONS.get(name, ()):
        value = config.get(entry, default)
        if value is not None:
            raise ValueError(f"{name} with {entry} {value!r} cannot be grown: {reason}")
    layers = config.get("mmdit_layers", EASY_LAYERS)
    if name == "EasyAnimateTransformer3DModel" and layers < config.get("num_layers", EASY_LAYERS):
        raise ValueError(f"{name} with mmdit_layers below num_layers cannot be grown: its blocks differ")
    return RULES[name]


# --------------------------------------------------------------------------------------------------------
# Reading


class Entry(NamedTuple):
    """A tensor on the disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as in a safetensors header
    size: int  # bytes
    width: int  # bytes of a number


class Source(NamedTuple):
    """A checkpoint on the disk."""

    folder: Path
    config: dict
    tensors: dict[str, Entry]  # in the order of the files
    metadata: dict[str, str]  # of the files
    sharded: bool  # whether there is an index
    variant: str | None  # a part of the file names, such as fp16


def is_diffusers(folder: Path | str) -> bool:
    """Whether a folder holds a diffusers model, or a pipeline with a transformer, perhaps a broken one."""
    try:
        return "_class_name" in read_json(model_folder(folder) / "config.json")
    except OSError:
        return False
    except ValueError:
        return True  # it is cut off, as reading it will say


def model_folder(folder: Path | str) -> Path:
    """A model's folder, or a pipeline's -> that of the model."""
    folder = Path(folder)
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def read_json(file: Path) -> dict:
    """A JSON file that holds an object. Raises OSError or ValueError."""
    try:
        entries = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return entries


def read_source(folder: Path) -> Source:
    """The config and all headers. Raises OSError or ValueError if files are absent, cut off, or not what the
    index says, or if there are weights that do not belong to one checkpoint."""
    config = read_json(folder / "config.json")
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    if not indices + files:
        weights = ", ".join(file.name for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS)
        reason = "pickles, which may run any code, are never loaded, and GGUF is quantized"
        raise ValueError(f"{folder} has no .safetensors, only {weights or 'other files'}: {reason}")
    shards = [file.name for file in files if re.search(r"-\d{5}-of-\d{5}\.", file.name)]
    if shards and not indices:
        raise ValueError(f"{folder} has {shards[0]} without a .safetensors.index.json: download all files")
    first = (indices + files)[0]
    tensors = read_shards(folder, first) if indices else read_header(first)
    used = dict.fromkeys(entry.file for entry in tensors.values())
    others = [file.name for file in indices + files if file != first and file not in used]
    if others:
        found = ", ".join([first.name, *others][:4])
        raise ValueError(f"{folder} has several checkpoints: move all but one of {found} away")
    metadata = {}
    for file in used:
        with safe_open(file, "pt") as opened:
            metadata |= opened.metadata() or {}
    words = [word for word in first.name.split(".")[1:] if word not in ("safetensors", "index", "json")]
    return Source(folder, config, tensors, metadata, bool(indices), ".".join(words) or None)


def read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    """All tensors of a sharded checkpoint. Raises ValueError unless index and shards agree."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names a file in another folder: {name[:80]}")
        for tensor, entry in read_header(folder / name).items():
            if weight_map.get(tensor) != name:
                raise ValueError(f"{index.name} has no entry for {tensor}, which is in {name}")
            tensors[tensor] = entry
    for tensor in weight_map:
        if tensor not in tensors:
            raise ValueError(f"{weight_map[tensor]} has no tensor {tensor}, which {index.name} names")
    return tensors


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, without their data. Raises OSError or ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is absent")
    tensors = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a dictionary)
                part, tensor = opened.get_slice(name), opened.get_tensor(name)  # mapped, not read
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                tensors[name] = Entry(file, shape, dtype, tensor.nbytes, tensor.itemsize)
    except SafetensorError as error:
        with file.open("rb") as opened:
            pointer = opened.read(7) == b"version"  # the first word of a Git LFS pointer
        reason = "a Git LFS pointer: run git lfs pull" if pointer else f"cut off or broken: {error}"
        raise ValueError(f"{file} is {reason}") from None
    return tensors


def read_tensor(source: Source, name: str) -> torch.Tensor:
    """One tensor, mapped from its file."""
    with safe_open(source.tensors[name].file, "pt") as opened:
        return opened.get_tensor(name)


def blocks_of(source: Source, rule: BlockList) -> dict[int, dict[str, str]]:
    """-> {number of a block: {name in the block: name of the tensor}}. Raises ValueError unless the blocks
    are as many as the config says, all alike, and made of parts that the rule knows."""
    count = source.config.get(rule.count)
    if type(count) is not int or count < 1:
        found = f"it has {str(count)[:80]}: write down how many {rule.name} there are"
        raise ValueError(f"config.json must have a number {rule.count}; {found}")
    blocks = {}
    for tensor, entry in source.tensors.items():
        name, _, rest = tensor.partition(".")
        number, _, inner = rest.partition(".")
        if name == rule.name and number.isdecimal():
            if entry.dtype not in TYPES:
                advice = "take weights that were never quantized, since their scales are lost in a cast"
                raise ValueError(f"{tensor} is {entry.dtype}: {advice}")
            blocks.setdefault(int(number), {})[inner] = tensor
    if sorted(blocks) != list(range(count)):
        raise ValueError(f"{rule.count} is {count}, but the files hold {len(blocks)} {rule.name}")
    for number, block in blocks.items():
        odd = sorted(block.keys() ^ blocks[0].keys())
        if odd:
            raise ValueError(f"{rule.name} differ: {number} and 0 do not both have {odd[0]}")
    check_parts(rule, blocks[0])
    return blocks


def check_parts(rule: BlockList, block: dict[str, str]):
    """Raise ValueError unless a block is what the rule describes."""
    for inner in block:
        if inner.split(".")[0] not in rule.parts:
            raise ValueError(f"{rule.name} have {inner}, which the rule does not know: not grown")
    for module in rule.proj + rule.gate:
        if f"{module}.weight" not in block:
            raise ValueError(f"{rule.name} have no {module}.weight, which the rule would zero: not grown")


# --------------------------------------------------------------------------------------------------------
# Growth


class Target(NamedTuple):
    """A tensor of the grown checkpoint."""

    name: str
    source: str
    zero: str = ""  # "all", "gate", or nothing
    pieces: int = 1  # for "gate"


class Summary(NamedTuple):
    """What a growth has done."""

    folder: Path  # the grown model
    changed: dict[str, list[int]]  # count in config.json -> before, after
    parameters: tuple[int, int]  # before, after
    new: list[str]  # names of the new blocks
    earlier: list[str]  # those of earlier growths, which have moved; nothing tells whether they are trained
    size: int  # bytes of the grown weights
    files: int
    copied: int  # bytes of other files


def share_out(add, at, counts: dict[str, int]) -> dict[str, tuple[int, list[int]]]:
    """-> {count in config.json: (copies, block numbers to copy)}. `add` is a number for the whole model, in
    proportion to the lists, or one number per list. `at` numbers the blocks of all lists in their order."""
    total = sum(counts.values())
    if at is not None:
        if add is not None:
            raise ValueError("name blocks with at, or a number with add, not both")
        for number in at:
            if not 0 <= number < total:
                raise ValueError(f"there is no block {number}; there are {total}, from 0 on")
    elif add is None:
        raise ValueError("say how many blocks to add")
    elif type(add) is int:
        add = split(add, list(counts.values()))
    elif len(add) != len(counts):
        raise ValueError(f"{len(add)} numbers of blocks for {len(counts)} lists: {', '.join(counts)}")
    shares, start = {}, 0
    for i, (name, count) in enumerate(counts.items()):
        here = [number - start for number in at or () if start <= number < start + count]
        shares[name] = (len(here) if at is not None else add[i], here)
        start += count
    if all(copies == 0 for copies, _ in shares.values()):
        raise ValueError("nothing to add")
    return shares


def split(add: int, counts: list[int]) -> list[int]:
    """A number in proportion to `counts`; the last one takes what rounding leaves."""
    parts = [add * count // sum(counts) for count in counts]
    parts[-1] += add - sum(parts)
    return parts


def plan_of(depth: int, copies: int, where: str, at: list[int] | None) -> list[tuple[int, bool]]:
    """The grown stack as in grow.py: (number in the base, is it a copy?). `at`: copies right after these."""
    if at is not None:
        plan = []
        for i in range(depth):
            plan += [(i, False)] + [(i, True)] * at.count(i)
        return plan
    if copies == 0:
        return [(i, False) for i in range(depth)]
    return stacking_plan(depth, copies, where=where)


def block_targets(rule, blocks, plan, zero) -> list[Target]:
    """The tensors of a grown list."""
    targets = []
    for number, (old, is_copy) in enumerate(plan):
        for inner, tensor in blocks[old].items():
            name = f"{rule.name}.{number}.{inner}"
            module = inner.rpartition(".")[0]
            if is_copy and module in getattr(rule, zero):
                targets.append(Target(name, tensor, "all" if zero == "proj" else "gate", rule.pieces))
            else:
                targets.append(Target(name, tensor))
    return targets


def gate_rows(tensor: torch.Tensor, pieces: int) -> torch.Tensor:
    """The rows of an adaLN map, (pieces * D, ...), that produce gates -> a view (pieces / 3, D, ...)."""
    return tensor.unflatten(0, (pieces // 3, 3, -1))[:, 2]


def check_alive(source: Source, rule: BlockList, block: dict[str, str], zero: str):
    """Raise ValueError if a branch of a block would have zero gates and zero projections: it could never
    learn."""
    for module in rule.gate if zero == "proj" else rule.proj:
        names = [f"{module}.{kind}" for kind in ("weight", "bias") if f"{module}.{kind}" in block]
        tensors = [read_tensor(source, block[name]) for name in names]
        factors = [gate_rows(tensor, rule.pieces) if zero == "proj" else [tensor] for tensor in tensors]
        # a factor is zero if its weight and its bias are
        if not all(any(part.any() for part in parts) for parts in zip(*factors, strict=True)):
            other = "gates" if zero == "proj" else "projections"
            name = block[f"{module}.weight"].removesuffix(".weight")
            raise ValueError(
                f"the {other} of {name} are zero already: with zero {zero} a copy could never learn."
                " Train it first, copy another block, or zero the same factor as before"
            )


def make_targets(source: Source, zero, add, where, at) -> tuple[list[Target], dict, list[str]]:
    """-> (all tensors of the grown model, {count: [before, after]}, names of new blocks)."""
    name = source.config["_class_name"]
    rules = block_lists(name, source.config)
    lists = {rule.name: blocks_of(source, rule) for rule in rules}
    counts = {rule.count: source.config[rule.count] for rule in rules}
    shares = share_out(add, at, counts)
    targets, changed, new, moved = [], {}, [], set()
    for rule in rules:
        blocks = lists[rule.name]
        copies, here = shares[rule.count]
        plan = plan_of(len(blocks), copies, where, here if at is not None else None)
        if name == "LatteTransformer3DModel" and plan[0] == (0, True):
            raise ValueError(f"{name} cannot be grown by prefix: its block 0 adds the temporal positions")
        for old in sorted({i for i, is_copy in plan if is_copy}):
            check_alive(source, rule, blocks[old], zero)
        targets += block_targets(rule, blocks, plan, zero)
        new += [f"{rule.name}.{i}" for i, (_, is_copy) in enumerate(plan) if is_copy]
        if len(plan) > len(blocks):
            changed[rule.count] = [len(blocks), len(plan)]
        for block in blocks.values():
            moved.update(block.values())
    targets += [Target(name, name) for name in source.tensors if name not in moved]
    order = {name: i for i, name in enumerate(source.tensors)}
    return sorted(targets, key=lambda target: order[target.source]), changed, new


def pick_zero(name: str, config: dict, zero: str | None) -> str:
    """Which factor of the copies is zero. None takes what the class has, projections first."""
    rules = block_lists(name, config)
    possible = [factor for factor in ("proj", "gate") if all(getattr(rule, factor) for rule in rules)]
    if zero is None:
        return possible[0]
    if zero == "both":
        raise ValueError("with gates and projections both zero, a copy never gets a gradient: zero one")
    if zero not in possible:
        raise ValueError(f"{name} cannot be grown with zero {zero!r}; it can with {' or '.join(possible)}")
    return zero


def grow(folder, out, add=None, where="insert", zero=None, at=None) -> Summary:
    """Grow the diffusers model in `folder`, or the transformer of the pipeline in `folder`, into `out`, which
    must not exist. It is written whole or not at all.

    add: blocks to add to the model, or a list with one number per list of blocks. where: "insert", "prefix"
    or "suffix", as in grow.py. zero: "proj" or "gate"; None takes what the class has. at: numbers of blocks;
    each gets a copy right after it, instead of `add`. Raises ValueError or OSError, in one line."""
    folder, out = Path(folder), Path(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already: name another folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} would be a part of {folder}, which is copied: name a folder elsewhere")
    source = read_source(model_folder(folder))
    name = source.config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{source.folder}/config.json has no _class_name: it is not a diffusers model")
    if where not in WHERE:
        raise ValueError(f"no stacking is called {where!r}; there are {', '.join(WHERE)}")
    history = read_history(source.config)
    zero = pick_zero(name, source.config, zero)
    targets, changed, blocks = make_targets(source, zero, add, where, at)
    history = [{**event, "new": [moved(block, blocks) for block in event["new"]]} for event in history]
    earlier = [block for event in history for block in event["new"]]
    where = "at" if at is not None else where
    event = {"grow": "depth", "where": where, "zero": zero, "changed": changed, "new": blocks}
    config = {**source.config, HISTORY: [*history, event]}
    config |= {count: after for count, (_, after) in changed.items()}
    if name == "EasyAnimateTransformer3DModel":  # all blocks are of one kind, and stay so
        config["mmdit_layers"] = max(config.get("mmdit_layers", EASY_LAYERS), config["num_layers"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            new = Path(temporary, out.name)
            files, copied = write_folder(folder, new, source, config, targets)
            new.rename(out)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{out} could not be written: {reason}") from None
    before = sum(torch.Size(entry.shape).numel() for entry in source.tensors.values())
    after = sum(torch.Size(source.tensors[target.source].shape).numel() for target in targets)
    size = sum(source.tensors[target.source].size for target in targets)
    return Summary(model_folder(out), changed, (before, after), blocks, earlier, size, files, copied)


# --------------------------------------------------------------------------------------------------------
# Writing


def write_folder(
    folder: Path, new: Path, source: Source, config: dict, targets: list[Target]
) -> tuple[int, int]:
    """Write a grown model or pipeline to `new` -> the number of files of weights, and the bytes of others."""
    size = sum(source.tensors[target.source].size for target in targets)
    others = other_files(folder, source.folder)
    copied = sum(file.stat().st_size for file in others)
    free = shutil.disk_usage(new.parent).free
    if size + copied > free:
        needed = f"it takes {(size + copied) / 1e6:,.1f} MB"
        raise OSError(f"{needed}, and the disk has {free / 1e6:,.1f} MB left")
    grown = new / source.folder.relative_to(folder)
    grown.mkdir(parents=True)
    for file in others:
        copy = new / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (grown / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = split_into_shards(source, targets)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"{STEM}.safetensors"
        if source.sharded:
            file = f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(grown / file, source, shard)
        weight_map |= dict.fromkeys([target.name for target in shard], file)
    if source.sharded:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (grown / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(shards), copied


def other_files(folder: Path, model: Path) -> list[Path]:
    """The files that are copied: all but TOOLS, and the weights and config.json in the folder of `model`."""
    files = []
    for path in sorted(folder.iterdir()):
        rewritten = path.name == "config.json" or WEIGHTS & set(path.suffixes)
        if path.is_dir():
            if path.name not in TOOLS:
                files += other_files(path, model)
        elif folder != model or not rewritten:
            files.append(path)
    return files


def split_into_shards(source: Source, targets: list[Target]) -> list[list[Target]]:
    """Groups of tensors, none larger than the largest shard of the source; one group if it is not sharded."""
    if not source.sharded:
        return [targets]
    sizes = {}
    for entry in source.tensors.values():
        sizes[entry.file] = sizes.get(entry.file, 0) + entry.size
    shards, filled = [[]], 0
    for target in targets:
        size = source.tensors[target.source].size
        if shards[-1] and filled + size > max(sizes.values()):
            shards.append([])
            filled = 0
        shards[-1].append(target)
        filled += size
    return shards


def write_tensors(file: Path, source: Source, targets: list[Target]):
    """Write a file of safetensors, one tensor at a time: the bytes of the header in 8 bytes, the header as
    JSON, the data. Larger types come first, so that each tensor begins at a multiple of its own."""
    targets = sorted(targets, key=lambda target: -source.tensors[target.source].width)
    header, end = {"__metadata__": {**source.metadata, "format": "pt"}}, 0
    for target in targets:
        entry = source.tensors[target.source]
        place = [end, end + entry.size]
        header[target.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": place}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for target in targets:
            opened.write(target_tensor(source, target).reshape(-1).view(torch.uint8).numpy())
    fsync(file)


def target_tensor(source: Source, target: Target) -> torch.Tensor:
    """A tensor of the grown checkpoint."""
    tensor = read_tensor(source, target.source)
    if target.zero == "all":
        return torch.zeros_like(tensor)
    if target.zero == "gate":
        tensor = tensor.clone()
        gate_rows(tensor, target.pieces).zero_()
    return tensor


def moved(name: str, new: list[str]) -> str:
    """The name of a block, or of a tensor of it or its LoRA adapter, once the blocks `new` are in the stack:
    moved("blocks.2.ffn.net.2.bias", ["blocks.1", "blocks.4"]) is "blocks.3.ffn.net.2.bias"."""
    parts = name.split(".")
    if parts[0].startswith("text_encoder"):  # the blocks of a LoRA's other half
        return name
    for i, part in enumerate(parts[:-1]):
        taken = sorted(int(block.split(".")[1]) for block in new if block.split(".")[0] == part)
        if not taken or not parts[i + 1].isdecimal():  # it is not the name of a list that has grown
            continue
        number = int(parts[i + 1])
        for place in taken:
            if place <= number:
                number += 1
        return ".".join([*parts[: i + 1], str(number), *parts[i + 2 :]])
    return name


def read_history(config: dict) -> list[dict]:
    """The growths of a model, oldest first. `new` of each holds the numbers that its blocks have now. Raises
    ValueError if the entry is not a history."""
    history = config.get(HISTORY, [])
    try:
        for event in history:
            if event["grow"] != "depth":
                raise ValueError("it has an unknown growth")
            " ".join(event["new"])
        history_tree(history)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{HISTORY} in config.json is not a history of growth: {error}") from None
    return list(history)


def tree_of(config: dict) -> str:
    """The history of a model as a tree, or a line that says that there is none."""
    history = []
    for event in read_history(config):
        history.append({**event, "new": " ".join(event["new"])})
    return history_tree(history) or f"{config['_class_name']}, never grown"
