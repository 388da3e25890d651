"""A folder of real clips as a data set: captions, and a cache of pixels.

    my_clips/
        metadata.jsonl          {"file_name": "surf.mp4", "text": "A cat surfs ...", "text_short": "a cat"}
        surf.mp4
        walks/dog.webm          its caption may also lie beside it, in walks/dog.txt
        walks/bird/0001.png     a folder of pictures is a clip too

**Captions** come from metadata.jsonl or metadata.csv at the top ("file_name", and "text" or "caption"), else
from a text file beside the clip, else from the name of its subfolder. A clip without a caption is bad, also
if its text is empty or not UTF-8. "text" is the detailed caption; "text_short" serves `--captions short`.
Metadata can only refer to files that a walk through the folder has found: absolute paths, `..` and symbolic
links lead nowhere.

**Cache.** Every file is decoded once (decode.py), and its clips are kept in one safetensors file. The name of
that file depends on the video's path, size and time of change, on the shape and frame rate of the clips, and
on `CLIPS_VERSION`. Training reads the clips of a batch from there, so a data set may exceed the memory.

**Bad files** and bad lines of metadata are skipped, with a name and a reason. If they are more than a share
of all (`--max-bad`), nothing is trained. The next run tries bad files again, since the machine may be the
reason. A resumed run does not: it goes on with the clips that it began with.

**Passed over**, with a note: hidden folders, links to folders, runs, samples and previews of this project,
and text files that could be meant as captions but are not read.

**Validation** is on a tenth of the files (`--validation`), chosen by a hash of their names. Clips of one film
never fall on both sides, and a file stays on its side when others are added. If one side is empty, both have
all files.

Left out: buckets of several shapes, captions by a multimodal LLM, archives, remote files.
"""

import csv
import difflib
import hashlib
import json
import math
import os
import statistics
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from decode import MAX_CLIPS, OTHER_VIDEOS, PICTURES, VIDEOS, DecodingPool
from machine import cache_dir, decode_text, write_cache
from video import FPS, is_marked, save_grid

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".srt", ".vtt")  # what may be meant as captions
RUN_FILES = ("metrics.jsonl", "checkpoint/model.safetensors", "model.safetensors")  # one of them makes a run
CLIPS_VERSION = 3  # of decoded pixels: add one when decode.py makes other pixels of the same file
VALIDATION = 0.1  # share of the files that is held out
FEW = 10  # held-out files are named if they are not more
NAMED = 5  # files that a note names
COMPARED = 10_000  # pairs of names that are searched for typos
MAX_BAD = 0.1  # share of files and lines that may be bad
MAX_LINE = 1 << 20  # bytes of a line of metadata
MAX_CAPTION = 2000  # characters
GROUP = 64  # files that are decoded before their clips are written
MAX_WAITING = 1 << 30  # bytes of clips that wait for that


# --------------------------------------------------------------------------------------------------------
# Files


def why_not_below(folder: Path) -> str:
    """Why a folder is passed over; "" if it is not."""
    if folder.name.startswith("."):
        return "hidden folders"
    if folder.is_symlink():
        return "links to folders"
    if any((folder / name).is_file() for name in RUN_FILES):
        return "runs of this project"
    return ""


def why_not_read(file: Path) -> str:
    """Why a video or picture is passed over; "" if it is not."""
    if file.name.lower().endswith(OTHER_VIDEOS):
        return f"{file.suffix.lower()} videos, which are not read,"
    if file.is_file() and is_marked(file):
        return "files that this project has made"
    return ""


def unread_texts(folder: Path, root: Path, names: list[str], subfolders: list[str]) -> list[Path]:
    """The files of a folder that could be meant as captions but are not read."""
    clips = [*subfolders, *(Path(name).stem for name in names if name.lower().endswith(VIDEOS))]
    read = {one_form(f"{clip}.txt") for clip in clips}
    if folder == root:
        read.update(METADATA)
    texts = [name for name in sorted(names) if name.lower().endswith(TEXTS) and not name.startswith(".")]
    return [folder / name for name in texts if one_form(name) not in read]


