"""How the config says that rows are to be read."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ..config import PairsConfig
from .columns import Columns
from .conventions import Convention, named_columns
from .image_files import ImageFiles
from .ranked import ALL


@dataclass(frozen=True)
class Reading:
    """How rows are read, beyond what their columns say.

    Attributes:
        named: the columns, if flags name them all.
        prompt: the column of the prompt, if flags name it.
        soft_labels, min_agreement: as in `Columns`.
        pairs_per_group: as for `RankedPairs`.
        image_root: the folder that paths of images start from. None: the table's own folder.
    """

    named: Convention | None = None
    soft_labels: bool = False
    min_agreement: float | None = None
    pairs_per_group: str = ALL
    image_root: Path | None = None
    prompt: str | None = None

    @classmethod
    def from_config(cls, config: PairsConfig) -> "Reading":
        root = None if config.image_root is None else Path(config.image_root)
        columns = config.named_columns
        votes = config.soft_labels, config.min_agreement
        return cls(_named(columns), *votes, config.pairs_per_group, root, columns.get("prompt"))

    def find_columns(
        self, schema: pa.Schema, where: str, classes: dict | None = None, files: ImageFiles = ImageFiles()
    ) -> Columns:
        """See `Columns.find`."""
        votes = self.soft_labels, self.min_agreement
        return Columns.find(schema, where, classes, self.named, *votes, files.root is not None, self.prompt)

    def files_below(self, folder: Path | None) -> ImageFiles:
        """The images that a table in this folder may name. None: the table is not on this machine, or in several folders."""
        return ImageFiles(root=self.image_root or folder)


def _named(columns: dict[str, str]) -> Convention | None:
    if "chosen" in columns:
        return named_columns((columns["chosen"], columns["rejected"]), columns["prompt"], None)
    if "image_0" in columns:
        return named_columns((columns["image_0"], columns["image_1"]), columns["prompt"], columns["label"])
    return None
