"""Folders of real clips: captions, and a cache of pixels.

    my_clips/
        metadata.jsonl          {"file_name": "surf.mp4", "text": "A cat surfs ...", "text_short": "a cat"}
        surf.mp4
        walks/dog.webm          its caption may also lie beside it, in walks/dog.txt
        walks/bird/0001.png     a folder of pictures is a clip too

**Captions** come from metadata.jsonl or metadata.csv in the folder ("file_name", and "text" or "caption"),
else from a text file beside the clip, else they are the name of the folder it lies in. "text" is the detailed
caption; a "text_short" beside it serves `--captions short`. Metadata may only name what a walk through the
folder has found, so no path in it, absolute, upward or through a link, leads out.

**Cache.** Every file is decoded once (video.py), in as many child processes as there are cores. Its clips are
appended to a file of bytes, and then a line about it to a manifest, `COMMIT` files at a time: what no line
tells of, after a kill, is cut off and decoded again. A file counts as the same while its size and time stay;
folder, shape, rate and code have a cache each. The bytes are mapped into memory and not read: training takes
what it needs, and what it takes again comes from the system's cache.

**Bad files** are skipped with their name and a reason, and so are bad lines of metadata. If they are more
than a share (`--max-bad`) something else is wrong, and nothing is trained. The next start tries them again.

**Validation** is on a tenth of the files, chosen by a hash of their names: clips of one film never fall on
both sides, and a file stays on its side whatever is added. If a folder is so small that one side is empty,
both sides are the whole.

Left out: buckets of several shapes, captions by a multimodal LLM (bring your own), archives, remote files.
"""

import csv
import hashlib
import json
import os
import statistics
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

import video
from draw import FPS, save_grid
from text_encoder import cache_dir

MAX_BAD = 0.1  # share of files and lines that may be bad
MOST_LINE = 1 << 20  # bytes of a line of metadata
MOST_CAPTION = 2000  # characters
COMMIT = 64  # files between writes that survive a power cut
CODE = Path(video.__file__).read_text("utf-8")  # other code may make other clips


# --------------------------------------------------------------------------------------------------------
# What is in a folder


