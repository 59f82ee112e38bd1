"""What is wrong with a pair, in one form for rows, files and samples of shards."""

# What to do about each kind, where a problem doesn't bring better advice. A new kind may stand here or not.
ADVICE = {
    "bad label": "Write 1 (the first image is preferred), 0 (the second is) or 0.5 (a tie), or remove the pair.",
    "contradicting columns": "Correct one of them, or remove the pair.",
    "bad prompt": "Write the prompt as text, or remove the pair.",
    "missing image": "Store the image's bytes, or remove the pair.",
    "undecodable image": "Replace the image, or remove the pair.",
    "not UTF-8": "Write label and prompt as UTF-8.",
    "missing member": "A sample needs original_prompt.txt, jpg_0.*, jpg_1.* and label_0.txt.",
    "bad member": "Convert the data again: each member once, as a plain file.",
    "bad encoding": "Encode the data again: convert_to_webdataset.py --encode.",
    "unreadable": "Copy or convert the shard again.",
}


class BadPair(ValueError):
    """A row, sample or file that no pair can be made of.

    Training from a dataset stops at the first one, training from shards counts them, the converter leaves them out, and
    the checker lists them all.

    Attributes:
        kind: what is wrong, as it is counted.
        problem: what is wrong with this one, without a full stop.
        where: its place: a row and column, a file, a shard and key. May be empty.
        advice: what to do, in sentences. Default: the kind's.
    """

    def __init__(self, kind: str, problem: str, where: str = "", advice: str | None = None) -> None:
        super().__init__(kind, problem, where, advice)
        self.kind, self.problem, self.where = kind, problem, where
        self.advice = ADVICE.get(kind, "") if advice is None else advice

    def within(self, place: str) -> "BadPair":
        """The same one, with the place that holds its place, such as the shard of a key."""
        return BadPair(self.kind, self.problem, ", ".join(filter(None, (place, self.where))), self.advice)

    @property
    def summary(self) -> str:
        """Place and problem."""
        return ": ".join(filter(None, (self.where, self.problem)))

    def __str__(self) -> str:
        return f"{self.summary}. {self.advice}".rstrip()
