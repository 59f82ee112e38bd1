"""What the fuzzer calls with damaged bytes, and how it knows that the answer was right.

A target returns "accepted" or "refused". It raises `Violation`, or whatever the code raised, where a promise of
docs/data.md is broken: another exception than the documented one, a message without its place, or content accepted
that an independent reading of the same bytes does not find.
"""

import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from pathlib import Path

from faults import samples
from orpo.pairs.bad_pair import BadPair
from orpo.pairs.image import MAX_ASPECT, MAX_PIXELS, MIN_SIDE, decode_image
from orpo.store.convert import convert_unit
from orpo.store.folder import read_manifest
from orpo.store.index import Shard
from orpo.store.plan import check_totals, plan_job
from orpo.store.reader import read_samples
from orpo.store.sample import to_pair
from orpo.store.tar import WANTED, open_tar, walk_samples


WORK = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
PNG = b"\x89PNG\r\n\x1a\n"


class Violation(AssertionError):
    """A promise is broken."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


# Images


def image(data: bytes) -> str:
    try:
        decoded = decode_image(data, "row 5")
    except ValueError as error:
        require(str(error).startswith("row 5: not a readable image"), f"message without place: {error}")
        require("\n" not in str(error) and len(str(error)) < 400, f"message of several lines: {error}")
        return "refused"
    require(decoded.mode == "RGB", f"mode {decoded.mode}")
    width, height = decoded.size
    require(min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS, f"size {decoded.size}")
    require(max(width, height) <= MAX_ASPECT * min(width, height), f"size {decoded.size}")
    require(len(decoded.tobytes()) == 3 * width * height, "fewer pixels than its size says")
    if data.startswith(PNG):
        require(png_is_sound(data), "a PNG with a wrong checksum was accepted")
    return "accepted"


def png_is_sound(data: bytes) -> bool:
    """Whether all chunks up to the end chunk are there with right checksums, by the specification's layout."""
    position = len(PNG)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        stored = data[position + 8 + length : position + 12 + length]
        if body.startswith(b"IEND"):
            return True
        if len(stored) < 4 or zlib.crc32(body) != int.from_bytes(stored, "big"):
            return False
        position += 12 + length
    return False


# Shards


def tar(data: bytes) -> str:
    """Every sample that the reader accepts is what another reader of tar finds at that place."""
    path = WORK / f"fuzz-{os.getpid()}-00000.tar"
    path.write_bytes(data)
    count, accepted, expected = len(samples.rows()), 0, None
    require(as_far_as_it_goes(data, "r:", count) == as_far_as_it_goes(data, "r|", count), "a pipe gives other samples")
    try:
        for ordinal, members in read_samples(str(path), 0, count, count):
            try:
                pair = to_pair(members)
            except BadPair:
                continue
            if expected is None:
                expected = list(reference_samples(data))
            require(ordinal < len(expected), f"sample {ordinal} is accepted, the reference finds {len(expected)}")
            reference = expected[ordinal]
            names = [name for name in members if not name.startswith("__")]
            require(all(reference.get(name) == [members[name]] for name in names), f"sample {ordinal} is another")
            if pair is not None:
                accepted += 1
                first = reference["label_0.txt"][0].strip()
                images = [reference[name][0] for i in "01" for name in reference if name.startswith(f"jpg_{i}.")]
                if first in (b"1.0", b"0.0"):
                    winner, loser = images if first == b"1.0" else images[::-1]
                    require((pair.winner, pair.loser) == (winner, loser), f"sample {ordinal} is paired wrongly")
    except ValueError as error:
        require(str(path) in str(error), f"message without place: {error}")
        return "refused"
    return "accepted" if accepted == count else "refused"


def as_far_as_it_goes(data: bytes, mode: str, count: int) -> list:
    found = []
    try:
        with open_tar(io.BytesIO(data), mode) as archive:
            found.extend(walk_samples(archive, 0, count))
    except (tarfile.TarError, EOFError):
        pass
    return found


def reference_samples(data: bytes) -> list[dict[str, list[bytes]]]:
    """An independent reader: samples as extension to contents, as far as the archive is sound. Plain files only."""
    found: list[tuple[str, dict]] = []
    for name, content, is_folder in reference_members(data):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = extension.lower()
        has_key = bool(dot and stem)
        if not has_key and (is_folder or content is not None) or is_folder and not WANTED.fullmatch(extension):
            continue
        key = (folder, slash, stem) if has_key else name
        if not found or found[-1][0] != key:
            found.append((key, {}))
        if content is not None:
            found[-1][1].setdefault(extension, []).append(content)
    return [members for _, members in found]


