"""A sample of a shard: two images, a prompt, and a label that says which image people preferred.

Its members are `original_prompt.txt`, `jpg_0.*`, `jpg_1.*`, `label_0.txt` and, optionally, `label_1.txt`.

In shards that are encoded, `encoded.safetensors` takes the place of the images. It holds `moments_0` and `moments_1`
(2C, h, w), mean and log variance of each image's latents; `original_sizes` and `crop_top_lefts` (2, 2); and the prompt's
embeddings as `embeds.*`; and, where they may be mirrored, `mirrored_0` and `mirrored_1`. All samples of a split have the same dtypes, and all of a bucket the same shapes, which its manifest
lists, so that anything else is known to be bad.
"""

import re
from dataclasses import dataclass

import torch
from safetensors.torch import load

from ..pairs.bad_pair import BadPair
from ..pairs.labels import TIE, parse_label
from ..pairs.pair import PairTransform, PreferencePair
from ..runtime.messages import differences, printable
from .tar import OTHERS, WANTED


PROMPT, LABEL, SECOND = "original_prompt.txt", "label_0.txt", "label_1.txt"
IMAGES = ("jpg_0.*", "jpg_1.*")
ENCODED = "encoded.safetensors"
SHOWN_MEMBERS = 6
MAX_SIDE = 1 << 24  # of an original image, and of a crop's offset; float32 represents every integer up to here
DTYPES = ("float16", "bfloat16", "float32")  # of latents and embeddings


def to_pair(members: dict[str, bytes]) -> PreferencePair | None:
    """Reads a sample's label and puts the winner first; None for a tie.

    Args:
        members: as `walk_samples` gives them.

    Raises:
        BadPair: a member is missing or not a plain file, or label or prompt can't be read.
    """
    label, prompt = read_label(members, IMAGES)
    if label == TIE:
        return None
    images = [next(data for name, data in members.items() if name.startswith(f"{i}.")) for i in ("jpg_0", "jpg_1")]
    winner, loser = images if label == 1 else images[::-1]
    return PreferencePair(winner, loser, prompt)


def read_label(members: dict[str, bytes], others: tuple[str, ...]) -> tuple[float, str]:
    """Reads a sample's label and prompt.

    Args:
        members: as `walk_samples` gives them.
        others: names of the members that the sample must have, too; `jpg_0.*` stands for any format.

    Raises:
        BadPair: a member is missing or not a plain file, or label or prompt can't be read.
    """
    if "__error__" in members:
        raise BadPair("bad member", members["__error__"])
    needed = (PROMPT, *others, LABEL)
    if missing_members([name for name in members if not name.startswith("__")], needed):
        raise BadPair("missing member", *what_is_missing(members, needed))
    try:
        label = parse_label(_text(members[LABEL]), "", LABEL)
        other = parse_label(_text(members[SECOND]), "", SECOND) if SECOND in members else 1 - label
        prompt = _text(members[PROMPT])
    except UnicodeDecodeError as error:
        raise BadPair("not UTF-8", str(error)) from error
    if label + other != 1:
        raise BadPair("bad label", f"label_0 {label} and label_1 {other} contradict each other")
    return label, prompt


def is_tie(members: dict[str, bytes]) -> bool:
    """A label that can't be read is not a tie but a bad sample, which training names and counts."""
    try:
        return parse_label(_text(members[LABEL]), "") == TIE
    except (KeyError, ValueError):
        return False


def _text(member: bytes) -> str:
    """Without what editors add to a file: a byte-order mark, line ends of Windows, a line end at the end."""
    return member.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")


def missing_members(names: list[str], needed: tuple[str, ...]) -> list[str]:
    """The needed members that are not among the names."""
    return [need for need in needed if not any(_is(name, need) for name in names)]


def what_is_missing(members: dict, needed: tuple[str, ...]) -> tuple[str, str, str]:
    """Returns what a sample holds and lacks; an empty place, which the caller knows; and what to do about it."""
    names = member_names(members)
    held = ", ".join(printable(name, 40) for name in names[:SHOWN_MEMBERS]) or "nothing"
    more = ", ..." if len(names) > SHOWN_MEMBERS else ""
    problem = f"has only {held}{more}; a sample needs {', '.join(needed)}"
    if any(re.search(rf"\.{WANTED.pattern}$", name, WANTED.flags) for name in names):
        return problem, "", "A key ends at the first dot of a file's name: rename the files so that keys hold no dot."
    if all(WANTED.fullmatch(name) for name in names):
        return problem, "", "A sample's files must follow one another in the archive: pack with `tar --sort=name`."
    return problem, "", "Rename the members, or make the shards with convert_to_webdataset.py."


def member_names(members: dict) -> list[str]:
    """Names of all members of a sample, including those that were skipped."""
    return [name for name in members if not name.startswith("__")] + members.get(OTHERS, [])


def _is(name: str, need: str) -> bool:
    """Whether a member is the one that is needed; `jpg_0.*` stands for any format."""
    return name.startswith(need[:-1]) if need.endswith(".*") else name == need