def walk(root: Path) -> tuple[list[Path], list[OSError], dict[str, list[Path]]]:
    """The videos and folders of pictures below `root` in order; errors; and what is passed over, by reason.
    Hidden files are not mentioned."""
    clips, errors, passed_over = [], [], {}
    for folder, subfolders, names in os.walk(root, onerror=errors.append):
        read = {VIDEOS: [], PICTURES: []}
        for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if not file.name.lower().endswith((*VIDEOS, *PICTURES, *OTHER_VIDEOS)):
                continue
            if why := why_not_read(file):
                passed_over.setdefault(why, []).append(file)
            else:
                read[VIDEOS if file.name.lower().endswith(VIDEOS) else PICTURES].append(file)
        clips += read[VIDEOS]
        if texts := unread_texts(Path(folder), root, names, subfolders):
            why = "text files other than metadata.jsonl or .csv at the top and NAME.txt beside a clip"
            passed_over.setdefault(why, []).extend(texts)
        is_leaf = all(name.startswith(".") for name in subfolders)
        if read[PICTURES] and not read[VIDEOS] and is_leaf and Path(folder) != root:
            clips.append(Path(folder))
        below = []
        for name in sorted(subfolders):
            if why := why_not_below(Path(folder, name)):
                passed_over.setdefault(why, []).append(Path(folder, name))
            else:
                below.append(name)
        subfolders[:] = below
    return clips, errors, passed_over


def find_clips(root: Path) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """The videos and folders of pictures below `root`, as paths relative to it, in order; problems, (what,
    why); and notes about what is passed over."""
    clips, errors, passed_over = walk(root)
    found, problems, notes = [], [], []
    for clip in clips:
        name = clip.relative_to(root).as_posix()
        if not (clip.is_file() or clip.is_dir()):  # a link to nothing or to itself, a pipe, ...
            problems.append((name, "it is not a file"))
        elif root.resolve() not in clip.resolve().parents:
            problems.append((name, "it is a link out of the folder"))
        else:
            found.append(name)
    problems += [(error.filename, error.strerror) for error in errors]
    for why, paths in passed_over.items():
        names = [path.relative_to(root).as_posix() for path in paths]
        notes.append(f"{len(names)} {why} are passed over: {name_some(names)}")
    return found, problems, notes


def in_validation(name: str, share: float = VALIDATION) -> bool:
    """Whether a file belongs to the share that is held out, a tenth by default. A larger share holds the
    files of a smaller one, and share 0 none."""
    return hashlib.sha256(os.fsencode(one_form(name))).digest()[0] < math.ceil(256 * share)


def choose_evenly(items: list, count: int) -> list:
    """`count` of the items, at equal distances; all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def printable(text: str) -> str:
    """A name or a reason as it may be printed: in one line, whatever bytes a file is called."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------------
# Captions


def clean(text: str) -> str:
    """One line that can be written to a file and read by a tokenizer."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join(text.split())


def one_form(name: str) -> str:
    """A name in Unicode's composed form (NFC): systems write the same letters in different ways."""
    return unicodedata.normalize("NFC", name)


