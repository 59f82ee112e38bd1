"""The page `docs/performance.md`: its tables, made from the stored results, in the prose of `performance_page.template`."""

from string import Template

from measuring import HERE, stored


NAMES = {
    "forward": "U-Net, forward alone",
    "unet": "U-Net with LoRA, forward and backward",
    "unet_checkpointed": "the same with gradient checkpointing",
    "vae": "VAE, encoding both images",
    "text": "text encoders, once for both images",
}
# TFLOP per pair that the project set out with.
COUNTED_BEFORE = {
    "unet": 28.2,
    "unet_checkpointed": 38.4,
    "vae": 9.76,
    "text": 0.11,
}
DOCS = HERE.parent.parent / "docs"
SCRIPTS = (
    "flops",
    "scaled_sdxl",
    "step",
    "profile_step",
    "reference_forward",
    "peak_memory",
    "growth",
    "earlier",
    "buckets",
)
MOVED = ("median_displacement", "99_percent")
MODEL_PARTS = ("U-Net forward", "backward", "VAE", "text encoders", "optimizer")


def table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def interval(ratio: dict) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def verdict(ratio: dict, bar: float, at_most: bool) -> str:
    """Whether the whole interval is on the right side of a bar, or only its median, or not even that."""
    sign = 1 if at_most else -1
    worst = ratio["high"] if at_most else ratio["low"]
    if sign * worst <= sign * bar:
        return "met"
    return "median met, interval not" if sign * ratio["median"] <= sign * bar else "missed"


# What is measured: benchmark, ratio, what it is, bar, and whether that is the most or the least.
BARS = (
    ("step", "cached over bare", "step over bare U-Net, cached", 1.03, True),
    ("step", "not cached over bare", "step over bare U-Net, VAE and text encoders, not cached", 1.03, True),
    ("step", "not cached over cached", "pairs/s cached, over not cached", 1.25, False),
    ("step", "not cached over cached", "the same, over 95 % of its bound by operations", None, False),
    ("earlier", "pairs/s, cached", "pairs/s cached, over the earlier script", 1.3, False),
    ("earlier", "pairs/s, not cached", "pairs/s not cached, over the earlier script", 1.0, False),
    ("reference_forward", "orpo over dpo", "ORPO's step over the same with a reference forward", 0.8, True),
)


def bars_table(results: dict[str, dict]) -> str:
    """Every bar that these benchmarks measure."""
    rows = []
    for name, ratio, what, bar, at_most in BARS:
        bar = bar or 0.95 * scaled_bound(results["scaled_sdxl"])
        shown = f"{'at most' if at_most else 'at least'} {bar:.2f}"
        if results[name]:
            measured = results[name][ratio]
            rows.append([what, shown, interval(measured), verdict(measured, bar, at_most)])
        else:
            rows.append([what, shown, "not measured", ""])
    return table(["what", "bar", "measured: median (95 % interval)", ""], rows)


def scaled_bound(result: dict) -> float:
    flops = result["scaled"]
    return (flops["unet"] + flops["vae"] + flops["text"]) / flops["unet"]


def flops_table(result: dict) -> str:
    rows = []
    for name, title in NAMES.items():
        gib = f"{result['weights'][name] * 2 / 2**30:.2f} GiB" if name in result["weights"] else ""
        rows.append([title, f"{result['flops'][name] / 1e12:.2f}", COUNTED_BEFORE.get(name, ""), gib])
    return table(["module", "TFLOP per pair", "as counted before", "weights in fp16"], rows)


def scaled_table(result: dict) -> str:
    real, scaled = result["real"], result["scaled"]
    rows = [
        [NAMES[name], f"{real[name] / 1e12:.2f} T", f"{scaled[name] / 1e9:.2f} G", ""]
        if name not in ("vae", "text")
        else [
            NAMES[name],
            f"{real[name] / 1e12:.2f} T, {real[name] / real['unet']:.4f} of the U-Net",
            f"{scaled[name] / 1e9:.2f} G, {scaled[name] / scaled['unet']:.4f} of the U-Net",
            f"{(scaled[name] / scaled['unet']) / (real[name] / real['unet']) - 1:+.1%}",
        ]
        for name in real
    ]
    return table(
        ["operations per pair", "SDXL, 1024 pixels", f"scaled, {result['resolution']} pixels", "ratio differs by"],
        rows,
    )


