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
"""Is a preference data set fit to train on? Looks at every row, says what is wrong and what is odd, and shows some pairs.

    python check_preferences.py --dataset_name=my_pairs
    python check_preferences.py --dataset_path=shards

Writes `report.json` and `contact_sheet.png`; with --filter also a copy without what is wrong; and with --scorers it says how
often each of these agrees with the labels. Ends with status 0 where training would accept the data, with 1 where not, and
with 2 where there is nothing to look at: shards that are encoded hold no images.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from orpo.checking.flags import OUTPUT, PROMPTS, check_filter
from orpo.data.flags import IMAGES
from orpo.data_source import SOURCES, check_source
from orpo.evaluation.flags import JUDGING
from orpo.models.flags import MODEL
from orpo.runtime.flags import FlagGroup, all_flags, assemble, make_parser, parse, pick
from orpo.runtime.shapes import shapes_from_flags
from orpo.runtime.start import begin
from orpo.training.flags import VALIDATION


UNUSED = ("cache_latents", "shuffle_buffer_size")  # of those that choose the data
SOURCE = [flag for flag in all_flags(SOURCES) if flag.name not in UNUSED]
WHICH_PAIRS = (
    "max_train_samples",
    "run_validation",
    "num_validation_pairs",
    "resolution",
    "aspect_ratio_buckets",
    "max_crop",
)
HOW_MANY = pick([IMAGES, VALIDATION], WHICH_PAIRS)
PIPELINE, REVISION, CACHE_DIR = pick([MODEL], ("pretrained_model_name_or_path", "revision", "cache_dir"))
PIPELINE = replace(
    PIPELINE,
    required=False,
    help="Pipeline whose tokenizers measure the prompts: a path, or a model identifier from huggingface.co/models.",
)
(SCORERS,) = pick([JUDGING], ("scorers",))
SCORERS = replace(SCORERS, default=[], help=f"Say how often these agree with the labels. {SCORERS.help}")

FLAGS = assemble(
    [
        FlagGroup("data, as the training scripts take it", (*SOURCE, *HOW_MANY, CACHE_DIR)),
        FlagGroup("prompts", (PIPELINE, REVISION)),
        PROMPTS,
        FlagGroup("output", (SCORERS,)),
        OUTPUT,
    ]
)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, FLAGS)
    parser.set_defaults(random_crop=False, random_flip=False, proportion_empty_prompts=0.0, dataloader_num_workers=0)
    args = parse(parser, FLAGS, input_args)
    check_source(parser, args)
    check_filter(parser, args)
    try:
        shapes_from_flags(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.checking.check import check
    from orpo.scoring.label_agreement import LabelJudge

    try:
        return check(args, LabelJudge(args.scorers) if args.scorers else None)
    except ValueError as error:  # a scorer that fails
        sys.exit(f"check_preferences.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