def read_lines(path: Path, problems: list):
    """(number, text) of each line of a text file. A line that is too long, or not UTF-8, becomes an empty
    one and a problem. A file in UTF-16 is one problem and has no lines."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            where = f"{path.name}, line {number}"
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                problems.append((where, f"it is longer than {MAX_LINE} bytes"))
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                line = b"\n"
            try:
                text = decode_text(line)
            except ValueError as error:
                if "UTF-16" in str(error) and number == 1:
                    problems.append((path.name, str(error)))
                    return
                problems.append((where, str(error)))
                text = "\n"
            yield number, text


def read_jsonl(path: Path, problems: list):
    """(number of the line, {column: value}) of each row of metadata.jsonl."""
    for number, line in read_lines(path, problems):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            problems.append((f"{path.name}, line {number}", "it is not a JSON object"))
            continue
        yield number, row


def read_csv(path: Path, problems: list, names: set[str]):
    """(number of the line, {column: value}) of each row of metadata.csv. `names` of clips tell where a row
    begins: a quote that is not closed makes one row bad, and those below it are read."""
    numbered = list(read_lines(path, problems))
    columns, start = None, 0
    while start < len(numbered):
        number = numbered[start][0]
        rows = csv.reader((numbered[i][1] for i in range(start, len(numbered))), strict=True)
        try:
            values = next(rows)
            for _, line in numbered[start + 1 : start + rows.line_num]:
                if not names.isdisjoint(part.strip('"') for part in line.strip().split(",")):
                    raise csv.Error("a quote is not closed")
            if columns and len(values) > len(columns):
                raise csv.Error("it has more values than columns: a text with commas needs quotes")
        except csv.Error as error:
            problems.append((f"{path.name}, line {number}", str(error)))
            start += 1
            continue
        start += rows.line_num
        if not values:
            continue
        if columns is None:
            columns = values
            if len(values) == 1 and (";" in values[0] or "\t" in values[0]):
                problems.append((f"{path.name}, line {number}", "its columns must be separated by commas"))
                return
        else:
            yield number, dict(zip(columns, values, strict=False))


def read_row(row: dict, known: dict[str, str], captions: dict) -> tuple[str, str, str]:
    """A row of metadata -> (file, caption, short caption). Raises ValueError for a bad row, KeyError with the
    name of a file that is not there."""
    name = row.get("file_name")
    text = row.get("text") or row.get("caption")
    short = row.get("text_short") or text
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(short, str)):
        raise ValueError('it has no "file_name", or no "text" or "caption", that is a text')
    path = Path(name).as_posix()
    if path not in known and one_form(path) not in known:
        raise KeyError(path)
    name = known.get(path) or known[one_form(path)]
    text, short = clean(text), clean(short) or clean(text)
    if not text:
        raise ValueError("the caption is empty")
    if name in captions and captions[name] != (text, short):
        before, short_before = captions[name]
        if before != text or (short != text and short_before != text):
            raise ValueError(f"{name[:80]!r} has a caption already")
        short = short_before if short == text else short  # one of the two rows has a short caption
    return name, text, short


def read_metadata(root: Path, found: list[str]) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """{file: (caption, short caption)} for those of `found` that metadata names; and problems."""
    captions, problems, unknown = {}, [], []
    known = {one_form(name): name for name in found} | {name: name for name in found}
    for file_name in METADATA:
        path = root / file_name
        if path.is_symlink():
            problems.append((file_name, "it is a link"))
            continue
        if not path.is_file():
            continue
        is_csv = file_name.endswith(".csv")
        rows = read_csv(path, problems, set(known)) if is_csv else read_jsonl(path, problems)
        for number, row in rows:
            try:
                name, text, short = read_row(row, known, captions)
            except ValueError as error:
                problems.append((f"{file_name}, line {number}", str(error)))
                continue
            except KeyError as error:
                unknown.append((f"{file_name}, line {number}", error.args[0]))
                continue
            captions[name] = text, short
    lost = [name for name in found if name not in captions and not text_beside(root / name).is_file()]
    for where, name in unknown:
        similar = []
        if len(unknown) * len(lost) <= COMPARED:
            similar = difflib.get_close_matches(name, lost, 1)
        typo = f": a typo for {similar[0]!r}, which has no caption?" if similar else ""
        problems.append((where, f"no clip in this folder is called {name[:80]!r}{typo}"))
    return captions, problems


def text_beside(clip: Path) -> Path:
    """Where the caption of a clip lies if it has a file of its own: with its name and the ending .txt."""
    stem = clip.name if clip.is_dir() else clip.stem
    beside = clip.with_name(f"{stem}.txt")
    if beside.is_file() or stem.isascii():
        return beside
    for other in clip.parent.glob("*.txt"):
        if one_form(other.name) == one_form(beside.name):
            return other
    return beside


def read_text_beside(clip: Path) -> str:
    """The text beside a clip; "" if there is no file. Raises ValueError for one that is a link, empty or not
    text."""
    beside = text_beside(clip)
    if not beside.is_file() and not beside.is_symlink():
        return ""
    try:
        if beside.is_symlink():
            raise ValueError("it is a link")
        with beside.open("rb") as file:
            content = file.read(MAX_LINE + 1)
        if len(content) > MAX_LINE:
            raise ValueError(f"it is longer than {MAX_LINE} bytes")
        if text := clean(decode_text(content)):
            return text
        raise ValueError("it is empty")
    except ValueError as error:
        raise ValueError(f"its caption, {beside.name}: {error}") from None


def name_of_folder(name: str) -> str:
    """The subfolder that a clip lies in, as words; "" at the top, whose name says nothing about one clip."""
    return clean(Path(name).parent.name.replace("_", " ").replace("-", " "))


def read_captions(root: Path, found: list[str]) -> tuple[dict[str, tuple[str, str]], list, list[str]]:
    """{file: (caption, short caption)} of those of `found` whose captions can be read; problems; and notes
    about captions that are missing or too long."""
    captions, problems = read_metadata(root, found)
    from_folder, too_long = [], []
    for name in found:
        if name not in captions:
            try:
                text = read_text_beside(root / name)
            except ValueError as error:
                problems.append((name, str(error)))
                continue
            if not text and (text := name_of_folder(name)):
                from_folder.append(name)
            if not text:
                beside = text_beside(root / name).name
                problems.append((name, f"it has no caption: write one into {beside} or metadata.jsonl"))
                continue
            captions[name] = text, text
        if max(map(len, captions[name])) > MAX_CAPTION:
            too_long.append(name)
        text, short = captions[name]
        captions[name] = text[:MAX_CAPTION], short[:MAX_CAPTION]
    notes = []
    if from_folder:
        what = f"{len(from_folder)} files have the name of their folder as caption"
        notes.append(f"{what}: {name_some(from_folder)}")
    if too_long:
        notes.append(f"{len(too_long)} captions are cut at {MAX_CAPTION} characters: {name_some(too_long)}")
    return captions, problems, notes


def name_some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(printable, names[:NAMED])) + more


# --------------------------------------------------------------------------------------------------------
# The cache


def cache_place(path: Path, frames: int, size: int, fps: float) -> Path:
    """Where the clips of a file lie once it is decoded. A file that has changed has another place."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    key = json.dumps([os.fsencode(path.resolve()).hex(), stamps, frames, size, fps, CLIPS_VERSION])
    return cache_dir() / f"clips-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_entry(place: Path) -> dict | None:
    """What a file of the cache says about its clips, and its place; None if it is not there, or damaged."""
    try:
        with safe_open(place, "pt") as file:
            return json.loads(file.metadata()["about"]) | {"place": place}
    except (OSError, SafetensorError):
        return None