def reference_members(data: bytes):
    """Name and content of the members, content None for what is not a plain file, and whether it is a folder; ends at the first thing it can't read."""
    position, renamed, resized = 0, None, None
    while position + 512 <= len(data):
        header = data[position : position + 512]
        total = sum(header) - sum(header[148:156]) + 8 * 32
        signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
        if not header.strip(b"\0") or number(header[148:156]) not in (total, signed):
            return
        size = number(header[124:136]) if resized is None else resized
        if size is None:
            return
        kind, body = header[156:157], position + 512
        content = data[body : body + size]
        padded = data[body : body + -(-size // 512) * 512]  # Python reads what describes a member to its block's end
        if kind == b"L":
            renamed = text(padded)
        elif kind in (b"x", b"X"):
            records = pax_records(padded)
            renamed = text(records[b"path"]) if b"path" in records else renamed
            resized = int(records[b"size"]) if records.get(b"size", b"x").isdigit() else None
        elif kind in (b"g", b"K"):
            pass
        else:
            plain = kind in (b"0", b"\0", b"7")
            prefix, name = text(header[345:500]), text(header[:100])
            if kind == b"\0" and name.endswith("/"):
                plain = False
            name = f"{prefix}/{name}" if prefix and kind not in (b"S",) else name
            if not plain and kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0
            if plain and len(content) < size:
                return
            final = renamed if renamed is not None else name
            is_folder = kind == b"5" or kind == b"\0" and final.endswith("/")
            yield final.rstrip("/") if is_folder else final, content if plain else None, is_folder
            renamed = resized = None
        position = body + -(-size // 512) * 512


def number(field: bytes) -> int | None:
    """A number of a header: octal text, or binary where the first bit is set."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def pax_records(content: bytes) -> dict[bytes, bytes]:
    records, position = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(content, position):
        length = int(match[1])
        if length == 0:
            break
        records[match[2]] = content[match.end() : position + length - 1]
        position += length
    return records


# Parquet files, and the converter


def parquet(data: bytes) -> str:
    """Plans and converts the file; what the shard then holds are rows of the undamaged file."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        source, output = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        output.mkdir()
        (source / "train.parquet").write_bytes(data)
        try:
            job = plan_job(str(source), str(output), keep_ties=True)
            entries = [convert_unit({"item": number}, job) for number in range(len(job.units))]
            written = [Shard.from_dict(json.loads(entry["shard"])) for entry in entries]
            check_totals(job, written)
        except ValueError as error:
            require("train.parquet" in str(error) or str(source) in str(error), f"message without place: {error}")
            return "refused"
        seen, accepted = rows_by_caption(), 0
        for entry in written:
            for _, members in read_samples(str(output / entry.name), 0, entry.samples, entry.samples):
                pair = to_pair(members)  # what the converter writes can be read
                if pair is None:
                    continue
                row = seen.pop(pair.prompt, None)
                require(row is not None, f"caption {pair.prompt!r} is of no row, or came twice")
                expected = (row["jpg_0"], row["jpg_1"]) if row["label_0"] else (row["jpg_1"], row["jpg_0"])
                require((pair.winner, pair.loser) == expected, f"{pair.prompt!r} has other images")
                accepted += 1
        require(accepted + sum(len(e.bad_rows) + e.labels["tie"] for e in written) == job.rows, "rows went missing")
    return "accepted" if accepted == len(samples.rows()) else "refused"


def rows_by_caption() -> dict[str, dict]:
    return {row["caption"]: row for row in samples.rows()}


# Manifests


def manifest(data: bytes) -> str:
    folder = WORK / f"fuzz-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.json"
    path.write_bytes(data)
    try:
        found = read_manifest(str(folder))
    except ValueError as error:
        require(str(path) in str(error), f"message without place: {error}")
        return "refused"
    require(all(type(s.samples) is int and 0 <= s.samples <= 10**7 for s in found.shards), f"samples {found}")
    require(all(Path(shard.name).name == shard.name for shard in found.shards), "a name leads elsewhere")
    return "accepted"


# Members of one sample, as text between separators


SEPARATOR = b"\x1e"
NAMES = ("original_prompt.txt", "label_0.txt", "label_1.txt", "jpg_0.jpg", "jpg_1.png")


def members(data: bytes) -> str:
    fields = data.split(SEPARATOR)
    sample = {name: field for name, field in zip(NAMES, fields) if field != b"-"} | {"__key__": "key"}
    try:
        pair = to_pair(sample)
    except BadPair as error:
        require(bool(error.kind) and "\n" not in str(error) and len(str(error)) < 500, f"message: {error!r}")
        return "refused"
    label = float(sample["label_0.txt"].decode())
    require(label in (0, 0.5, 1), f"label {label}")
    if pair is None:
        require(label == 0.5, "a preference was taken for a tie")
    else:
        require(label == (sample["jpg_0.jpg"] is pair.winner), "paired wrongly")
        text = sample["original_prompt.txt"].removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n")
        require(pair.prompt.encode() == text, "another prompt")
    return "accepted"


def seeds() -> dict[str, dict[str, bytes]]:
    """For each target its undamaged samples."""
    first = samples.rows()[0]
    fields = [first["caption"].encode(), b"1.0", b"0.0", first["jpg_0"][:20], first["jpg_1"][:20]]
    return {
        "image": samples.images(),
        "tar": samples.shards(),
        "parquet": samples.parquets(),
        "manifest": samples.manifests(),
        "members": {"sample": SEPARATOR.join(fields), "tie": SEPARATOR.join([b"a", b"0.5", b"0.5\n", b"x", b"y"])},
    }


TARGETS = {"image": image, "tar": tar, "parquet": parquet, "manifest": manifest, "members": members}
