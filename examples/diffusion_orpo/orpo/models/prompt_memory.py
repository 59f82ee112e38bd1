"""Prompts that are drawn repeatedly are encoded once, after which the text encoders need not be loaded for them."""

from diffusers import DiffusionPipeline


class PromptMemory:
    """Remembers what pipelines' `encode_prompt` returned. Every pipeline of diffusers calls it to draw.

    Its content is on the device: 0.6 MB per prompt for SDXL.
    """

    def __init__(self) -> None:
        self._prompts: set[str] = set()
        self._embeddings: dict[str, object] = {}

    def has(self, prompts: list[str]) -> bool:
        return set(prompts) <= self._prompts

    def attach(self, pipeline: DiffusionPipeline) -> None:
        """Makes the pipeline encode only prompts that are not remembered."""
        encode_prompt = pipeline.encode_prompt

        def remembered(*args, **kwargs):
            key = repr((args, sorted(kwargs.items())))
            if key not in self._embeddings:
                self._embeddings[key] = encode_prompt(*args, **kwargs)
            return self._embeddings[key]

        pipeline.encode_prompt = remembered

    def add(self, prompts: list[str]) -> None:
        """Notes that these were drawn with a pipeline that `attach` was called for."""
        self._prompts.update(prompts)