def step_table(result: dict) -> str:
    rows = [[name, value] for name, value in result["milliseconds"].items()]
    return table(["step", "median ms"], rows)


def profile_table(result: dict) -> str:
    parts = result["milliseconds"]
    totals = {name: sum(values.values()) for name, values in parts.items()}
    order = sorted(parts["cached"], key=lambda part: (part not in MODEL_PARTS, -parts["not cached"][part]))
    rows = [
        [part, *(f"{parts[name][part]:.1f} ms, {parts[name][part] / totals[name]:.2%}" for name in parts)]
        for part in order
    ]
    own = {name: sum(ms for part, ms in values.items() if part not in MODEL_PARTS) for name, values in parts.items()}
    rows.append(
        [
            "**all but the model and the optimizer**",
            *(f"**{own[name]:.1f} ms, {own[name] / totals[name]:.2%}**" for name in parts),
        ]
    )
    return table(["part of a mean step", *parts], rows)


def memory_table(result: dict) -> str:
    rows = [["imports alone", result["imports"]], *result["mib"].items()]
    return table(["run", "peak resident set, MiB"], rows)


def data_table(result: dict) -> str:
    sizes = result["data"]
    return table(list(sizes[0]), [[f"{row['pairs']:,}", *list(row.values())[1:]] for row in sizes])


def growth_table(result: dict) -> str:
    rows = [
        [f"{name} {x}", ms, note]
        for name in ("batch", "resolution", "processes")
        for x, ms, note in _per_unit(name, result[name])
    ]
    return table(["", "ms a step", ""], rows)


def _per_unit(name: str, points: list) -> list[list]:
    unit = {"batch": lambda x: x, "resolution": lambda x: (x / 64) ** 2, "processes": lambda x: 1}[name]
    title = {"batch": "a pair", "resolution": "a square of 64 pixels", "processes": "a pair and process"}[name]
    return [[x, ms, f"{ms / unit(x):.1f} ms {title}"] for x, ms in points]


def machines_table(results: dict[str, dict]) -> str:
    rows = [
        [name, m["device"], m["cores"], m["threads"], m["clock"], m["load"], m["torch"]]
        for name, result in results.items()
        if result and name not in ("flops", "scaled_sdxl")
        for m in [result["machine"]]
    ]
    return table(["benchmark", "device", "cores", "threads", "clock", "load before its end", "torch"], rows)


def buckets_text(result: dict) -> str:
    """Pairs a second in buckets, and how far their order is from a permutation."""
    step = result["step"]
    order = [
        [row["batch_size"], *(f"{row[name]:.2%}" for name in MOVED), row["pairs_more"]] for row in result["order"]
    ]
    return (
        f"Pairs a second in mixed buckets over squares: {interval(step['pairs_a_second'])} as they are, and"
        f" {interval(step['per_pixel'])} per pixel, as buckets have less area; over {step['per_pixel']['rounds']} steps in the shapes"
        f" {', '.join(step['shapes'])}. How far pairs come from their place"
        " in a permutation, as a share of an epoch of 10,000 pairs in the shapes of photographs, and what an epoch has more:\n\n"
        + table(["batch size of all processes", "median", "99 % below", "pairs more an epoch"], order)
    )


def page() -> str:
    """The page's text."""
    results = {name: stored(name) for name in SCRIPTS}
    flops, step = results["flops"], results["step"]
    tables = {
        "flops": (flops_table, "flops"),
        "scaled": (scaled_table, "scaled_sdxl"),
        "step": (step_table, "step"),
        "profile": (profile_table, "profile_step"),
        "reference": (step_table, "reference_forward"),
        "earlier": (step_table, "earlier"),
        "memory": (memory_table, "peak_memory"),
        "growth": (growth_table, "growth"),
        "data": (data_table, "growth"),
        "buckets": (buckets_text, "buckets"),
    }
    values = {
        key: make(results[name]) if results[name] else "Not measured." for key, (make, name) in tables.items()
    } | {
        "bars": bars_table(results),
        "bound": f"{flops['bound']:.2f}",
        "bound_checkpointed": f"{flops['bound_checkpointed']:.2f}",
        "scaled_bound": f"{scaled_bound(results['scaled_sdxl']):.3f}",
        "bare_bound": interval(step["bare not cached over bare cached"]),
        "syncs": step["host reads in a micro-step"],
        "machines": machines_table(results),
    }
    return Template((HERE / "performance_page.template").read_text()).substitute(values)
