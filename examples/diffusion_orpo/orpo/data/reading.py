"""How the flags say that rows are to be read."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from .columns import Columns
from .conventions import Convention, named_columns
from .image_files import ImageFiles
from .ranked import ALL


@dataclass(frozen=True)
class Reading:
    """How rows are read, beyond what their columns say.

    Attributes:
        named: the columns, if flags name them.
        soft_labels, min_agreement: as in `Columns`.
        pairs_per_group: as for `RankedPairs`.
        image_root: the folder that paths of images start from. None: the table's own folder.
    """

    named: Convention | None = None
    soft_labels: bool = False
    min_agreement: float | None = None
    pairs_per_group: str = ALL
    image_root: Path | None = None

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Reading":
        root = None if args.image_root is None else Path(args.image_root)
        return cls(_named(args), args.soft_labels, args.min_agreement, args.pairs_per_group, root)

    def find_columns(
        self, schema: pa.Schema, where: str, classes: dict | None = None, files: ImageFiles = ImageFiles()
    ) -> Columns:
        """See `Columns.find`."""
        votes = self.soft_labels, self.min_agreement
        return Columns.find(schema, where, classes, self.named, *votes, paths=files.root is not None)

    def files_below(self, folder: Path | None) -> ImageFiles:
        """The images that a table in this folder may name. None: the table is not on this machine, or in several folders."""
        return ImageFiles(root=self.image_root or folder)


def _named(args: argparse.Namespace) -> Convention | None:
    if args.chosen_column is not None:
        return named_columns((args.chosen_column, args.rejected_column), args.prompt_column, None)
    if args.image_0_column is not None:
        return named_columns((args.image_0_column, args.image_1_column), args.prompt_column, args.label_column)
    return None
