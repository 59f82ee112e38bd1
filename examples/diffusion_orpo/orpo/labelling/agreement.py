"""How far annotators agree: the share of equal answers, and Cohen's kappa, which corrects it for chance."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

from .votes import Vote


@dataclass(frozen=True)
class Agreement:
    """Two annotators on the questions that both answered.

    Attributes:
        annotators: their names.
        about: "choice" in pairs; "best" or "worst" in rankings.
        questions: that both answered.
        share: of equal answers, 0 to 1.
        kappa: 1 for full agreement, 0 for chance; None if both always gave the same answer, which leaves it undefined.
    """

    annotators: tuple[str, str]
    about: str
    questions: int
    share: float
    kappa: float | None

    def __str__(self) -> str:
        kappa = "undefined, as only one answer was given" if self.kappa is None else f"{self.kappa:.2f}"
        return (
            f"{self.annotators[0]} and {self.annotators[1]}: {self.share:.0%} of {self.questions} answers are the same"
            f" ({self.about}); Cohen's kappa {kappa}"
        )


def agreements(votes: dict[str, dict[str, Vote]]) -> list[Agreement]:
    """Every two annotators who answered a question in common. In rankings, best and worst are separate answers.

    Args:
        votes: annotator to question to vote.
    """
    ranking = any(len(vote.shown) > 2 for given in votes.values() for vote in given.values())
    found = []
    for one, other in combinations(sorted(votes), 2):
        common = sorted(votes[one].keys() & votes[other].keys())
        for about in (("best", "worst") if ranking else ("choice",)) if common else ():
            answers = [
                [_answer(votes[annotator][question], about) for question in common] for annotator in (one, other)
            ]
            share, kappa = share_and_kappa(*answers)
            found.append(Agreement((one, other), about, len(common), share, kappa))
    return found


def _answer(vote: Vote, about: str) -> Hashable:
    """An answer that does not depend on the images' positions.

    Their names differ from question to question, so kappa's categories are their ranks in the alphabet of names.
    """
    if vote.choice != "best":
        return vote.choice
    return sorted(vote.shown).index(vote.worst if about == "worst" else vote.best)


def share_and_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[float, float | None]:
    """Cohen's kappa (1960): (share - chance) / (1 - chance).

    Args:
        a, b: the answers of two annotators to the same questions, at least one.
    """
    n = len(a)
    share = sum(x == y for x, y in zip(a, b, strict=True)) / n
    counts_a, counts_b = Counter(a), Counter(b)
    chance = sum(counts_a[answer] * counts_b[answer] for answer in counts_a) / n**2
    return share, None if chance == 1 else (share - chance) / (1 - chance)
