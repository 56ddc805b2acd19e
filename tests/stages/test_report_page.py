"""The report in a browser: what moves, what is asked for, what fits. Its figures are made up; the stage's own are looked at in test_evaluate."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.base import digest
from schemas.manifest import Cost
from stages.evaluate.curves import Curve, TrainingCurves
from stages.evaluate.grid import grid_groups
from stages.evaluate.report import GridPictures, render_report
from stages.evaluate.rows import Row
from stages.reports.chain import ChainRun, chain_part, replace_chain_part
from stages.training.alarms import RollBack
from tests.browser import WINDOWS, Tab, assert_fits_and_is_quiet, browser, needs_browser

PROMPTS = ("a red fox", "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft, at <dusk> & dawn")
MODELS = {"teacher": (8, 4, 1), "lightning-adversarial": (8, 4, 2, 1), "lcm-lora": (4, 2), "dmd": (1,)}
METRICS = {"fid_teacher": "FID against other samples of the teacher", "fid_real": "FID against real images"}
TABLE, VIEWER = "[...document.querySelectorAll('.all img')]", "[...document.querySelectorAll('.viewer img')]"

ROWS = tuple(
    Row(model, model, steps, tuple(range(steps, 0, -1)), "trailing", "epsilon", 1.0) for model, counts in MODELS.items() for steps in counts
)


def colour(row: Row, prompt: int) -> np.ndarray:
    """A picture that no other row or prompt has."""
    return np.full((64, 64, 3), (40 * list(MODELS).index(row.model), 30 * row.steps, 90 + 60 * prompt), np.uint8)


def lineage() -> list[dict[str, Any]]:
    chain = {"ingest": ("table",), "select": ("ingest",), "teacher": ("source",), "encode": ("ingest", "select", "teacher")}
    chain |= {"lightning-32-8": ("encode", "teacher"), "lightning-8-4": ("lightning-32-8", "encode"), "lcm": ("encode", "teacher")}
    chain |= {"evaluate": ("ingest", "select", "teacher", "encode", "lightning-32-8", "lightning-8-4", "lcm", "prompts")}
    return [
        {
            "node": node,
            "kind": "student_unet",
            "identity": digest(node),
            "stage": node,
            "revision": 1,
            "inputs": {n: digest(n) for n in reads},
        }
        for node, reads in chain.items()
    ]


def summary() -> dict[str, Any]:
    rows = [
        {"name": row.name, "model": row.model, "family": row.family, "steps": row.steps}
        | {"scores": {"fid_teacher": 100 / row.steps, "fid_real": 200 / row.steps}}
        | {"intervals": {name: [50 / row.steps, 300 / row.steps] for name in METRICS}}
        | {
            "timing": {
                "latency_seconds": 0.1 * row.steps,
                "latency_interval": [0.09 * row.steps, 0.12 * row.steps],
                "images_per_second": 9.0,
                "throughput_interval": [8.5, 9.5],
                "batch_size": 8,
                "peak_memory_bytes": None,
                "device": "cpu",
            }
        }
        for row in ROWS
    ]
    samples = {
        "images": 2,
        "distinct_prompts": 2,
        "prompts_from": "file",
        "prompts_sha256": "0" * 64,
        "prompts_file_sha256": "2" * 64,
        "seed": 0,
        "teacher_guidance_scale": 7.0,
    }
    teacher = {"architecture": "StableDiffusionXLPipeline", "resolution": 64, "unet_parameters": 10**6, "weights_digest": "1" * 64}
    return {
        "artifact": digest("evaluate"), "verdict": "As said.", "teacher": teacher, "samples": samples, "warnings": ["Few images."], "rows": rows,
        "extractor": {"title": "a network", "dimensions": 8}, "real_images": 9, "real_images_from": "selection", "metrics": METRICS,
        "intervals": {"confidence": 0.95, "resamples": 100}, "lineage": lineage(), "config": {"protocol": "lightning-coco10k"},
        "funnel": [{"label": "rows", "count": 9, "lost": {}}, {"label": "images", "count": 4, "lost": {"sharpness": 5}}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups = grid_groups(ROWS)
    pictures = [[[colour(row, prompt) for prompt in range(2)] for row in group.rows] for group in groups]
    losses = (Curve("student.loss", tuple((float(step), 1 / step) for step in range(1, 30))),)
    curves = {"lightning-8-4": TrainingCurves(losses, (RollBack("saturated", 12, 8),))}
    text = render_report(summary(), GridPictures(PROMPTS, groups, pictures), {}, curves)
    rows = lineage()
    run = ChainRun("tiny.yaml", "name: tiny\nseed: 0\n", ("f" * 40,), ("torch 2", "diffusers 0"), ("cpu", "cuda"))
    costs = {row["identity"]: Cost(wall_seconds=100.0 * number, peak_memory_bytes=10**9) for number, row in enumerate(rows)}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(replace_chain_part(text, chain_part(rows, costs, run)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_it_fits_and_is_quiet(tab: Tab, page: Path, width: int, scheme: str) -> None:
    assert_fits_and_is_quiet(tab, page, width, scheme)


@needs_browser
def test_a_slider_moves_the_pictures(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    assert tab.js("[...document.querySelectorAll('.sliders span')].map((name) => name.textContent)") == list(MODELS)
    said = "[...document.querySelectorAll('.sliders output')].map((steps) => steps.value)"
    assert tab.js(said) == ["8 steps", "4 steps", "4 steps", "1 step"]
    slider = "document.querySelectorAll('.sliders input')[2]"
    before = tab.js(f"{VIEWER}.map((image) => image.src)")
    tab.js(f"{slider}.focus()")
    tab.press("ArrowRight", 39)
    assert tab.js(f"{slider}.ariaValueText") == "2 steps"
    after = tab.js(f"{VIEWER}.map((image) => image.src)")
    assert [one != two for one, two in zip(before, after, strict=True)] == [False, False, True, False] * 2, "its family's, and no others"
    assert after[2::4] == tab.js(f"{TABLE}.filter((image) => image.dataset.label === 'lcm-lora, 2 steps').map((image) => image.src)")
    assert tab.complaints() == []


@needs_browser
def test_a_picture_is_enlarged_beside_the_teachers(tab: Tab, page: Path) -> None:
    tab.open(page, 390)
    shown = "[...document.querySelectorAll('dialog[open] figcaption')].map((caption) => caption.textContent)"
    assert tab.js(shown) == []
    tab.js(f"{VIEWER}[6].focus()")
    tab.press("Enter", 13, "\r")
    assert tab.js(shown) == ["teacher, 8 steps", "lcm-lora, 4 steps"]
    assert tab.js("document.querySelector('dialog .said').textContent") == PROMPTS[1]
    assert tab.js(f"document.querySelectorAll('dialog img')[1].src === {VIEWER}[6].src")
    assert tab.js("document.querySelector('dialog').getBoundingClientRect().right") <= 390
    tab.press("Escape", 27)
    assert tab.js(shown) == []
    tab.js(f"{VIEWER}[0].click()")
    assert tab.js(shown) == ["teacher, 8 steps"]
    tab.js("document.querySelector('dialog button').click()")
    assert tab.js(shown) == []
    assert tab.complaints() == []


@needs_browser
def test_a_box_of_the_lineage_shows_its_whole_digest(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    rest = f"document.querySelector('#a-{digest('lcm')[:12]} code span')"
    assert tab.js(f"{rest}.checkVisibility()") is False
    tab.js(f"document.querySelector('svg a[href=\"#a-{digest('lcm')[:12]}\"]').dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert tab.js(f"{rest}.checkVisibility()") is True
    assert tab.complaints() == []


@needs_browser
def test_without_scripts_the_table_is_there(tab: Tab, page: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page, 390)
        assert tab.js(f"{TABLE}.every((image) => image.checkVisibility())")
        assert tab.js("document.querySelector('.viewer').checkVisibility()") is False
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_picture_is_in_the_page_once(page: Path) -> None:
    pictures = re.findall(r"data:image/[^\"]*", page.read_text(encoding="utf-8"))
    assert len(pictures) == 2 * len(ROWS)
    assert len(set(pictures)) == len(pictures)


def test_it_says_how_it_was_made_and_what_others_published(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for said in (
        "f" * 40,
        "distill run tiny.yaml",
        "name: tiny",
        "46 min 40 s",
        "1.0 GB",
        "<td>22.30</td>",
        "8.5–9.5",
        "2" * 64,
        "SDXL-Lightning as published, by another evaluator: do not compare",
        "Step 12: saturated; back to 8",
    ):
        assert said in text, said
    assert text.count('<tbody class="published">') == 1, "in the table of FID against real images, the paper whose protocol is chosen"
    assert "33.52" not in text, "of a metric that was not measured"
    assert text.count('class="threshold"') == 1
    assert "GPU hours" not in text, "none were taken"
