"""The time of a training step: relative to bare calls of its modules, and with cached latents and embeddings to without.

    python benchmarks/performance/step.py

In one run of `training.train`, cached and not cached batches take turns, and after each step the same modules are called
bare, for the same arithmetic: random inputs of the same shapes, one call of the U-Net for both images of all pairs, a
mean squared error, backward, AdamW over the LoRA. Bare steps load no data, clip nothing, measure and log nothing.
On CUDA the same with bfloat16, and the micro-step is run once under `torch.cuda.set_sync_debug_mode("error")`.
"""

import argparse
from collections import defaultdict


import measuring  # noqa: F401, isort: skip

import torch
import torch.nn.functional as F
from orpo.training.optimizer import make_optimizer
from orpo.training.step import compute_losses

from interleaved import WARM_UP, Interleaved, Run, add_model_arguments, start
from measuring import DEVICE, milliseconds, paired_ratio, print_table, seconds, store, stored


class Bare:
    """The modules of a run, called with inputs of the batches' shapes and nothing else."""

    def __init__(self, run: Run) -> None:
        self.run, self.model = run, run.model
        self.optimizer = make_optimizer(run.args, run.parameters, run.args.train_batch_size)
        pairs, side, device = run.args.train_batch_size, run.args.resolution, DEVICE
        self.latents = torch.randn(2 * pairs, 4, side // 8, side // 8, device=device, dtype=self.model.dtype)
        self.noise = torch.randn_like(self.latents, dtype=torch.float32)
        self.timesteps = torch.randint(1000, (2 * pairs,), device=device)
        self.time_ids = torch.full((2 * pairs, 6), float(side), device=device)
        self.pixels = torch.rand(2 * pairs, 3, side, side, device=device, dtype=self.model.pipeline.vae.dtype)
        pipeline = self.model.pipeline
        self.tokens = [
            tokenizer(["a photograph"] * pairs, padding="max_length", max_length=77, return_tensors="pt").input_ids.to(
                device
            )
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
        ]
        self.embeds, self.pooled = self.encode_text()

    @torch.no_grad()
    def encode_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        pipeline = self.model.pipeline
        outputs = [
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip((pipeline.text_encoder, pipeline.text_encoder_2), self.tokens)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1][0]

    def unet_step(self, latents: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> None:
        added = {"text_embeds": pooled.repeat(2, 1), "time_ids": self.time_ids}
        with self.run.accelerator.autocast():
            prediction = self.model.denoiser(
                latents, self.timesteps, embeds.repeat(2, 1, 1), added_cond_kwargs=added, return_dict=False
            )[0]
        F.mse_loss(prediction.float(), self.noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cached(self) -> None:
        self.unet_step(self.latents, self.embeds, self.pooled)

    def not_cached(self) -> None:
        with torch.no_grad():
            latents = self.model.pipeline.vae.encode(self.pixels).latent_dist.sample()
        self.unet_step(latents.to(self.model.dtype), *self.encode_text())


def check_no_sync(run: Run, batch: dict) -> str:
    """Runs forward and backward of a batch where CUDA raises on every read from the device."""
    if DEVICE.type != "cuda":
        return "needs CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _, _ = compute_losses(run.args, run.model, run.model.denoiser, batch)
        losses.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for parameter in run.parameters:
            parameter.grad = None
    return "none"


def measure(args, **flags) -> dict:
    """Times of product and bare modules, in turn."""
    times: dict[str, list[float]] = defaultdict(list)
    with start(args, **flags) as run:
        bare = Bare(run)

        def call_bare(name: str, batch: dict) -> None:
            times[f"bare, {name}"].append(seconds(bare.cached if name == "cached" else bare.not_cached))
            times["batch"] = [batch] if name == "cached" else times["batch"]

        product = run.train(Interleaved({"cached": run.cached, "not cached": run.data}, call_bare), args.rounds)
        syncs = check_no_sync(run, times.pop("batch")[0])
    times = product | {name: values[WARM_UP:] for name, values in times.items()}
    return {
        "pairs": args.train_batch_size,
        "resolution": args.resolution,
        "milliseconds": {name: milliseconds(values) for name, values in times.items()},
        "cached over bare": paired_ratio(times["cached"], times["bare, cached"]),
        "not cached over bare": paired_ratio(times["not cached"], times["bare, not cached"]),
        "not cached over cached": paired_ratio(times["not cached"], times["cached"]),
        "bare not cached over bare cached": paired_ratio(times["bare, not cached"], times["bare, cached"]),
        "host reads in a micro-step": syncs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, rounds=20)
    args = parser.parse_args()
    result = measure(args)
    print_table(["step", "ms"], [[name, value] for name, value in result["milliseconds"].items()])
    print_table(
        ["ratio", "median", "95 % interval", "range"],
        [
            [name, r["median"], f"{r['low']} to {r['high']}", f"{r['min']} to {r['max']}"]
            for name, r in result.items()
            if isinstance(r, dict) and "median" in r
        ],
    )
    flops = stored("scaled_sdxl")
    if flops and args.pretrained_model_name_or_path is None:
        scaled = flops["scaled"]
        bound = (scaled["unet"] + scaled["vae"] + scaled["text"]) / scaled["unet"]
        result["bound"] = round(bound, 4)
        print(f"bound by operations: {bound:.3f}")
    store(args.output_dir, "step", result)


if __name__ == "__main__":
    main()