@dataclass(frozen=True)
class Encoding:
    """Encoded content of a split's samples, in place of images and prompts.

    Attributes:
        identity: everything that they depend on: VAE, text encoders, resolution, precision.
        libraries: versions that made them.
        tensors: dtype and shape of each of a sample's tensors, by name.
        moments: shapes of its moments, one for each aspect-ratio bucket; empty where there is a square alone.
    """

    identity: dict[str, str]
    libraries: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    moments: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_dict(cls, entry: dict) -> "Encoding":
        """
        Raises:
            KeyError, TypeError, ValueError, AttributeError: the entry is malformed.
        """
        for name in ("identity", "libraries"):
            if not all(isinstance(text, str) for item in entry[name].items() for text in item):
                raise ValueError(f"the encoding's {name} must map strings to strings")
        tensors = {name: (str(dtype), tuple(shape)) for name, (dtype, shape) in entry["tensors"].items()}
        sizes = {"original_sizes": ("int64", (2, 2)), "crop_top_lefts": ("int64", (2, 2))}
        moments = {name: tensors.get("moments_0") for name in ("moments_0", "moments_1")}
        if not (sizes | moments).items() <= tensors.items():
            raise ValueError(f"the encoding is of {printable(repr(tensors))}")
        for name, (dtype, shape) in tensors.items():
            if dtype not in DTYPES and name not in sizes or not all(type(n) is int and n > 0 for n in shape):
                raise ValueError(f"the encoding's {printable(name)} is of {printable(repr((dtype, shape)))}")
        moments_of_buckets = tuple(tuple(shape) for shape in entry.get("moments", ()))
        if not all(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape) for shape in moments_of_buckets):
            raise ValueError(f"the encoding's moments are {printable(repr(moments_of_buckets))}")
        return cls(entry["identity"], entry["libraries"], tensors, moments_of_buckets)

    def tensors_of(self, bucket: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a sample of a bucket must hold."""
        if not self.moments:
            return self.tensors
        dtype = self.tensors["moments_0"][0]
        of_images = [name for name in self.tensors if name.startswith(("moments_", "mirrored_"))]
        return self.tensors | dict.fromkeys(of_images, (dtype, self.moments[bucket]))

    def goes_with(self, other: "Encoding | None") -> bool:
        """Whether samples of both may be in one batch. Libraries may differ."""
        # Of a square's shape there is one, which is among `tensors`; of buckets' shapes, any sample's.
        return other is not None and (self.identity, self.moments, self.tensors_of(0)) == (
            other.identity,
            other.moments,
            other.tensors_of(0),
        )


def read_encoded(
    encoding: Encoding,
    members: dict[str, bytes],
    bucket: int,
    transform: PairTransform,
    seed: int,
    empty_prompt: dict[str, torch.Tensor] | None = None,
) -> dict | None:
    """Reads an encoded sample, as `collate_pairs` takes it; None for a tie.

    Args:
        encoding: what it must hold.
        members: as `walk_samples` gives them.
        bucket: number of its shape.
        transform: says whether it is mirrored, or its prompt empty.
        seed: of everything random about it.
        empty_prompt: embeddings, where prompts may be empty.

    Raises:
        BadPair: a member is missing, or holds something other than the manifest says.
    """
    label, _ = read_label(members, (ENCODED,))
    if label == 0.5:
        return None
    try:
        tensors = load(members[ENCODED])
    except Exception as error:  # SafetensorError, and KeyError for a dtype that torch does not know
        raise BadPair("bad encoding", printable(str(error))) from error
    found = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    expected = encoding.tensors_of(bucket)
    if found != expected:
        name = next(name for name in sorted(found.keys() | expected) if found.get(name) != expected.get(name))
        raise BadPair(
            "bad encoding",
            f"{printable(name)} is {found.get(name, 'missing')}, the manifest says {expected.get(name, 'nothing')}",
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            if not tensor.sum(dtype=torch.float32).isfinite():
                raise BadPair("bad encoding", f"{name} holds values that are not finite")
        elif tensor.min() < 0 or tensor.max() > MAX_SIDE:
            raise BadPair("bad encoding", f"{name} is {tensor.tolist()}")
    mirrored, _, is_empty = transform.sample(seed)
    order, moments = (0, 1) if label == 1 else (1, 0), "mirrored" if mirrored else "moments"
    embeds = {name.removeprefix("embeds."): value for name, value in tensors.items() if name.startswith("embeds.")}
    return {
        "moments": torch.stack([tensors[f"{moments}_{i}"] for i in order]),
        "original_sizes": tensors["original_sizes"][order, :],
        "crop_top_lefts": tensors["crop_top_lefts"][order, :],
        "embeds": empty_prompt if is_empty else embeds,
        "seed": seed,
    }


def check_encoding(encoding: Encoding, transform: PairTransform, identity: dict[str, str]) -> None:
    """Compares the models and settings that encoded the shards with those of this run.

    Args:
        encoding: of the shards.
        transform: that the flags ask for.
        identity: everything that this run's moments and embeddings depend on, by name.

    Raises:
        ValueError: VAE, text encoders, resolution or precision differ, or a flag asks for what these shards don't
            hold. Names each difference.
    """
    wanted = {
        "--random_crop": transform.random_crop,
        "--random_flip": transform.random_flip,
        "--proportion_empty_prompts": transform.proportion_empty_prompts > 0,
    }
    refused = [flag for flag, is_wanted in wanted.items() if is_wanted]
    if refused:
        raise ValueError(
            f"{' and '.join(refused)}: encoded shards hold one crop of each image, the centre, and no empty prompt. Leave"
            " the flag out, or train from shards of images."
        )
    other = differences(encoding.identity, identity)
    if other:
        raise ValueError(
            f"--dataset_path: these shards were encoded with different models or settings: {'; '.join(other)}. Train with"
            " the same, or encode them again: convert_to_webdataset.py --encode."
        )
