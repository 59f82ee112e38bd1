"""How long prompts are in tokens, by each tokenizer of a pipeline, and which are cut."""

from dataclasses import dataclass, field

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import CheckConfig


NO_LIMIT = 10**6  # transformers says 10^30 if a tokenizer's files name none


@dataclass
class PromptLengths:
    """Lengths of different prompts under one tokenizer.

    Attributes:
        tokenizer: of the pipeline.
        limit: tokens that the text encoder gets, including those that begin and end a text.
        lengths: tokens of each prompt, in the order they came.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    lengths: list[int] = field(default_factory=list)

    def add(self, prompts: list[str]) -> None:
        self.lengths += map(len, self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"])

    def summary(self, pairs: np.ndarray) -> dict:
        """Limit, median and longest in tokens, and how many prompts are cut at their end.

        Args:
            pairs: int (N,), how many pairs have each prompt.
        """
        lengths = np.array(self.lengths)
        is_cut = lengths > self.limit
        return {
            "limit": self.limit if self.limit < NO_LIMIT else None,
            "median": float(np.median(lengths)) if len(lengths) else None,
            "longest": int(lengths.max()) if len(lengths) else None,
            "cut": int(is_cut.sum()),
            "share_of_pairs_cut": float(pairs[is_cut].sum() / max(1, pairs.sum())),
        }


def load_tokenizers(config: CheckConfig) -> dict[str, PromptLengths]:
    """The tokenizers of the pipeline in `--pretrained_model_name_or_path`, by their names in it.

    Raises:
        ValueError: they can't be loaded, or there are none.
    """
    from diffusers import DiffusionPipeline  # takes seconds, which a check without a pipeline doesn't need

    name, options = config.pretrained_model_name_or_path, {"revision": config.revision, "cache_dir": config.cache_dir}
    try:
        classes = {
            key: value[1]
            for key, value in DiffusionPipeline.load_config(name, **options).items()
            if key.startswith("tokenizer") and value[1] is not None
        }
        tokenizers = {key: AutoTokenizer.from_pretrained(name, subfolder=key, **options) for key in classes}
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_model_name_or_path={name}: no tokenizers can be loaded: {error}") from error
    if not tokenizers:
        raise ValueError(f"--pretrained_model_name_or_path={name} is a pipeline without tokenizers: leave it out.")
    return {
        key: PromptLengths(tokenizer, _limit(tokenizer, classes[key], config.max_sequence_length))
        for key, tokenizer in tokenizers.items()
    }


def _limit(tokenizer: PreTrainedTokenizerBase, class_name: str, max_sequence_length: int | None) -> int:
    """CLIP's text encoders have as many positions as its tokenizer says; with T5, the pipeline takes as many as it is told."""
    if "CLIP" in class_name or max_sequence_length is None:
        return tokenizer.model_max_length
    return max_sequence_length
