"""How `--validation_scorer` compares the images that a run generates with those of the base."""

import numpy as np
import torch
from PIL.Image import Image

from ..scoring.scorers import load_scorer, score_images
from ..scoring.win_rate import compare_scores


class Judge:
    """Scores validation images against the base's, which it scores once.

    Args:
        scorer: as `--validation_scorer` names it.
        prompts: of the validation.
        images_without_lora: the base's, as many for each prompt, prompt by prompt.
        device: for the scorer's model.
    """

    def __init__(
        self, scorer: str, prompts: list[str], images_without_lora: list[Image], device: torch.device
    ) -> None:
        self.name, self.scorer, self.prompts = scorer, load_scorer(scorer, device), prompts
        self.scores_without_lora = self._score(images_without_lora)

    def compare(self, images: list[Image]) -> dict[str, float]:
        """Compares images generated with the LoRA with the base's.

        Returns:
            `eval_win_rate`, from 0 to 1, ties counting half, and `eval_score_difference`, the mean difference of the
            scores.
        """
        comparison = compare_scores(self.scores_without_lora, self._score(images))
        return {"eval_win_rate": comparison.win_rate, "eval_score_difference": comparison.difference}

    def _score(self, images: list[Image]) -> np.ndarray:
        """Scores (prompts, images per prompt)."""
        per_prompt = len(images) // len(self.prompts)
        prompts = [prompt for prompt in self.prompts for _ in range(per_prompt)]
        return np.array(score_images(self.name, self.scorer, images, prompts)).reshape(len(self.prompts), per_prompt)
