"""The questions: two images of a prompt, or k of them to rank, in an order that a seed decides."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from ..data.listing import ListedImage


@dataclass(frozen=True)
class Question:
    """Images of a prompt that are judged together.

    Attributes:
        id: follows from prompt and names, so that images that are added later do not change other questions.
        prompt: what all of them show.
        images: two, or those to rank.
    """

    id: str
    prompt: str
    images: tuple[ListedImage, ...]

    @classmethod
    def of(cls, images: Iterable[ListedImage]) -> "Question":
        images = tuple(images)
        text = "\0".join([images[0].prompt, *(image.name for image in images)])
        return cls(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), images[0].prompt, images)


def make_questions(images: list[ListedImage], size: int) -> tuple[list[Question], int]:
    """Groups images by prompt, in their order, and cuts the groups.

    Args:
        images: all of them.
        size: images in a question.

    Returns:
        The questions, and how many images are in none, since too few of their prompt are left.
    """
    by_prompt: dict[str, list[ListedImage]] = {}
    for image in images:
        by_prompt.setdefault(image.prompt, []).append(image)
    questions = [
        Question.of(group[i : i + size]) for group in by_prompt.values() for i in range(0, len(group) - size + 1, size)
    ]
    return questions, len(images) - size * len(questions)


def fraction(*key: object) -> float:
    """A number in [0, 1) that follows from the key alone, and looks random."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def places(question: Question, seed: int, judge: str) -> list[int]:
    """The images' positions from left to right: half of the judges see the sides of a pair the other way round."""
    return sorted(range(len(question.images)), key=lambda i: fraction("place", seed, judge, question.id, i))


def order(questions: list[Question], seed: int, judge: str, overlap: float) -> list[Question]:
    """The questions in the order in which a judge sees them.

    Those that everybody answers come in the same order for all, spread evenly over the others, so that judges have answers
    to compare however far they get. The others come in an order of the judge's own: two judges who work at the same time
    rarely get the same one.

    Args:
        questions: all of them.
        seed: of the folder.
        judge: who is asked.
        overlap: the share that everybody answers.
    """
    common = sorted(
        (q for q in questions if is_common(q, seed, overlap)), key=lambda q: fraction("common", seed, q.id)
    )
    own = sorted(
        (q for q in questions if not is_common(q, seed, overlap)), key=lambda q: fraction("own", seed, judge, q.id)
    )
    rank = {q.id: (i + 0.5) / len(group) for group in (common, own) for i, q in enumerate(group)}
    return sorted(questions, key=lambda q: (rank[q.id], q.id))


def is_common(question: Question, seed: int, overlap: float) -> bool:
    """Whether everybody answers a question."""
    return fraction("overlap", seed, question.id) < overlap
