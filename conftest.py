"""Helpers of all tests: small random models, encoders and LLMs. No test sees or fills the user's cache."""

import functools
import json
import multiprocessing
import os
import time

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from dit import DiT, DiTConfig
from run import Checkpoint, Run, Signals

settings.register_profile("same", derandomize=True, deadline=None, database=None)  # the same examples always
settings.load_profile("same")

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: each process takes one core
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

SMALL = DiTConfig(frames=4, size=16, patch_time=2, patch_size=4, width=24, depth=3, heads=2, text_dim=12)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Tests have a cache of their own."""
    os.environ["MODELGROW_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def signals_end_the_tests():
    """A training takes SIGTERM or Ctrl-C as a wish to save and stop. Inside a test, the tests end too."""
    stop = Signals.stop

    @functools.wraps(stop)
    def stop_and_pass_on(signals, number, frame):
        stop(signals, number, frame)
        os.kill(os.getpid(), number)  # again, now that the handlers are those of pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Signals, "stop", stop_and_pass_on)
        yield


@pytest.fixture(scope="session")
def encoder_name(tmp_path_factory):
    """The directory of a tiny random text encoder."""
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), "bert")


@torch.no_grad()
def randomize(model, seed=0):
    """Fill every parameter with random numbers, also those that start at zero, so that every branch acts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def random_model(config=SMALL, seed=0, dtype=torch.float32):
    """A model in which every branch acts: no weight is zero."""
    return randomize(DiT(config), seed).to(dtype)


def random_inputs(config=SMALL, batch=2, length=5, seed=0, dtype=torch.float32):
    """-> x_t, t, text, text_mask; the prompts differ in length."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, config.frames, config.size, config.size, generator=g, dtype=dtype)
    text = torch.randn(batch, length, config.text_dim, generator=g, dtype=dtype)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=g)
    return x, torch.rand(batch, generator=g, dtype=dtype), text, mask


def call(model, inputs, seed=0):
    """The model on `inputs`, and on random features of an LLM if it reads them."""
    x = inputs[0]
    if not model.config.llm_dim:
        return model(*inputs)
    generator = torch.Generator().manual_seed(seed)
    llm = torch.randn(len(x), 5, model.config.llm_dim, generator=generator, dtype=x.dtype)
    return model(*inputs, llm, torch.ones(len(x), 5, dtype=torch.bool))


def gradients(model, inputs, seed=0):
    """-> {parameter: gradient of an arbitrary loss}, without frozen parameters."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
    (call(model, inputs) * weights).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpoint_of(model, optimizer_state=None, **metadata):
    """A checkpoint in memory whose EMA has drifted from its weights."""
    ema = random_model(model.config, 1, next(model.parameters()).dtype)
    metadata = {"text_encoder": "minilm", "history": [], "new": [], "flops": 0, "fps": 8, **metadata}
    trainer_state = dict.fromkeys(("seconds", "flops_before", "lr_before", "lr", "base_lr"), 0.5)
    return Checkpoint(model, ema, optimizer_state or {}, metadata, {"step": 40, **trainer_state})


def word_tokenizer(words, **special):
    """A tokenizer whose vocabulary is a list of words; `<unk>` stands for every other."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if "</s>" in words:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def tiny_encoder(directory, kind):
    """A random encoder, "t5" or "bert", with a vocabulary of words, saved as a directory -> its name."""
    import transformers

    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "surfing"]
    tokenizer = word_tokenizer(words, pad_token="<pad>", eos_token="</s>", model_max_length=6)
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(vocab_size=len(words), decoder_start_token_id=0, **sizes)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def tiny_llm(directory, family="Llama"):
    """A random causal LLM with a chat template, saved as a directory -> its name."""
    import transformers

    words = ["<pad>", "<end>", "<unk>", "system", "user", "a", "red", "cat", "surfing", "You", "are"]
    tokenizer = word_tokenizer(words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    if family in ("Llama", "Gemma2"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(words), **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


# --------------------------------------------------------------------------------------------------------
# Trainings

CHILDREN = multiprocessing.get_context("forkserver")  # its children have imported torch already
CHILDREN.set_forkserver_preload(["conftest", "train", "sample"])


def brief(out, encoder, options=""):
    """The command line of a training of 20 steps on clips of 4 frames of 16 pixels, as a list of words."""
    depth = "" if "--from" in options else "--depth 1"
    line = f"--quick {depth} --text {encoder} --clips 64 --batch 4 --frames 4 --size 16 --out {out} {options}"
    return line.split()


def train_without_pictures(argv):
    """`python train.py` with `argv` in this process, but without samples and loss.png, which take most of the
    time -> the run's directory."""
    import train
    import validate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "draw_samples", lambda *_: None)
        patch.setattr(Run, "plot", lambda *_: None)
        return train.train(train.parse_arguments(argv))


def run_training(out, encoder, options=""):
    """A brief training in this process -> the run's directory."""
    return train_without_pictures(brief(out, encoder, options))


def resume_training(out, options=""):
    """Continue a run in this process -> the run's directory."""
    return train_without_pictures(f"--resume --out {out} {options}".split())


def train_in_child(argv):
    """`python train.py` with `argv`, begun in a process of its own."""
    child = CHILDREN.Process(target=quiet_training, args=(argv,))
    child.start()
    return child


def quiet_training(argv):
    """What such a process does: its progress bar is not shown."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train_without_pictures(argv)


def wait_for_lines(run, count, child):
    """Wait until metrics.jsonl has `count` lines. Raises AssertionError if the child has ended before."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert child.is_alive(), f"no {count} lines in {run}"
        time.sleep(0.01)


def numbers(run):
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        line.pop("seconds", None)
        line.pop("samples_per_second", None)
        lines.append(line)
    return lines


def weights_of(run):
    """-> all tensors of a run's checkpoint: weights as trained, optimizer state, EMA."""
    tensors = load_file(run / "checkpoint" / "train_state.safetensors")
    for name, tensor in load_file(run / "checkpoint" / "model.safetensors").items():
        tensors[f"ema.{name}"] = tensor
    return tensors


def same_tensors(a, b):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_run(a, b):
    """Whether two runs have the same weights, EMA, optimizer state and metrics, bit for bit."""
    return numbers(a) == numbers(b) and same_tensors(weights_of(a), weights_of(b))
