"""Samples of encoded shards: latents in place of images, embeddings in place of the prompt.

`encoded.safetensors` holds `moments_0` and `moments_1` (2C, h, w), mean and log variance of each image's latents;
`original_sizes` and `crop_top_lefts` (2, 2); and the prompt's embeddings as `embeds.*`. All samples of a split have the same
dtypes, and all of a bucket the same shapes, which its manifest lists, so that anything else is known to be bad.
"""

import torch
from safetensors.torch import load

from ..pairs.bad_pair import BadPair
from ..pairs.pair import PairTransform
from ..runtime.messages import differences, printable
from .manifest import Encoding
from .sample import read_label


MEMBER = "encoded.safetensors"
MAX_SIDE = 1 << 24  # of an original image, and of a crop's offset; float32 represents every integer up to here


def read_encoded(encoding: Encoding, members: dict[str, bytes], bucket: int, seed: int) -> dict | None:
    """Reads an encoded sample, as `collate_pairs` takes it; None for a tie.

    Args:
        encoding: the manifest's entry.
        members: as `walk_samples` gives them.
        bucket: number of its shape.
        seed: of the noise.

    Raises:
        BadPair: a member is missing, or holds something other than the manifest says.
    """
    label, _ = read_label(members, (MEMBER,))
    if label == 0.5:
        return None
    try:
        tensors = load(members[MEMBER])
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
    order = (0, 1) if label == 1 else (1, 0)
    return {
        "moments": torch.stack([tensors[f"moments_{i}"] for i in order]),
        "original_sizes": tensors["original_sizes"][order, :],
        "crop_top_lefts": tensors["crop_top_lefts"][order, :],
        "embeds": {
            name.removeprefix("embeds."): value for name, value in tensors.items() if name.startswith("embeds.")
        },
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
