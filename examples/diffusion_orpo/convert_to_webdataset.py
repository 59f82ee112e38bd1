#!/usr/bin/env python
# coding=utf-8
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Converts a preference data set to shards for WebDataset, on Ray Data.

    python convert_to_webdataset.py --dataset_path pickapic --output_dir shards
    python convert_to_webdataset.py --output_dir shards --verify

Images pass through as they are. With --encode, samples hold what VAE and text encoders say of images and prompt instead,
and the shards train without either:

    python convert_to_webdataset.py --dataset_path pickapic --output_dir encoded --encode --mixed_precision fp16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

A conversion that was stopped continues where it was when started again.
"""

import argparse
import logging
import os
import re
import time
from pathlib import Path

from orpo.data.flags import DATA_SET, READING, check_reading
from orpo.system.flags import looks_like_a_path, pick
from orpo.system.start import begin


# The training scripts' flags that decide an encoding; those scripts read them.
ENCODING_FLAGS = {
    "pretrained_model_name_or_path": "Model whose VAE and text encoders encode: a folder, or a name on the Hub.",
    "pretrained_vae_model_name_or_path": "Folder or name of a VAE to use instead of the model's own.",
    "revision": "Revision of the model.",
    "variant": "Variant of the model's files, e.g. fp16.",
    "resolution": "Pixels a side of the crops. Default: as in training, 1024 for SDXL.",
    "max_sequence_length": "Tokens of a prompt that T5 reads. Default: as in training.",
    "mixed_precision": "no, fp16 or bf16: what the training will run in. Default: no.",
    "vae_encode_batch_size": "Images that the VAE encodes at once. Default: 8.",
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_path",
        type=os.path.expanduser,
        help="What --dataset_name is in training: a folder, a file, or identifier of a data set on the Hub; or parquet files "
        "in s3://bucket/prefix.",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="Folder for the shards, or s3://bucket/prefix. On a cluster a folder that all nodes share.",
    )
    parser.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    parser.add_argument("--split", help="Split to convert. Default: the only one, else train.")
    parser.add_argument("--shard_size_mb", type=float, default=500, help="Size of a shard, about. In 10^6 bytes.")
    parser.add_argument("--keep_ties", action="store_true", help="Write pairs with label 0.5, too.")
    parser.add_argument("--ray_address", help="Ray cluster to run on. Default: this machine, all its cores.")
    parser.add_argument(
        "--cache_dir", help="Folder where shards wait for their upload to S3. Default: the system's temporary one."
    )
    parser.add_argument(
        "--verify", action="store_true", help="Convert nothing; compare the shards in --output_dir with the manifest."
    )
    group = parser.add_argument_group("rows, as the training scripts read them")
    for flag in pick([DATA_SET], READING):
        flag.add_to(group)
    group = parser.add_argument_group("encoding")
    group.add_argument(
        "--encode",
        action="store_true",
        help="Write latents of both images, cropped at the centre, and the prompt's embeddings. On all GPUs that Ray "
        "knows of, else on this machine's cores.",
    )
    for name, text in ENCODING_FLAGS.items():
        group.add_argument(f"--{name}", help=text)
    args = parser.parse_args(input_args)
    given = [name for name in ENCODING_FLAGS if getattr(args, name) is not None]
    if given and not args.encode:
        parser.error(f"--{given[0]} means nothing without --encode.")
    if args.encode and args.pretrained_model_name_or_path is None:
        parser.error("--encode needs --pretrained_model_name_or_path.")
    check_reading(parser, args)
    for flag in pick([DATA_SET], READING):
        if problem := flag.problem(getattr(args, flag.name)):
            parser.error(problem)
    if args.dataset_path is None and not args.verify:
        parser.error("--dataset_path is needed, except with --verify.")
    if args.split is not None and not re.fullmatch(r"\w+", args.split):
        parser.error(f"--split={args.split} is not the name of a split: letters, digits and _ only.")
    if args.shard_size_mb <= 0:
        parser.error(f"--shard_size_mb={args.shard_size_mb:g} must be above 0.")
    for name in ("dataset_path", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        if looks_like_a_path(getattr(args, name)) and not os.path.exists(getattr(args, name)):
            parser.error(f"--{name}={getattr(args, name)} does not exist.")
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Ray and datasets take seconds to load: not before the flags are known to be good.
    from orpo.conversion.finish import check_totals, find_finished, finish, verify
    from orpo.conversion.plan import plan_job
    from orpo.conversion.run import ray_session, run
    from orpo.data.reading import Reading

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if args.verify:
        verify(args.output_dir)
        return
    start = time.perf_counter()
    output_dir = args.output_dir
    if not output_dir.startswith("s3://"):
        output_dir = os.path.abspath(output_dir)  # tasks run elsewhere
        os.makedirs(output_dir, exist_ok=True)
    job = plan_job(
        args.dataset_path,
        output_dir,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        shard_size_mb=args.shard_size_mb,
        keep_ties=args.keep_ties,
        cache_dir=args.cache_dir,
        encoding=read_encoding_flags(args) if args.encode else None,
        reading=Reading.from_flags(args),
    )
    try:
        finished, in_manifest = find_finished(job)
        if in_manifest and len(finished) == len(job.units):
            print(f"{output_dir} already holds all {len(finished)} shards of split {job.split}: nothing to do.")
            return
        with ray_session(args.ray_address):
            new = {shard.name: shard for shard in run(job, finished)}
        shards = [(finished | new)[unit.name] for unit in job.units]
        summary = check_totals(job, shards)
        finish(job, shards)
    finally:
        if job.copy is not None:
            job.copy.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    samples = sum(shard.samples for shard in new.values())
    print(f"{samples} pairs in {len(new)} shards, {seconds:.1f} s, {samples / seconds:.1f} pairs/s. {summary}")


def read_encoding_flags(args: argparse.Namespace) -> "EncodingJob":  # noqa: F821
    """How the flags of the encoding say that samples are encoded.

    Raises:
        ValueError, OSError: the model is of no family that is known, or not there.
    """
    from orpo.conversion.encoder import plan_encoding  # imports torch and diffusers

    flags = []
    for name in ENCODING_FLAGS:
        value = getattr(args, name)
        if value is not None:
            is_folder = name.endswith("model_name_or_path") and os.path.isdir(value)
            flags.append(f"--{name}={os.path.abspath(value) if is_folder else value}")  # actors run elsewhere
    return plan_encoding(flags)


if __name__ == "__main__":
    main()
