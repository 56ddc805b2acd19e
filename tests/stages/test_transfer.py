"""`evaluate.transfer`: LoRAs on other bases and under a style, each beside that teacher itself."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from schemas.base import digest
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, PublishConfig, TransferConfig
from schemas.loading import parse_recipe
from stages.diffusion.control import edges
from stages.diffusion.lora import LORA_FILE
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator, make_scheduler
from stages.evaluate import Inputs, run
from stages.evaluate.encoded_pictures import choose_pictures
from stages.evaluate.grid import thumbnail
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import Row, rows_of
from stages.evaluate.samples import Sampler, read_pictures, sample_row
from stages.evaluate.summary import figure
from stages.evaluate.transfer import preflight_transfers
from stages.latents import LatentSet
from stages.plan import make_plan
from stages.publish.card import render_card
from stages.publish.variants import Description, TeacherSampling
from tests import tiny_pipelines
from tests.browser import WINDOWS, Tab, assert_fits_and_is_quiet, browser, needs_browser
from tests.distilled import CAPTIONS, Chain, controlnet_file
from tests.stages.test_compose import style_file
from tests.workspaces import make_workspace, open_store

WEIGHT = 0.7


class Elsewhere:
    """A chain with an LCM-LoRA, measured on another base and under a style."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = Chain(open_store(folder))
        self.lora = self.chain.lora()
        self.base = tiny_pipelines.save("sdxl", folder / "base", seed=4)
        self.style = style_file(self.chain.pipeline.unet, folder / "ink.safetensors")
        self.config = EvaluateConfig(
            prompt_count=2, teacher_steps=(8, 4), teacher_guidance_scale=3.0, extractor="efficientnet-lite0", grid_prompts=2, batch_size=2,
            transfer=(
                TransferConfig(name="other", base=str(self.base)),
                TransferConfig(name="ink", base=str(self.base), style=str(self.style), style_weight=WEIGHT),
                TransferConfig(name="wide", size_px=(16, 24)),
            ),
        )  # fmt: skip

    def run(self, config: EvaluateConfig, identity: str, finetuned: Any = None, **students: Any) -> Any:
        outside = {name: place for entry in config.transfer for name, place in entry.outside().items()}
        workspace = make_workspace(self.folder, self.chain.store, identity=identity, outside=outside)
        inputs = self.chain.inputs(**(students or {"lcm": self.lora})) | {"finetuned": finetuned or {}}
        return run(config, Inputs.model_validate(inputs), workspace)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    torch.set_num_threads(1)
    return Elsewhere(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def evaluated(elsewhere: Elsewhere) -> Any:
    return elsewhere.run(elsewhere.config, "transferred")


def test_every_entry_has_its_teacher_and_its_loras(elsewhere: Elsewhere, evaluated: Any) -> None:
    scores = evaluated.content.scores
    for name in ("other", "ink", "wide"):
        rows = {f"teacher@8+{name}", f"teacher@4+{name}", f"teacher@2+{name}", f"lcm@4+{name}", f"lcm@2+{name}"}
        assert {row for row in scores if row.endswith(f"+{name}")} == rows
        assert all(set(scores[row]) == {"fid_teacher"} and scores[row]["fid_teacher"] > 0 for row in rows)
        for row in rows:
            low, high = evaluated.content.intervals[row]["fid_teacher"]
            assert low < scores[row]["fid_teacher"] < high, row
    assert scores["lcm@4+other"] != scores["lcm@4+ink"]
    folder = elsewhere.chain.store.fetch(evaluated)
    report = json.loads((folder / "report.json").read_text())
    assert [entry["changed"] for entry in report["transfers"]] == [
        "another base",
        "another base with a style at 0.7",
        "the teacher at 16 x 24 px",
    ]
    told = {row["name"]: (row["fid_teacher"], tuple(row["interval"])) for entry in report["transfers"] for row in entry["rows"]}
    assert told["lcm@4+ink"] == (scores["lcm@4+ink"]["fid_teacher"], evaluated.content.intervals["lcm@4+ink"]["fid_teacher"])
    assert len(report["rows"]) == 4, "the table is of the student's own teacher"
    page = (folder / "report.html").read_text()
    assert "Elsewhere, without training" in page and page.count('<table class="grid">') == 1 + 3
    for name, shape in (("other", (128, 128)), ("wide", (120, 80))):
        grid = Image.open(folder / f"grid-{name}.png")
        (cell,) = {thumbnail(picture).size for picture in read_pictures(folder / f"samples/lcm-at-2-on-{name}")}
        assert cell == shape and grid.height > 2 * cell[1] and grid.width > 5 * cell[0]
    assert str(elsewhere.folder) not in page + json.dumps(report)
    long, wide = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("rows", "scores"))
    assert {(line["row"], line["metric"]): line["value"] for line in long} == {
        (row, name): of[name] for row, of in scores.items() for name in of
    }
    assert {line["row"]: line["on"] for line in wide} == {row: row.partition("+")[2] or None for row in scores}
    assert next(line["fid_real"] for line in wide if line["row"] == "lcm@4+ink") is None
    card = render_card(PublishConfig(name="tiny"), _described(), report, {})
    (line,) = re.findall(
        r"^\| lcm-lora \|.*$", card.partition("| ink: another base with a style at 0.7; FID")[2].partition("\n\n")[0], re.MULTILINE
    )
    assert figure(scores["lcm@4+ink"]["fid_teacher"]) in line