def decode_new(
    root: Path, places: dict[str, Path], frames: int, size: int, fps: float
) -> tuple[dict[str, dict], dict[str, str]]:
    """Decode those files of `places`, {file: its place in the cache}, that are not there yet -> {file: what
    the cache says about it}, and {file: why it could not be decoded}. Raises OSError, for example if the disk
    is full."""
    entries = {name: read_entry(place) for name, place in places.items()}
    new, failed = [name for name, entry in entries.items() if not entry], {}
    if not new:
        return entries, failed
    workers = min(torch.get_num_threads(), 8, len(new))
    step = max(1, min(GROUP, MAX_WAITING // (MAX_CLIPS * 3 * frames * size**2)))
    bar = tqdm(total=len(new), desc="decoding clips", unit="file")
    with DecodingPool(workers, frames, size, fps) as pool, bar:
        for start in range(0, len(new), step):
            names = new[start : start + step]
            results = pool.decode([root / name for name in names], bar.update)
            for name, (clips, about, fault) in zip(names, results, strict=True):
                if fault:
                    failed[name] = fault
                    continue
                about |= {"clips": len(clips)}
                tensors = {"clips": torch.from_numpy(clips).contiguous()}
                write_cache(places[name], tensors, {"about": json.dumps(about)})
                entries[name] = about | {"place": places[name]}
    return {name: entry for name, entry in entries.items() if entry}, failed


class CachedClips:
    """Clips of the cache in place of a tensor, uint8 (N, 3, T, H, W): only what is indexed is read.

    places: for each clip, the file of the cache that holds it, and its number there."""

    device = torch.device("cpu")

    def __init__(self, places: list[tuple[Path, int]]):
        self.places = places
        self.shape = torch.Size([len(places), *self.read(0).shape])
        self.nbytes = self.shape.numel()

    def __len__(self):
        return len(self.places)

    def read(self, row: int) -> torch.Tensor:
        place, number = self.places[row]
        with safe_open(place, "pt") as file:
            return file.get_slice("clips")[number]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B,) -> uint8 (B, 3, T, H, W)."""
        clips = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for clip, row in zip(clips, rows.tolist(), strict=True):
            clip.copy_(self.read(row))  # which is mapped from its file: a process has only so many mappings
        return clips


# --------------------------------------------------------------------------------------------------------
# The data set


@dataclass
class Scan:
    """What is known of a folder. The order of `entries`, {file: what the cache says about it}, is that of the
    files; `captions` is {file: (caption, short caption)}, `problems` [(what was skipped, why)], and `notes`
    lines about what a user may not have meant."""

    root: Path
    entries: dict[str, dict]
    captions: dict[str, tuple[str, str]]
    problems: list[tuple[str, str]]
    notes: list[str]


def scan(root: Path | str, frames: int = 8, size: int = 32, fps: float = FPS, skipped=()) -> Scan:
    """Find the clips and captions of a folder, and decode what is not in the cache yet. Clips whose names, as
    they are printed, are in `skipped` are passed over. One scan serves both parts of `FolderDataset`. Raises
    OSError or ValueError, with a one-line message for user errors."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if min(frames, size) < 1 or not 0.01 <= fps <= 1000:
        raise ValueError(f"there are no clips of {frames} frames of {size} pixels at {fps:g} a second")
    found, problems, passed_over = find_clips(root)
    captions, bad_captions, notes = read_captions(root, found)
    skipped = set(skipped)
    wanted = [name for name in found if name in captions and printable(name) not in skipped]
    places = {name: cache_place(root / name, frames, size, fps) for name in wanted}
    entries, failed = decode_new(root, places, frames, size, fps)
    problems = [*problems, *bad_captions, *failed.items()]
    problems = [(printable(what), printable(why)) for what, why in problems]
    return Scan(root, entries, captions, problems, [*passed_over, *notes])


def split(names: list[str], share: float = VALIDATION) -> tuple[list[str], list[str], str]:
    """Files -> those to train on, those for validation, and a note that says which these are."""
    held_out = [name for name in names if in_validation(name, share)]
    kept = [name for name in names if not in_validation(name, share)]
    if not (held_out and kept):
        return names, names, "nothing is held out: validation is on the clips that are trained on"
    which = f": {', '.join(map(printable, held_out))}" if len(held_out) <= FEW else ""
    verb = "is" if len(held_out) == 1 else "are"
    note = f"{len(held_out)} of {len(names)} files {verb} held out for validation{which}"
    return kept, held_out, note


def why_refused(scanned: Scan, max_bad: float = MAX_BAD) -> str:
    """Why nothing is trained: there are no clips, or more than the share `max_bad` of all is bad; else ""."""
    bad = len(scanned.problems)
    total = bad + len(scanned.entries)
    if bad > max_bad * total or (bad and not scanned.entries):
        names = name_some([what for what, _ in scanned.problems])
        return (
            f"{bad} of {total} files and lines of {scanned.root} are bad, more than --max-bad {max_bad:g}: "
            f"{names[:300]}; the first: {scanned.problems[0][1][:300]}"
        )
    if not total:
        kinds = f"no video ({' '.join(VIDEOS)}) and no folder of pictures"
        return f"there are no clips in {scanned.root}: {kinds}"
    return ""


class FolderDataset:
    """The clips of a folder with captions, with the interface of `ToyDataset`.

    `part` is "train" or "validation". `caption_style` is "short", "detailed" or "both" (short and detailed in
    turn). Of more than `count` clips, `count` are chosen evenly; None takes all. `validation` is the share of
    files that is held out. Raises ValueError, in one line, as `why_refused` says."""

    def __init__(
        self, scanned: Scan, part="train", caption_style="detailed", max_bad=MAX_BAD, count=None,
        validation=VALIDATION,
    ):  # fmt: skip
        if refused := why_refused(scanned, max_bad):
            raise ValueError(f"{refused}; see `python data.py --check`")
        entries = scanned.entries
        kept, held_out, note = split(list(entries), validation)
        chosen = held_out if part == "validation" else kept
        clips = [(name, i) for name in chosen for i in range(entries[name]["clips"])]
        clips = choose_evenly(clips, count or len(clips))
        self.problems, self.notes = scanned.problems, [*scanned.notes, note]
        self.videos = CachedClips([(entries[name]["place"], i) for name, i in clips])
        self.names = [f"{printable(name)}, clip {i + 1}" for name, i in clips]
        first, second = {"detailed": (0, 0), "short": (1, 1), "both": (1, 0)}[caption_style]
        self.captions = []
        for i, (name, _) in enumerate(clips):
            column = first if i % 2 == 0 else second
            self.captions.append(scanned.captions[name][column])

    def __len__(self):
        return len(self.captions)

    def batch(self, rows) -> torch.Tensor:
        """Numbers of clips -> x (B, 3, T, H, W) float32 in [-1, 1]."""
        return self.videos[torch.as_tensor(rows)].float() / 127.5 - 1


def check(root: Path | str, out: Path, frames: int, size: int, fps: float, caption_style="detailed"):
    """Print what is in a folder and what is wrong with it, and draw some of it: preview-NAME.png and .gif in
    `out`. This is `python data.py --check DIR`. Raises ValueError if train.py would refuse the folder."""
    scanned = scan(root, frames, size, fps)
    captions = {name: scanned.captions[name][caption_style == "short"] for name in scanned.entries}
    count = sum(entry["clips"] for entry in scanned.entries.values())
    print(f"{len(scanned.entries)} files, {count} clips of {frames} frames of {size} x {size} pixels")
    if captions:
        print_summary(scanned, captions)
    for note in scanned.notes:
        print(f"note: {note}")
    for what, why in scanned.problems:
        print(f"skipped: {what}: {why}")
    if captions:
        draw_preview(scanned, captions, out, fps)
    if refused := why_refused(scanned):
        raise ValueError(f"train.py would refuse: {refused}")


def draw_preview(scanned: Scan, captions: dict[str, str], out: Path, fps: float):
    """Draw the first clips of at most 32 files, with names and captions."""
    names = choose_evenly(list(captions), 32)
    clips = CachedClips([(scanned.entries[name]["place"], 0) for name in names])
    videos = clips[torch.arange(len(names))].permute(0, 2, 3, 4, 1).numpy()
    labels = [f"{printable(name)}: {captions[name]}" for name in names]
    out.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "gif"):
        path = out / f"preview-{scanned.root.resolve().name}.{ending}"
        print(f"drawing {path}", flush=True)
        save_grid(path, videos, labels, columns=min(len(videos), 8), fps=fps)


def print_summary(scanned: Scan, captions: dict[str, str]):
    """Print lengths, sizes, captions, the held-out part and the notes of a folder."""
    entries = scanned.entries.values()
    seconds = sorted(entry["seconds"] for entry in entries)
    print(f"{sum(seconds):.1f} s are used, {seconds[0]:.2f} to {seconds[-1]:.2f} s of a file")
    sizes = Counter(f"{entry['width']}x{entry['height']}" for entry in entries).most_common()
    more = f" and {len(sizes) - 8} more" if len(sizes) > 8 else ""
    print("sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes[:8]) + more)
    words = statistics.median(len(text.split()) for text in captions.values())
    print(f"captions: {len(set(captions.values()))} different, of {words:g} words (median)")
    print(split(list(captions))[2])
    notes = {}
    for name, entry in scanned.entries.items():
        for note in entry["notes"]:
            notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        print(f"note: {note}: {name_some(names)}")
