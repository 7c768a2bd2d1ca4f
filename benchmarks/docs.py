"""The tables of measured numbers in README.md and docs, made of the stored records.

    python -m benchmarks.docs

The lines of a page below ``<!-- NAME -->``, up to the next empty one, are what :func:`blocks` gives under that name. A
page needs no block, and a block may stand on several pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from benchmarks import (
    attention,
    backbones,
    data,
    decoding,
    delta_steps,
    domains,
    examples,
    gpu,
    halving,
    large_folder,
    log_bias,
    prediction,
    prompt_recipe,
    real_costs,
    real_protocol,
    robustness_tables,
    shards,
    speed,
    strengths,
    sweep,
    test_time,
    together,
    unknown_images,
    whole_models,
)
from benchmarks.records import RESULTS, Records, markdown

ROOT = Path(__file__).parents[1]
SOURCES = (
    large_folder,
    real_protocol,
    real_costs,
    robustness_tables,
    strengths,
    test_time,
    speed,
    delta_steps,
    attention,
    data,
    sweep,
    log_bias,
    prompt_recipe,
    examples,
    unknown_images,
    decoding,
    prediction,
    backbones,
    whole_models,
    gpu,
    domains,
    halving,
    shards,
    together,
)
ROWS = {
    "linear": (),
    "bias": ("bias", "prompt_bias"),
    "lora": ("lora", "prompt_lora"),
    "adapter": ("adapter", "adapter_plus"),
    "dora": ("lora", "dora"),
    "ssf": ("ssf", "difffit"),
    "prefix": ("prefix",),
    "prompt": ("vpt_shallow", "vpt_deep", "prompt_bias", "prompt_lora", "prompt"),
    "full": (),
    "fact": ("lora", "fact"),
    "vera": ("lora", "vera"),
    "pvera": ("lora", "vera", "pvera"),
    "mlae": ("lora", "mlae"),
    "glora": ("lora", "glora"),
    "spt_lora": ("lora", "spt_lora"),
    "gps": ("bias", "gps"),
    "convpass": ("adapter", "convpass"),
    "rep_adapter": ("adapter", "rep_adapter"),
}
"""By delta, the rows that its page shows between those of the linear probe and of full fine-tuning, once measured."""
_BLOCK = re.compile(r"<!-- ([a-z0-9_ ]+) -->\n(.*?)(?=\n\n|(?<=-->\n)\n|\n*\Z)", re.DOTALL)


def pages() -> list[Path]:
    """README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def found_blocks(page: Path) -> dict[str, str]:
    """The blocks of a page as they stand there, by name."""
    return dict(_BLOCK.findall(page.read_text(encoding="utf-8")))


def write_blocks(page: Path, made: Mapping[str, str]) -> Iterator[str]:
    """Puts blocks into a page, leaves those alone that are not given, and yields the names of those that changed."""
    before = found_blocks(page)
    text = page.read_text(encoding="utf-8")

    def filled(match: re.Match[str]) -> str:
        block = made.get(match[1], match[2])
        apart = "\n" if block and not match[2] else ""  # from what follows a place that was empty
        return f"<!-- {match[1]} -->\n{block}{apart}"

    page.write_text(_BLOCK.sub(filled, text), encoding="utf-8")
    yield from (name for name, block in before.items() if made.get(name, block) != block)


def blocks(page: Path) -> dict[str, str]:
    """All blocks that a page may have; the rows of `protocol` are a delta's own on its page."""
    made = _everywhere()
    if page.parent.name == "deltas" and page.stem in ROWS:
        shown = ("linear", *ROWS[page.stem], "full")
        of = (page.stem,) if page.stem in real_protocol.OTHERS else shown
        made = made | {"protocol": real_protocol.accuracy(methods=shown, of=of)}
    return made


@cache
def _everywhere() -> dict[str, str]:
    found = [pair for source in SOURCES for pair in source.blocks().items()]
    return dict(found) | {"constants": _constants()}


def _constants() -> str:
    """What docs/scale.md reckons with."""
    kept = Records(RESULTS / "speed.jsonl", "table", "backbone", "tokens", "precision")
    half, single = (kept.find("steps", speed.SHOWN, 50, precision) or {} for precision in ("bf16", "fp32"))
    read = Records(RESULTS / "data.jsonl", "task").find("caltech101") or {}
    memory, images = single["memory_mib"]["ours"], single["batch"]
    as_on_a_gpu = f"half of fp32's {memory} MiB for {images} images, which is bf16 with fused attention, as on a GPU"
    rows = [
        ["a step on two cores (AMD EPYC), bf16", f"{half['step_ms']['ours']:.0f} ms an image"],
        [f"activation memory: {as_on_a_gpu}", f"{memory / images / 2:.0f} MiB an image"],
        ["decoding and scaling, one core", f"{read['images_per_s']['first epoch']:.0f} images/s"],
        ["decoded image, 224 px", f"{read['cache_bytes_per_1000_images'] / 1e6:.1f} KB"],
    ]
    return markdown(["measured (`python -m benchmarks`, `python -m benchmarks.data`)", "value"], rows)


def main() -> None:
    """Writes all blocks and says which have changed."""
    for page in pages():
        for name in write_blocks(page, blocks(page)):
            print(f"{page.relative_to(ROOT)}: {name}")


if __name__ == "__main__":
    main()