def find_clips(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The videos and folders of pictures below `root`, as paths from there, in order; and problems, (what,
    why). A folder of pictures has neither videos nor folders in it. Hidden ones and links to folders are
    passed over."""
    found, problems = [], []
    inside = root.resolve()
    for folder, folders, files in os.walk(
        root, onerror=lambda error: problems.append((error.filename, error.strerror))
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder)
        names = [name for name in sorted(files) if not name.startswith(".")]
        clips = [name for name in names if name.lower().endswith(video.VIDEOS)]
        pictures = any(name.lower().endswith(video.PICTURES) for name in names)
        if pictures and not clips and not folders and here != root:
            clips = [""]
        for name in clips:
            path = here / name
            shown = path.relative_to(root).as_posix()
            if not (path.is_file() or path.is_dir()):  # a link to nothing or to itself, a pipe, ...
                problems.append((shown, "it is not a file"))
            elif inside not in path.resolve().parents:
                problems.append((shown, "it is a link out of the folder"))
            else:
                found.append(shown)
    return found, problems


def clean(text: str) -> str:
    """One line of at most MOST_CAPTION characters that can be written down and read by a tokenizer."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:MOST_CAPTION]


def printable(text: str) -> str:
    """A name or a reason as it may be printed: in one line, whatever bytes a file is called."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_lines(path: Path, problems: list):
    """(number, text) of each line of a text file; an empty text for one that is too long, or not UTF-8."""
    with path.open("rb") as file:
        number, first = 0, b"\xef\xbb\xbf"
        while line := file.readline(MOST_LINE):
            number += 1
            if not line.endswith(b"\n") and len(line) == MOST_LINE:
                problems.append((f"{path.name}, line {number}", f"it is longer than {MOST_LINE} bytes"))
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE)
                line = b"\n"
            try:
                text = line.removeprefix(first if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError:
                problems.append((f"{path.name}, line {number}", "it is not UTF-8"))
                text = "\n"
            yield number, text


def read_rows(path: Path, problems: list):
    """(number, {column: value}) of each row of metadata.jsonl or metadata.csv; what is no row is a
    problem."""
    if path.suffix == ".jsonl":
        for number, line in read_lines(path, problems):
            try:
                if line.strip():
                    yield number, dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                problems.append((f"{path.name}, line {number}", "it is not a JSON object"))
        return
    rows = csv.DictReader(line for _, line in read_lines(path, problems))
    while True:
        try:
            row = next(rows)
            yield rows.line_num, row
        except StopIteration:
            return
        except csv.Error as error:
            problems.append((f"{path.name}, line {rows.line_num}", str(error)))


def read_metadata(root: Path, found: list[str]) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """{file: (caption, short caption)} of those in `found` that metadata tells of; and problems."""
    captions, problems, known = {}, [], set(found)
    for path in (root / "metadata.jsonl", root / "metadata.csv"):
        if path.is_symlink():
            problems.append((path.name, "it is a link"))
            continue
        for number, row in read_rows(path, problems) if path.is_file() else ():
            text = row.get("text") or row.get("caption")
            name, short = row.get("file_name"), row.get("text_short") or text
            if not (isinstance(name, str) and isinstance(text, str) and isinstance(short, str)):
                reason = 'it has no "file_name", or no "text" or "caption", that is a text'
            elif (name := Path(name).as_posix()) not in known:
                reason = f"no clip in this folder is called {name[:80]!r}"
            elif name in captions:
                reason = f"{name[:80]!r} has a caption already"
            elif not clean(text):
                reason = "the caption is empty"
            else:
                captions[name] = clean(text), clean(short) or clean(text)
                continue
            problems.append((f"{path.name}, line {number}", reason))
    return captions, problems


def caption_of(root: Path, name: str) -> str:
    """The caption of a clip that no metadata tells of: the text beside it, else the name of its folder."""
    clip = root / name
    beside = clip.with_name(f"{clip.name if clip.is_dir() else clip.stem}.txt")
    if beside.is_file() and not beside.is_symlink():
        with beside.open("rb") as file:
            if text := clean(file.read(MOST_LINE).decode("utf-8", "replace")):
                return text
    folder = clip.resolve().parent.name
    return clean(folder.replace("_", " ").replace("-", " ")) or "a video"


def in_validation(name: str) -> bool:
    """Whether a file is one of the tenth that is not trained on."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 26


# --------------------------------------------------------------------------------------------------------
# The cache


def stamp(path: Path) -> list:
    """What tells that a file, or any of a folder's, has changed."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


class Cache:
    """The decoded clips of a folder: clips.bin, uint8 (n, 3, frames, size, size), and manifest.jsonl, a line
    for each decoded file."""

    def __init__(self, root: Path, frames: int, size: int, fps: float):
        self.root, self.shape = root, (frames, size, fps)
        key = json.dumps([os.fsencode(root.resolve()).hex(), *self.shape, CODE])
        self.path = cache_dir() / f"clips-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        self.path.mkdir(exist_ok=True)
        self.each = 3 * frames * size**2  # bytes of a clip
        self.clips = 0
        self.entries = {}  # file -> what the manifest says

    def pixels(self) -> torch.Tensor:
        """All clips, uint8 (n, 3, frames, size, size), mapped into memory: read when they are looked at."""
        frames, size, _ = self.shape
        shape = (self.clips, 3, frames, size, size)
        return torch.from_numpy(np.memmap(self.path / "clips.bin", np.uint8, "c", shape=shape))

    def read_manifest(self, room: int) -> int:
        """Take up the lines of the manifest, up to one that was cut off or tells of more than `room` clips ->
        the bytes of those taken."""
        path, kept = self.path / "manifest.jsonl", 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            try:
                entry = json.loads(line)
                end = entry["first"] + entry["clips"]
            except (ValueError, TypeError, KeyError):
                break
            if end > room or not line.endswith(b"\n"):
                break
            self.entries[entry["file"]] = entry  # a later line is of a file that has changed
            self.clips, kept = end, kept + len(line)
        return kept

    def fill(self, names: list[str]) -> dict[str, str]:
        """Decode those of `names` that are not there, or have changed -> {file: why it is not there}; those
        are tried again another time, since the reason may be gone. Another process that fills it is waited
        for."""
        with (
            filelock.FileLock(self.path / "lock"),
            (self.path / "clips.bin").open("ab") as pixels,
            (self.path / "manifest.jsonl").open("ab") as lines,
        ):
            lines.truncate(self.read_manifest(pixels.tell() // self.each))
            pixels.truncate(self.clips * self.each)
            stamps = {name: stamp(self.root / name) for name in names}
            new = [n for n in names if n not in self.entries or self.entries[n]["stamp"] != stamps[n]]
            return self.decode(new, stamps, pixels, lines)

    def decode(self, names, stamps, pixels, lines) -> dict[str, str]:
        """Decode files, and append them in this order."""
        mine, decoders, failed, pending = threading.local(), [], {}, []

        def work(name):
            if not hasattr(mine, "decoder"):
                mine.decoder = video.Decoder()
                decoders.append(mine.decoder)
            try:
                return *mine.decoder(self.root / name, *self.shape), ""
            except (ValueError, RuntimeError) as error:
                return None, None, str(error)

        def commit():
            for file, text in ((pixels, ""), (lines, "".join(json.dumps(e) + "\n" for e in pending))):
                file.write(text.encode())  # the bytes first: a line must not tell of what is not there
                file.flush()
                os.fsync(file.fileno())
            self.entries |= {entry["file"]: entry for entry in pending}
            pending.clear()

        workers = min(torch.get_num_threads(), 8)
        pool, ahead = ThreadPoolExecutor(workers), deque()
        try:
            bar = tqdm(total=len(names), desc="decoding clips", unit="file", disable=len(names) < 50)
            for name in [*names, *[None] * 2 * workers]:  # a few at a time: what is done waits in memory
                ahead.append((name, name and pool.submit(work, name)))
                if len(ahead) <= 2 * workers or (done := ahead.popleft())[0] is None:
                    continue
                name, (clips, about, fault) = done[0], done[1].result()
                bar.update()
                if fault:
                    failed[name] = fault
                    continue
                pending.append(
                    {"file": name, "stamp": stamps[name], "first": self.clips, "clips": len(clips)}
                )
                pending[-1] |= about
                pixels.write(clips.tobytes())
                self.clips += len(clips)
                if len(pending) == COMMIT:
                    commit()
            commit()
            bar.close()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for decoder in decoders:
                decoder.close()
        return failed


# --------------------------------------------------------------------------------------------------------
# The data set


def scan(root: Path, frames: int, size: int, fps: float):
    """All that there is to know of a folder -> its cache; {file: what the cache says of it}; {file: (caption,
    short caption)}; and what is wrong, [(what, why)]. Raises FileNotFoundError, OSError or ValueError."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if min(frames, size) < 1 or not 0.01 <= fps <= 1000:
        raise ValueError(f"there are no clips of {frames} frames of {size} pixels at {fps:g} a second")
    found, problems = find_clips(root)
    told, wrong = read_metadata(root, found)
    cache = Cache(root, frames, size, fps)
    failed = cache.fill(found)
    problems += [*wrong, *failed.items()]
    entries = {name: cache.entries[name] for name in found if name not in failed}
    captions = {name: told.get(name) or (caption_of(root, name),) * 2 for name in entries}
    return cache, entries, captions, [(printable(what), printable(why)) for what, why in problems]


class Folder:
    """The clips of a folder with captions, as `ToyWorld` has them: `part` is "train" or "validation".
    `detail` says which caption: "short", "detailed" or "both", in turn; of more than `count` clips as many
    are chosen, evenly. `problems` lists what was skipped, (what, why). Raises ValueError or OSError in one
    line."""

    def __init__(
        self, root, part="train", frames=8, size=32, detail="detailed", fps=FPS, max_bad=MAX_BAD, count=None
    ):
        cache, entries, captions, self.problems = scan(Path(root), frames, size, fps)
        bad = len(self.problems)
        if bad and (not entries or bad > max_bad * (bad + len(entries))):
            raise ValueError(
                f"{bad} of {bad + len(entries)} files and lines of {root} are bad, more than --max-bad"
                f" {max_bad:g}; the first: {': '.join(self.problems[0])[:300]}; see `python data.py --check`"
            )
        if not entries:
            endings = " ".join(video.VIDEOS)
            raise ValueError(f"there are no clips in {root}: no video ({endings}) and no folder of pictures")
        chosen = [name for name in entries if in_validation(name) == (part == "validation")]
        if len(chosen) in (0, len(entries)):
            chosen = list(entries)
        clips = [(name, i) for name in chosen for i in range(entries[name]["clips"])]
        if count and count < len(clips):
            clips = [clips[i * len(clips) // count] for i in range(count)]
        brief = {"detailed": (0, 0), "short": (1, 1), "both": (1, 0)}[detail]
        self.captions = [captions[name][brief[i % 2]] for i, (name, _) in enumerate(clips)]
        self.names = [f"{printable(name)}, clip {i + 1}" for name, i in clips]
        self.rows = torch.tensor([entries[name]["first"] + i for name, i in clips])
        self.videos = cache.pixels()

    def __len__(self):
        return len(self.rows)

    def batch(self, rows):
        """Row numbers -> clips (B, 3, T, H, W) float in [-1, 1], and their captions."""
        videos = self.videos[self.rows[torch.as_tensor(rows)]]
        return videos.float() / 127.5 - 1, [self.captions[int(i)] for i in rows]


def check(root, out: Path, frames, size, fps):
    """Print what is in a folder and what is wrong with it, and draw some of it: preview-NAME.png and .gif in
    `out`."""
    cache, entries, captions, problems = scan(Path(root), frames, size, fps)
    every, notes = entries.values(), {}
    print(f"{len(every)} files, {sum(e['clips'] for e in every)} clips of {frames} frames")
    if entries:
        seconds = sorted(entry["seconds"] for entry in every)
        print(f"{sum(seconds):.1f} s are used, {seconds[0]:.2f} to {seconds[-1]:.2f} s of a file")
        sizes = Counter(f"{entry['width']}x{entry['height']}" for entry in every)
        print("sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8)))
        texts = [text for text, _ in captions.values()]
        words = statistics.median(len(text.split()) for text in texts)
        print(f"captions: {len(set(texts))} different, of {words:g} words (median)")
        apart = sum(map(in_validation, entries))
        print(f"for validation: {apart if 0 < apart < len(every) else 'all, since they are so few'}")
    for name, entry in entries.items():
        for note in entry["notes"]:
            notes.setdefault(note, []).append(printable(name))
    for note, names in notes.items():
        print(f"note: {note}: {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1))
    for what, why in problems:
        print(f"skipped: {what}: {why}")
    if entries:
        shown = [list(entries)[i * len(entries) // 32] for i in range(32)] if len(entries) > 32 else entries
        videos = cache.pixels()[[entries[name]["first"] for name in shown]].permute(0, 2, 3, 4, 1).numpy()
        out.mkdir(parents=True, exist_ok=True)
        for end in ("png", "gif"):
            path = out / f"preview-{Path(root).resolve().name}.{end}"
            save_grid(path, videos, [captions[name][0] for name in shown], min(len(videos), 8))
            print(path)
