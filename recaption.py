"""Re-captioning: the LLM rewrites a short prompt in more detail, and the reply is checked.

A model that was trained on detailed captions is asked with short prompts. ModelGrow (arXiv 2412.18966, figure
2) lets the LLM that reads the prompt bridge that gap (`sample.py --recaption`). The LLM gets ModelGrow's
instruction, in our words, and three examples. Its reply has to begin with the prompt itself:

    user       Rewrite the prompt ...  Prompt: two children flying a kite
    assistant  two children flying a kite on a wide grassy hill. ...
    user       Rewrite the prompt ...  Prompt: a cat surfing
    assistant  a cat surfing                                            <- the LLM continues here

A model of 135 M parameters is fluent but not faithful. So three rules keep it to the prompt. Words that
contradict the prompt are never sampled (`contradictions`): opposite directions, and other colors or numbers
if the prompt names one. Several replies are sampled, and each is checked (`find_fault`). If none passes, the
prompt is used unchanged. No model is ever trained on a reply.

Left out: larger LLMs behind an interface of their own, beam search, a learned judge of faithfulness.
"""

import argparse
import re
from collections import Counter

import torch

from machine import run_command
from text_encoder import EXAMPLES, INSTRUCTION, LLM_TOKENS, LanguageModel

MIN_WORDS, MAX_WORDS = 35, 128  # of a re-caption; INSTRUCTION says the same
MAX_NEW_TOKENS = 100  # that the LLM may add to the prompt
SMALL_WORDS = {  # that a re-caption may lose
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "by", "with", "from", "into", "over",
    "under", "is", "are", "was", "be", "it", "its", "this", "that", "there",
}  # fmt: skip
COLORS = {
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white",
    "grey", "gray", "golden", "silver", "crimson", "scarlet", "tangerine", "apricot", "lemon", "emerald",
    "lime", "azure", "navy", "lavender", "ruby", "amber", "mustard", "jade", "olive", "cobalt", "plum",
    "sapphire", "mauve", "amethyst", "magenta", "teal", "turquoise",
}  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {str(number): word for number, word in enumerate(NUMBERS, 2)}
OPPOSITES = [
    ({"left", "leftward", "leftwards", "west"}, {"right", "rightward", "rightwards", "east"}),
    ({"up", "upward", "upwards", "rising", "rises", "ascending", "climbing", "climbs", "soaring"},
     {"down", "downward", "downwards", "falling", "falls", "descending", "dropping", "sinking"}),
]  # fmt: skip


def words(text: str) -> list[str]:
    """The words of a text, in lower case. A number in digits is a word, or with more than ten none."""
    found = re.findall(r"[^\W\d_]+|\d+", text.lower())
    return [DIGITS.get(word, word) for word in found if not word.isdecimal() or word in DIGITS]


def contradictions(prompt: str) -> set[str]:
    """Words that a re-caption must not have. If the prompt names colors, all other colors; if it names
    numbers, all other numbers; if it names a direction and not its opposite, the opposite."""
    named = set(words(prompt))
    wrong = set()
    for kind in (COLORS, {*NUMBERS}):
        if kind & named:
            wrong |= kind - named
    for one, other in OPPOSITES:
        if one & named and not other & named:
            wrong |= other
        if other & named and not one & named:
            wrong |= one
    return wrong


def find_fault(prompt: str, reply: str) -> str:
    """Why a re-caption of the prompt must not be used, or "". The faults: a wrong number of words, a lost
    word of the prompt (except SMALL_WORDS), a contradiction, the same four words more than twice."""
    reply_words = words(reply)
    if not MIN_WORDS <= len(reply_words) <= MAX_WORDS:
        return f"{len(reply_words)} words, not {MIN_WORDS} to {MAX_WORDS}"
    for word in words(prompt):
        if word not in SMALL_WORDS and word not in reply_words:
            return f"it lost {word!r}"
    wrong = contradictions(prompt).intersection(reply_words)
    if wrong:
        return f"it says {min(wrong)!r}, which contradicts the prompt"
    fours = Counter(zip(reply_words, reply_words[1:], reply_words[2:], reply_words[3:], strict=False))
    return "it repeats itself" if max(fours.values()) > 2 else ""


def conversation(llm: LanguageModel, prompt: str) -> str:
    """The instruction with its examples, the prompt, and the beginning of the reply."""
    turns = []
    for short, rest in EXAMPLES.items():
        turns += [INSTRUCTION + short, short + rest]
    return llm.chat(*turns, INSTRUCTION + prompt, add_generation_prompt=True) + prompt


@torch.no_grad()
def sample_replies(llm: LanguageModel, prompt: str, tries: int, seed: int) -> list[str]:
    """`tries` replies of the LLM, without the prompt that they begin with. Words that contradict the prompt
    are never sampled. The random state outside stays as it is."""
    text = conversation(llm, prompt)
    tokens = llm.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(llm.device)
    never = []  # the tokens of each word
    for word in contradictions(prompt):
        never.append(llm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
    on_gpu = llm.device.type == "cuda"
    with torch.random.fork_rng(devices=[llm.device] if on_gpu else []):
        torch.manual_seed(seed % 2**63)
        replies = llm.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            num_return_sequences=tries,
            no_repeat_ngram_size=4,
            bad_words_ids=never or None,
            pad_token_id=llm.tokenizer.pad_token_id,
        )
    new_tokens = replies[:, tokens["input_ids"].shape[1] :]
    return llm.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def recaption(llm: LanguageModel, prompt: str, tries: int = 8, seed: int = 0) -> tuple[str, str]:
    """A prompt -> (the prompt in more detail, ""), or ("", the reason why there is no re-caption).

    There is none if the prompt has no words or MIN_WORDS already, or if each of the `tries` replies has a
    fault; the reason is then the fault of the first. The same seed gives the same reply on the same machine.
    Raises ValueError if the LLM has no chat template.
    """
    if not llm.tokenizer.chat_template:
        raise ValueError("this LLM has no chat template, so it cannot be asked for a re-caption")
    count = len(words(prompt))
    if not 0 < count < MIN_WORDS or len(llm.tokenizer(prompt)["input_ids"]) > LLM_TOKENS:
        return "", "the prompt has no words, or too many already"
    faults = []
    for rest in sample_replies(llm, prompt, tries, seed):
        reply = " ".join((prompt + rest).split())
        end = max(reply.rfind(mark) for mark in ".!?")
        reply = reply[: end + 1]  # whole sentences
        fault = find_fault(prompt, reply)
        if not fault:
            return reply, ""
        faults.append(fault)
    return "", f"none of {tries} re-captions was faithful: {faults[0]}"


def main(argv=None):
    """Print the re-caption of a prompt: `python recaption.py "a cat surfing"`."""
    parser = argparse.ArgumentParser(description="Let an LLM rewrite a prompt in more detail.")
    parser.add_argument("prompt")
    parser.add_argument("--llm", default="smollm2", help="smollm2 (default), a directory or a Hub id")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another re-caption (0)")
    args = parser.parse_args(argv)
    reply, reason = recaption(LanguageModel(args.llm), args.prompt, seed=args.seed)
    print(reply or f"no re-caption: {reason}")


if __name__ == "__main__":
    run_command(main)
