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
"""Converts a preference dataset to shards for WebDataset, on Ray Data.

    python convert_to_webdataset.py --dataset_name pickapic --output_dir shards
    python convert_to_webdataset.py --output_dir shards --verify

Images pass through as they are. With --encode, samples hold what VAE and text encoders say of images and prompt instead,
and the shards train without either:

    python convert_to_webdataset.py --dataset_name pickapic --output_dir encoded --encode --mixed_precision fp16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

A conversion that was stopped continues where it was when started again.
"""

import logging
import os
import time
from functools import partial

from orpo import cli
from orpo.config import ConversionConfig
from orpo.runtime.start import begin


parse_args = partial(cli.read_flags, ConversionConfig, __doc__)


def main(line: list[str] | None = None) -> None:
    config = parse_args(line)
    begin(__file__)

    # Ray and datasets take seconds to load: not before the flags are known to be good.
    from orpo.pairs.columns import Reading
    from orpo.store.convert import ray_session, run
    from orpo.store.plan import check_totals, find_finished, finish, plan_job, verify

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if config.verify:
        verify(config.output_dir)
        return
    start = time.perf_counter()
    output_dir = config.output_dir
    if not output_dir.startswith("s3://"):
        output_dir = os.path.abspath(output_dir)  # tasks run elsewhere
        os.makedirs(output_dir, exist_ok=True)
    job = plan_job(
        config.dataset_name,
        output_dir,
        dataset_config_name=config.dataset_config_name,
        split=config.dataset_split_name,
        shard_size_mb=config.shard_size_mb,
        keep_ties=config.keep_ties,
        cache_dir=config.cache_dir,
        staging_dir=config.staging_dir,
        encoding=cli.plan_encoding(config) if config.encode else None,
        reading=Reading.from_config(config),
    )
    try:
        finished, in_manifest = find_finished(job)
        if in_manifest and len(finished) == len(job.units):
            print(f"{output_dir} already holds all {len(finished)} shards of split {job.split}: nothing to do.")
            return
        with ray_session(config.ray_address):
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


if __name__ == "__main__":
    cli.run(main)
