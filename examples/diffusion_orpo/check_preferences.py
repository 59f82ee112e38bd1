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
"""Is a preference dataset fit to train on? Looks at every row, says what is wrong and what is odd, and shows some pairs.

    python check_preferences.py --dataset_name=my_pairs
    python check_preferences.py --dataset_path=shards

Writes `report.json` and `index.html`; with --filter also a copy without what is wrong; and with --scorers it says how often each
of these agrees with the labels. Ends with status 0 where training would accept the data, with 1 where not, and with 2 where there
is nothing to look at: encoded shards hold no images.
"""

from functools import partial

from orpo.cli import read_flags, run
from orpo.config import CheckConfig
from orpo.runtime.start import begin


parse_args = partial(read_flags, CheckConfig, __doc__)


def main(line: list[str] | None = None) -> int:
    config = parse_args(line)
    begin(__file__)

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.reports.check import check

    return check(config)


if __name__ == "__main__":
    run(main)
