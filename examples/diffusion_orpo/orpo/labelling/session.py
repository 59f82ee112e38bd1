"""One annotator at work: the next question, the handling of answers, the progress."""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from ..pairs.image_folder import image_path
from ..runtime.durable import write_text
from ..runtime.messages import differences
from .questions import Question, arranged, digest, is_common, order
from .votes import CHOICES, FOLDER, Vote, VoteLog, read_votes


PACE_OF = 20  # votes; a median, so that a break does not count


@dataclass(frozen=True)
class Settings:
    """Settings that all annotators of a folder share.

    Attributes:
        images_per_question: 2, or the images that are ranked.
        overlap: share of the questions that everybody answers.
        seed: of sides and order.
    """

    images_per_question: int
    overlap: float
    seed: int

    def agree(self, folder: Path) -> None:
        """Stores the settings with the first votes, or compares them with the stored ones.

        Raises:
            ValueError: they differ.
        """
        path = folder / FOLDER / "settings.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(asdict(self)) + "\n")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged. Remove it: the flags of this run then take its place.") from error
        changes = differences(stored, asdict(self))
        if changes:
            raise ValueError(
                f"{folder} is being labelled with other settings ({'; '.join(changes)}). Use the same ones, or move"
                f" {path.parent} away to start over."
            )


class Session:
    """An annotator's way through the questions.

    Attributes:
        annotator: their name.
        asked: the question that is waiting for its answer, or None at the end.
    """

    def __init__(self, folder: Path, annotator: str, questions: list[Question], settings: Settings) -> None:
        """
        Raises:
            ValueError: see `Settings.agree` and `VoteLog`; or votes can't be stored, and nothing is left behind.
        """
        self.folder, self.annotator, self.settings = folder, annotator, settings
        votes = folder / FOLDER
        is_new = not votes.exists()
        try:
            settings.agree(folder)
            self._log = VoteLog(folder, annotator)
        except OSError as error:
            if is_new:
                shutil.rmtree(votes, ignore_errors=True)
            raise ValueError(
                f"Votes can't be stored in {votes}: {error.strerror or error}. Copy the images to a folder that you can write to,"
                " and name that one as --images_dir."
            ) from error
        questions = [arranged(question, settings.seed, annotator) for question in questions]
        self._questions = order(questions, settings.seed, annotator, settings.overlap)
        self._by_id = {question.id: question for question in questions}
        self._stamps: dict[str, tuple] = {}
        self._answered_by_others: set[str] = set()
        self._ask(None)

    def close(self) -> None:
        self._log.close()

    def answer(self, question: str, choice: str, best: int | None, worst: int | None, seconds: float) -> bool:
        """Takes an answer, and asks the next question once it is on disk.

        Args:
            question: id of the one that is answered. An answer to any question but the current one is ignored: it came
                twice, or from a page that was left open.
            choice: "best", "tie" or "bad".
            best, worst: places from the left, from 0, if the choice is "best".
            seconds: the time it took.

        Returns:
            Whether it was accepted.

        Raises:
            ValueError: it is not an answer to the question.
            OSError: it can't be written. The question stays.
        """
        if self.asked is None or question != self.asked.id:
            return False
        shown = tuple(image.name for image in self.asked.images)
        if choice not in CHOICES:
            raise ValueError(f"There is no choice {choice!r}.")
        is_pair = type(best) is type(worst) is int and best != worst and {best, worst} <= set(range(len(shown)))
        if choice == "best" and not is_pair:
            raise ValueError(f"The best and the worst of {len(shown)} images can't be {best} and {worst}.")
        if not 0 <= float(seconds) < math.inf:
            raise ValueError(f"No answer takes {seconds} seconds.")
        best_name, worst_name = (shown[best], shown[worst]) if choice == "best" else (None, None)
        vote = Vote(
            annotator=self.annotator,
            question=question,
            prompt=self.asked.prompt,
            choice=choice,
            best=best_name,
            worst=worst_name,
            shown=shown,
            digests=self.asked.digests,
            seconds=round(float(seconds), 3),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        self._log.add(vote)
        self._ask(None)
        return True

    def skip(self, question: object) -> bool:
        """Puts the question that waits for its answer behind all others; returns whether it was this one."""
        if self.asked is None or question != self.asked.id:
            return False
        self._questions.sort(key=lambda other: other.id == question)
        self._ask(None)
        return True

    def undo(self) -> bool:
        """Takes the last answer back and asks again; returns whether there was one."""
        vote = self._log.undo()
        if vote is not None:
            self._ask(self._by_id.get(vote.question))
        return vote is not None

    def read(self, question: Question, place: int) -> bytes:
        """The file of the image at a place from the left.

        Raises:
            OSError, ValueError: it can't be read, or is another image by now.
        """
        name = question.images[place].name
        content = image_path(self.folder, name).read_bytes()
        if digest(content) != question.digests[place]:
            raise ValueError(f"{name} has changed since the start")
        return content

    def question(self, id: str) -> Question | None:
        return self._by_id.get(id)

    def upcoming(self) -> Question | None:
        """The next question, so that its images can be loaded now."""
        return next((question for question in self._open() if question is not self.asked), None)

    @property
    def progress(self) -> dict:
        """`answered` and `total` questions of this annotator, and `seconds` per question lately, or None."""
        answered = [vote for id, vote in self._log.votes.items() if id in self._by_id]
        recent = [vote.seconds for vote in answered[-PACE_OF:]]
        left = sum(1 for _ in self._open())
        return {
            "answered": len(answered),
            "total": len(answered) + left,
            "seconds": median(recent) if recent else None,
        }

    def _ask(self, question: Question | None) -> None:
        self._look_at_others()
        self.asked = question or next(self._open(), None)

    def _open(self):
        """The questions that this annotator still has to answer."""
        for question in self._questions:
            if question.id not in self._log.votes and (
                question.id not in self._answered_by_others
                or is_common(question, self.settings.seed, self.settings.overlap)
            ):
                yield question

    def _look_at_others(self) -> None:
        """Reads the other annotators' votes, if there are new ones."""
        files = sorted((self.folder / FOLDER).glob("*.jsonl"))
        stamps = {path.stem: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
        stamps.pop(self.annotator, None)
        if stamps != self._stamps:
            votes = read_votes(self.folder)
            votes.pop(self.annotator, None)
            self._answered_by_others = {question for given in votes.values() for question in given}
            self._stamps = stamps
