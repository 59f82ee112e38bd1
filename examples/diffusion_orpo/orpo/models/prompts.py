"""Tokens for text encoders, and the warning about prompts that are truncated."""

import logging

import torch

from ..runtime.messages import printable
from ..runtime.transfer import to_device


logger = logging.getLogger(__name__)


class FirstTruncation(logging.Filter):
    """Reports only the first prompt that is truncated, not one at every step.

    The tokenizer's own warning is dropped: it warns of errors with the full prompt, which no encoder sees.
    """

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "Token indices sequence length is longer" in message:
            return False
        if "truncated because" not in message:
            return True
        is_first, self.seen = not self.seen, True
        return is_first


first_truncation = FirstTruncation()


def report_first_truncation(*loggers: str) -> None:
    """Keeps these loggers, and those of tokenizers, from reporting more than the first truncated prompt."""
    for name in (__name__, "transformers.tokenization_utils_base", *loggers):
        logging.getLogger(name).addFilter(first_truncation)


def clip_tokens(tokenizer, prompts: list[str], device: torch.device) -> torch.Tensor:
    """Tokens (B, 77) of B prompts, as pipelines make them, but copied without waiting for the device."""
    limit = tokenizer.model_max_length
    for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids):
        if len(tokens) > limit:
            logger.warning(
                f"A prompt of {len(tokens)} tokens is truncated because CLIP reads {limit}: {printable(prompt)}"
            )
    options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
    return to_device(tokenizer(prompts, **options).input_ids, device)