def _described() -> Description:
    sampling = TeacherSampling(scheduler="EulerDiscreteScheduler", steps=8, guidance_scale=3.0)
    return Description(
        name="tiny",
        pipeline="StableDiffusionXLPipeline",
        resolution=16,
        complete=True,
        base_model=None,
        teacher=sampling,
        variants={},
        styles={},
    )


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_the_report_of_a_real_evaluation_fits_and_is_quiet(elsewhere: Elsewhere, evaluated: Any, width: int, scheme: str, tab: Tab) -> None:
    page = elsewhere.chain.store.fetch(evaluated) / "report.html"
    assert page.stat().st_size < 10e6
    assert_fits_and_is_quiet(tab, page, width, scheme)
    assert tab.js("[...document.querySelectorAll('h2')].map((title) => title.textContent)").count("Elsewhere, without training") == 1


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def assert_diffusers_composes_the_same(elsewhere: Elsewhere, found: Any, lora: Any, row: str, scheduler_of: Callable[[Any], Any]) -> None:
    """The pictures of a LoRA's `row` on the other base, alone and under the style, beside those of a plain pipeline with both LoRAs."""
    folder = elsewhere.chain.store.fetch(found)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(elsewhere.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(elsewhere.chain.store.fetch(lora), weight_name=LORA_FILE, adapter_name="fast")
    pipeline.load_lora_weights(elsewhere.folder, weight_name=elsewhere.style.name, adapter_name="ink")
    pipeline.scheduler = scheduler_of(pipeline.scheduler.config)
    for name, weights in (("other", [1.0, 0.0]), ("ink", [1.0, WEIGHT])):
        pipeline.set_adapters(["fast", "ink"], adapter_weights=weights)
        assert_drawn(folder, f"{row}-on-{name}", pipeline, guidance_scale=1.0)


def assert_drawn(folder: Path, row: str, pipeline: Any, guidance_scale: float) -> None:
    """An evaluation's first pictures of a row in four steps are the pipeline's."""
    report = json.loads((folder / "report.json").read_text())
    prompts = report["samples"]["examples"]
    generators = [image_generator(report["samples"]["seed"], index) for index in range(len(prompts))]
    theirs = pipeline(prompts, num_inference_steps=4, guidance_scale=guidance_scale, generator=generators).images
    ours = list(read_pictures(folder / f"samples/{row}"))[: len(prompts)]
    for one, two in zip(ours, theirs, strict=True):
        assert np.abs(one.astype(int) - np.asarray(two).astype(int)).max() <= 2, row


def test_its_pictures_are_those_of_diffusers_own_composition(elsewhere: Elsewhere, evaluated: Any) -> None:
    def lcm_scheduler(config: Any) -> Any:
        return diffusers.LCMScheduler(**{name: config[name] for name in ("beta_start", "beta_end", "beta_schedule")})

    assert_diffusers_composes_the_same(elsewhere, evaluated, elsewhere.lora, "lcm-at-4", lcm_scheduler)


def test_lightnings_lora_goes_elsewhere_as_lcms_does(elsewhere: Elsewhere) -> None:
    """On another base and under a style there: Euler on the trailing grid, without guidance."""
    lightning = elsewhere.chain.lightning_lora(4)
    found = elsewhere.run(elsewhere.config, "lightning", lightning_8_4_lora=lightning)
    elsewhere_rows = {row for row in found.content.scores if row.startswith("lightning") and "+" in row}
    assert elsewhere_rows == {f"lightning-8-4-lora@4+{name}" for name in ("other", "ink", "wide")}
    trailing = functools.partial(make_scheduler, "trailing", prediction_type="epsilon")
    assert_diffusers_composes_the_same(elsewhere, found, lightning, "lightning-8-4-lora-at-4", trailing)


def test_guidance_on_top_of_a_lora(elsewhere: Elsewhere) -> None:
    """Students and changed teacher at scales of the entry's own; pictures as diffusers draws them."""
    entry = TransferConfig(name="guided", base=str(elsewhere.base), guidance_scale=2.0, teacher_guidance_scale=1.5)
    found = elsewhere.run(elsewhere.config.model_copy(update={"transfer": (entry,)}), "guided")
    folder = elsewhere.chain.store.fetch(found)
    report = json.loads((folder / "report.json").read_text())
    (told,) = report["transfers"]
    assert told["changed"] == "another base, it with guidance 1.5, students with guidance 2"
    scales = {row["name"]: row["guidance_scale"] for row in told["rows"]}
    assert scales == {"teacher@8+guided": 1.5, "teacher@4+guided": 1.5, "teacher@2+guided": 1.5, "lcm@4+guided": 2, "lcm@2+guided": 2}
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(elsewhere.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("trailing", pipeline.scheduler.config, "epsilon")
    assert_drawn(folder, "teacher-at-4-on-guided", pipeline, guidance_scale=1.5)
    pipeline.load_lora_weights(elsewhere.chain.store.fetch(elsewhere.lora), weight_name=LORA_FILE)
    pipeline.scheduler = make_scheduler("lcm", pipeline.scheduler.config, "epsilon")
    assert_drawn(folder, "lcm-at-4-on-guided", pipeline, guidance_scale=2.0)


def test_entries_share_the_rows_they_have_in_common(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def counted(row: Row, *arguments: Any) -> None:
        drawn.append(f"{row.model} {row.name}")
        sample_row(row, *arguments)

    monkeypatch.setattr("stages.evaluate.row_sets.sample_row", counted)
    plain, more = (TransferConfig(name=name, size_px=(24, 16), guidance_scale=scale) for name, scale in (("plain", None), ("more", 2.0)))
    found = elsewhere.run(elsewhere.config.model_copy(update={"transfer": (plain, more)}), "shared")
    of_entries = [row for row in drawn if "+" in row]
    once = {"reference reference@8+plain", *(f"teacher teacher@{steps}+plain" for steps in (8, 4, 2))}
    assert set(of_entries) == once | {f"lcm lcm@{steps}+{name}" for steps in (4, 2) for name in ("plain", "more")}
    assert len(of_entries) == len(set(of_entries))
    scores, files = found.content.scores, {entry.path: entry.sha256 for entry in found.files}
    assert scores["teacher@4+more"] == scores["teacher@4+plain"] and scores["lcm@4+more"] != scores["lcm@4+plain"]
    shards = [path for path in files if path.startswith("samples/teacher-at-4-on-plain/")]
    assert shards and all(files[path] == files[path.replace("-on-plain", "-on-more")] for path in shards)


def test_a_student_that_is_told_its_scale_keeps_it(elsewhere: Elsewhere) -> None:
    config = elsewhere.config.model_copy(update={"transfer": (TransferConfig(name="wide", size_px=(16, 24), guidance_scale=2.0),)})
    found = elsewhere.run(config, "told", lcm=elsewhere.lora, told=elsewhere.chain.told(4))
    report = elsewhere.chain.store.fetch(found) / "report.json"
    scales = {row["model"]: row["guidance_scale"] for row in json.loads(report.read_text())["transfers"][0]["rows"]}
    assert scales == {"teacher": 3.0, "lcm": 2.0, "told": 8.5}


def test_another_aspect_ratio_is_diffusers_own(elsewhere: Elsewhere) -> None:
    folder = elsewhere.chain.store.fetch(elsewhere.chain.teacher)
    (row, *_) = rows_of(elsewhere.config.model_copy(update={"teacher_steps": (4,)}), elsewhere.chain.teacher.content, {})
    ours = TeacherPipeline.load(folder)
    prompts = PromptSet(("red apple", "the cat"), 2, "file")
    sampler = Sampler(ours, prompts, seed=5, batch_size=2, tick=lambda _images: None).on(ours, (16, 24))
    drawn = sampler.batch(row, ours.denoiser(), 0)
    assert drawn.shape == (2, 16, 24, 3)

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("trailing", pipeline.scheduler.config, "epsilon")
    arguments = {"height": 16, "width": 24, "num_inference_steps": 4, "guidance_scale": row.guidance_scale}
    theirs = pipeline(list(prompts.images), generator=[image_generator(5, index) for index in range(2)], **arguments).images
    assert np.array_equal(drawn, np.stack([np.asarray(picture) for picture in theirs]))


def test_from_pictures_every_student_draws_what_diffusers_draws(elsewhere: Elsewhere) -> None:
    chain = elsewhere.chain
    config = elsewhere.config.model_copy(update={"transfer": (TransferConfig(name="sketch", strength=0.4),)})
    found = elsewhere.run(config, "pictures", lcm=elsewhere.lora, four=chain.unet(4))
    rows = {row for row in found.content.scores if row.endswith("+sketch")}
    assert rows == {"teacher@8+sketch", "teacher@4+sketch", "lcm@4+sketch", "four@4+sketch"}, "of two steps none is left"

    folder = chain.store.fetch(found)
    report = json.loads((folder / "report.json").read_text())
    assert report["transfers"][0]["changed"] == "the teacher, from pictures at strength 0.4"
    prompts = report["samples"]["examples"]
    pipeline: Any = diffusers.AutoPipelineForImage2Image.from_pretrained(chain.store.fetch(chain.teacher))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(chain.store.fetch(elsewhere.lora), weight_name=LORA_FILE)
    pipeline.scheduler = make_scheduler("lcm", pipeline.scheduler.config, "epsilon")
    latents = LatentSet(chain.store.fetch(chain.latents), chain.latents)
    start, _ = latents.samples([CAPTIONS.index(prompt) for prompt in prompts])
    generators = [image_generator(report["samples"]["seed"], index) for index in range(len(prompts))]
    arguments = {"num_inference_steps": 4, "strength": 0.4, "guidance_scale": 1.0}
    theirs = pipeline(prompts, image=start, generator=generators, **arguments).images
    ours = list(read_pictures(folder / "samples/lcm-at-4-on-sketch"))
    assert all(np.array_equal(one, np.asarray(two)) for one, two in zip(ours, theirs, strict=True))


def test_a_controlnet_follows_the_edges_of_encoded_pictures(elsewhere: Elsewhere, tmp_path: Path) -> None:
    chain = elsewhere.chain
    place = controlnet_file(chain.pipeline.unet, tmp_path / "edges")
    entry = TransferConfig(name="traced", controlnet=str(place), controlnet_scale=0.7)
    found = elsewhere.run(elsewhere.config.model_copy(update={"transfer": (entry,)}), "traced", lcm=elsewhere.lora, four=chain.unet(4))
    assert {row for row in found.content.scores if row.startswith(("lcm", "four")) and "+" in row} == {
        "lcm@4+traced", "lcm@2+traced", "four@4+traced",
    }  # fmt: skip
    folder = chain.store.fetch(found)
    report = json.loads((folder / "report.json").read_text())
    assert report["transfers"][0]["changed"] == "the teacher with a ControlNet at 0.7"

    prompts = report["samples"]["examples"]
    source = chain.store.fetch(chain.teacher)
    latents, _ = LatentSet(chain.store.fetch(chain.latents), chain.latents).samples([CAPTIONS.index(prompt) for prompt in prompts])
    condition = edges(TeacherPipeline.load(source).decode(latents))
    network = diffusers.ControlNetModel.from_pretrained(place)
    pipeline: Any = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(source, controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(chain.store.fetch(elsewhere.lora), weight_name=LORA_FILE)
    pipeline.scheduler = make_scheduler("lcm", pipeline.scheduler.config, "epsilon")
    generators = [image_generator(report["samples"]["seed"], index) for index in range(len(prompts))]
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.7}
    theirs = pipeline(prompts, image=condition, generator=generators, **arguments).images
    ours = list(read_pictures(folder / "samples/lcm-at-4-on-traced"))
    assert all(np.array_equal(one, np.asarray(two)) for one, two in zip(ours, theirs, strict=True))


def test_a_picture_is_one_of_the_prompts_where_there_is_one() -> None:
    captions = ["a", "b ", "a", "c"]
    assert choose_pictures(["a", "b", "a", "a"], captions, seed=0) == (0, 1, 2, 0)
    others = choose_pictures(["x"] * 200, captions, seed=0)
    assert set(others) == {0, 1, 2, 3} and others != choose_pictures(["x"] * 200, captions, seed=1)
    assert choose_pictures(["a", "x", "x"], captions, seed=0)[1:] == others[1:3], "an image's picture is its own"


def test_what_does_not_fit_is_refused_before_sampling(elsewhere: Elsewhere, tmp_path: Path) -> None:
    def refused(match: str, students: Any = None, **entry: Any) -> None:
        config = elsewhere.config.model_copy(update={"transfer": (TransferConfig(name="x", **entry),)})
        with pytest.raises(BadInput, match=match):
            elsewhere.run(config, "refused", **(students or {}))

    other = tiny_pipelines.save("sd15", tmp_path / "sd15")
    refused("evaluate.transfer.x.base: its architecture is StableDiffusionPipeline; expected the teacher's", base=str(other))
    wide = {name: torch.zeros(3, 99) if "lora_A" in name else tensor for name, tensor in load_file(elsewhere.style).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    refused("evaluate.transfer.x.style wide.safetensors: made for another UNet", style=str(tmp_path / "wide.safetensors"))
    refused("evaluate.transfer.x: no student is a LoRA", students={"four": elsewhere.chain.unet(4)}, base=str(elsewhere.base))
    refused("evaluate.transfer.x.strength: 0.1 of the teacher's 8 steps leaves none", strength=0.1)
    refused("evaluate.transfer.x: no student is there, or none with a step left", strength=0.2)
    refused("evaluate.transfer.x.size_px: 16 x 25; expected multiples of 2", size_px=(16, 25))
    sd15 = controlnet_file(tiny_pipelines.build("sd15").unet, tmp_path / "sd15-edges")
    refused(r"evaluate.transfer.x.controlnet sd15-edges: its cross_attention_dim is 16; expected 40", controlnet=str(sd15))
    config = EvaluateConfig(transfer=(TransferConfig(name="x", controlnet=str(other / "unet")),))
    with pytest.raises(BadInput, match=r"evaluate.transfer.x.controlnet unet: UNet2DConditionModel; expected a ControlNetModel"):
        preflight_transfers(config, config.transfer[0].outside())
    config = EvaluateConfig(transfer=(TransferConfig(name="x", style=str(other)),))
    with pytest.raises(BadInput, match=r"evaluate.transfer.x.style .*: a whole network"):
        preflight_transfers(config, config.transfer[0].outside())


def finetuned_recipe(elsewhere: Elsewhere, *transfer: dict[str, object]) -> dict[str, object]:
    entries = {"ink": {}, "other": {"network": "unet"}, "third": {"network": "unet"}}
    sections = {"finetune": entries, "lcm": {}, "evaluate": {"transfer": list(transfer)}}
    return {"name": "x", "ingest": {"table": "t.csv"}, "teacher": {"source": str(elsewhere.base)}, **sections}


def test_bases_and_styles_of_the_recipes_own_runs(elsewhere: Elsewhere, evaluated: Any) -> None:
    """The same weights give the same figures, whether they come from a run of `finetune` or lie outside."""
    chain = elsewhere.chain
    style, base = chain.style(), chain.finetuned_base(elsewhere.base)
    entries = (
        {"name": "other", "base": "finetune-other"},
        {"name": "ink", "style": "finetune-ink", "style_weight": WEIGHT},
    )
    recipe = parse_recipe(finetuned_recipe(elsewhere, *entries))
    node = make_plan(recipe, digest).node("evaluate")
    assert node.inputs["finetuned"] == ("finetune-other", "finetune-ink"), "the third is not waited for"
    assert not any(name.startswith("transfer") for name in node.outside)

    config = elsewhere.config.model_copy(update={"transfer": recipe.evaluate.transfer if recipe.evaluate else ()})
    found = elsewhere.run(config, "own", finetuned={"finetune-other": base, "finetune-ink": style})
    for row in ("teacher@8+other", "teacher@4+other", "lcm@4+other", "lcm@2+other"):
        assert found.content.scores[row] == evaluated.content.scores[row]
    outside = TransferConfig(name="ink", style=str(chain.store.fetch(style)), style_weight=WEIGHT)
    again = elsewhere.run(elsewhere.config.model_copy(update={"transfer": (outside,)}), "outside")
    assert again.content.scores["lcm@4+ink"] == found.content.scores["lcm@4+ink"] != found.content.scores["lcm@4"]
    report = json.loads((chain.store.fetch(found) / "report.json").read_text())
    assert [entry["changed"] for entry in report["transfers"]] == ["the base finetune-other", "the teacher with finetune-ink at 0.7"]
    assert {base.identity, style.identity} < {artifact["identity"] for artifact in report["lineage"]}

    with pytest.raises(BadInput, match=r"evaluate.transfer.other.base: finetune-other is finetuned_lora .*; expected a teacher"):
        elsewhere.run(config, "given", finetuned={"finetune-other": style, "finetune-ink": style})


def test_a_run_in_a_places_stead_is_part_of_the_identity(elsewhere: Elsewhere) -> None:
    def planned(**entry: object) -> str:
        recipe = parse_recipe(finetuned_recipe(elsewhere, {"name": "a", **entry}, {"name": "b", "base": "finetune-third"}))
        return make_plan(recipe, digest).identities["evaluate"]

    assert planned(base="finetune-other") != planned(base="finetune-third") != planned(size_px=[16, 24])
    preflight_transfers(EvaluateConfig(transfer=(TransferConfig(name="a", base="finetune-other", style="finetune-ink"),)), {})


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"base": "finetune-othr"},
            r"transfer.0.base: found 'finetune-othr'; .* network: unet: .*finetune-other, finetune-third.* \./finetune-",
        ),
        ({"base": "finetune-ink"}, r"transfer.0.base: found 'finetune-ink'; .* network: unet"),
        ({"style": "finetune-other"}, r"transfer.0.style: found 'finetune-other'; .* network: lora: .*\(finetune-ink\)"),
    ],
)
def test_a_run_that_the_recipe_lacks_is_a_mistake(elsewhere: Elsewhere, entry: dict[str, object], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        parse_recipe(finetuned_recipe(elsewhere, {"name": "a", **entry}))
    parse_recipe(finetuned_recipe(elsewhere, {"name": "a", "base": "./finetune-othr"}))


def test_the_plan_digests_what_lies_outside(elsewhere: Elsewhere, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("url,caption\n")

    def evaluate(**section: Any) -> tuple[str, set[str]]:
        data = {"name": "x", "ingest": {"table": str(table)}, "teacher": {"source": str(elsewhere.base)}, "lcm": {}, "evaluate": section}
        plan = make_plan(parse_recipe(data), lambda address: content[address])
        node = plan.node("evaluate")
        return plan.identities["evaluate"], set(plan.input_digests[node.name])

    style, moved = str(elsewhere.style), str(tmp_path / "moved")
    content = {str(table): "1" * 64, str(elsewhere.base): "2" * 64, style: "3" * 64, moved: "3" * 64}
    plain, _ = evaluate()
    assert evaluate(transfer=[])[0] == plain
    first, inputs = evaluate(transfer=[{"name": "ink", "style": style}])
    assert "transfer.ink.style" in inputs and first != plain
    assert evaluate(transfer=[{"name": "ink", "style": moved}])[0] == first, "where it lies is no part of it"
    assert evaluate(transfer=[{"name": "ink", "style": style, "style_weight": 0.5}])[0] != first
    content[style] = "4" * 64
    assert evaluate(transfer=[{"name": "ink", "style": style}])[0] != first
    assert "transfer" not in EvaluateConfig().identity_fields()


def test_entries_change_something_and_have_names_of_their_own() -> None:
    with pytest.raises(ValidationError, match="is the teacher itself"):
        TransferConfig(name="same")
    with pytest.raises(ValidationError, match=r"(?s)expected null beside strength.*, or a run of finetune, beside strength"):
        TransferConfig(name="a", base="path", size_px=(16, 16), strength=0.5)
    TransferConfig(name="a", base="finetune-b", strength=0.5)
    with pytest.raises(ValidationError, match="expected another"):
        EvaluateConfig(transfer=(TransferConfig(name="a", base="x"), TransferConfig(name="a", style="y")))
