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
import time
from pathlib import Path

from orpo.runtime.flags import make_parser, parse
from orpo.runtime.start import begin
from orpo.store.conversion_flags import ENCODED_WITH, FLAGS, check_flags


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    args = parse(parser, FLAGS, input_args)
    check_flags(parser, args)
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Ray and datasets take seconds to load: not before the flags are known to be good.
    from orpo.data.reading import Reading
    from orpo.store.converting import ray_session, run
    from orpo.store.finish import check_totals, find_finished, finish, verify
    from orpo.store.plan import plan_job

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
        staging_dir=args.staging_dir,
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
    """Plans the encoding that the flags ask for.

    Raises:
        ValueError, OSError: the model does not exist, or belongs to no known family.
    """
    from orpo.store.encoder import plan_encoding  # imports torch and diffusers

    flags = [f"--cache_dir={os.path.abspath(args.cache_dir)}"] if args.cache_dir else []
    for flag in ENCODED_WITH:
        value = getattr(args, flag.name)
        if value is True:
            flags.append(f"--{flag.name}")
        elif value is not None:
            is_folder = flag.is_source and os.path.isdir(value)
            flags.append(f"--{flag.name}={os.path.abspath(value) if is_folder else value}")  # actors run elsewhere
    return plan_encoding(flags)


if __name__ == "__main__":
    main()
