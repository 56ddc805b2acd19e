"""The stage `publish`: what is handed out loads with plain diffusers calls, and draws what was measured, bit for bit."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from infra.hub import card_metadata
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, PublishConfig
from stages import evaluate, publish
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import image_generator
from stages.evaluate.prompts import PromptSet
from stages.evaluate.rows import rows_of
from stages.evaluate.samples import Sampler
from stages.publish.export import check_destination
from stages.sample import open_published, read_description, sample
from stages.students import load_student
from tests.cards import run_snippet, snippets
from tests.distilled import CAPTIONS, Chain
from tests.tiny_pipelines import Kind
from tests.workspaces import make_workspace, open_store

EVALUATE = EvaluateConfig(prompt_count=3, teacher_steps=(4, 1), extractor="efficientnet-lite0", grid_prompts=2, batch_size=2)
PUBLISH = PublishConfig(name="tiny-students", licence="openrail++", base_model="someone/tiny")
PROMPTS = ("red apple", "the cat")
SEED = 11


class Published:
    """A chain whose students were evaluated and published."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.chain = Chain(open_store(folder), kind)
        self.students = self.make_students()
        inputs = self.chain.inputs() | {"students": self.students}
        workspace = make_workspace(folder, self.chain.store, identity="evaluation")
        self.evaluation: Any = evaluate.run(EVALUATE, evaluate.Inputs.model_validate(inputs), workspace)
        styles = {"finetune-style": self.chain.style()}
        self.inputs = {"teacher": self.chain.teacher, "students": self.students, "styles": styles, "evaluation": self.evaluation}
        self.manifest = self.run(folder, PUBLISH, "published")
        self.folder = self.chain.store.fetch(self.manifest)

    def make_students(self) -> dict[str, Any]:
        """By node name."""
        return {
            "lightning-8-4": self.chain.unet(4),
            "lightning-2-1": self.chain.unet(1, prediction_type="sample"),
            "lcm": self.chain.lora(),
            "lcm-whole": self.chain.told(5),
        }

    def run(self, folder: Path, config: PublishConfig, identity: str) -> Any:
        return publish.run(config, publish.Inputs.model_validate(self.inputs), make_workspace(folder, self.chain.store, identity=identity))

    def measured(self, model: str, steps: int) -> np.ndarray:
        """Pictures (B, H, W, 3) of two prompts, as the stage `evaluate` makes them."""
        pipeline = TeacherPipeline.load(self.chain.store.fetch(self.chain.teacher))
        inputs = evaluate.Inputs.model_validate(self.chain.inputs() | {"students": self.students})
        (row,) = [row for row in rows_of(EVALUATE, self.chain.teacher.content, inputs.students) if (row.model, row.steps) == (model, steps)]
        denoiser: Any = pipeline.denoiser()
        if model != "teacher":
            denoiser = load_student(pipeline, self.students[model], self.chain.store.fetch(self.students[model]))
        sampler = Sampler(pipeline, PromptSet(PROMPTS, 2, "file"), seed=SEED, batch_size=2, tick=lambda _images: None)
        return sampler.batch(row, denoiser, 0)


@pytest.fixture(scope="module", params=["sdxl", "sd2-v"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    torch.set_num_threads(1)
    yield Published(tmp_path_factory.mktemp(request.param), request.param)


def _as_on_the_card(published: Published, folder: Path, monkeypatch: pytest.MonkeyPatch, heading: str) -> dict[str, Any]:
    return run_snippet(published.folder, PUBLISH.name, heading, folder, monkeypatch)


@pytest.mark.parametrize(
    ("heading", "model", "steps"),
    [
        ("lightning-4step", "lightning-8-4", (4,)),
        ("lightning-1step", "lightning-2-1", (1,)),
        ("lcm-lora", "lcm", (4, 2)),
        ("lcm-5step", "lcm-whole", (5,)),
        ("The teacher's pipeline", "teacher", (4,)),
    ],
)
def test_the_cards_code_draws_what_was_measured_bit_for_bit(
    *, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str, model: str, steps: tuple[int, ...]
) -> None:
    pipeline = _as_on_the_card(published, tmp_path, monkeypatch, heading)["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    for count in steps:
        guidance = {"teacher": EVALUATE.teacher_guidance_scale, "lcm-whole": 8.5}.get(model, 1.0)
        drawn = pipeline(
            list(PROMPTS),
            num_inference_steps=count,
            guidance_scale=guidance,
            generator=[image_generator(SEED, 0), image_generator(SEED, 1)],
        ).images
        measured = published.measured(model, count)
        assert np.array_equal(np.stack([np.asarray(picture) for picture in drawn]), measured)
        assert measured[0].std() > 0


@pytest.mark.parametrize(
    ("heading", "steps", "variant"),
    [
        ("lightning-4step", 4, "lightning-4step"),
        ("lightning-1step", 1, None),
        ("lcm-lora", 4, "lcm-lora"),
        ("lcm-5step", 5, None),
        ("The teacher's pipeline", 4, "teacher"),
    ],
)
def test_sample_draws_the_cards_picture(
    *, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str, steps: int, variant: str | None
) -> None:
    names = _as_on_the_card(published, tmp_path, monkeypatch, heading)
    assert names["prompt"] in CAPTIONS
    ours = sample(published.folder, names["prompt"], steps=steps, seed=0, variant=variant)
    assert isinstance(ours, Image.Image)
    assert np.array_equal(np.asarray(ours), np.asarray(names["image"]))
    other = sample(published.folder, names["prompt"], steps=steps, seed=1, variant=variant)
    assert not np.array_equal(np.asarray(other), np.asarray(ours))


def test_sample_at_another_guidance_scale(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By guidance with a LoRA, told to a UNet that takes it, within what that was trained for."""
    for heading, steps in (("lcm-lora", 4), ("lcm-5step", 5)):
        names = _as_on_the_card(published, tmp_path, monkeypatch, heading)
        ours = sample(published.folder, names["prompt"], steps=steps, variant=heading, guidance_scale=4.0)
        generator = torch.Generator().manual_seed(0)
        theirs = names["pipeline"](names["prompt"], num_inference_steps=steps, guidance_scale=4.0, generator=generator).images[0]
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        assert not np.array_equal(np.asarray(ours), np.asarray(names["image"]))
    with pytest.raises(BadInput, match="guidance_scale: 2 with lcm-5step; expected 3 to 15"):
        sample(published.folder, "x", steps=5, guidance_scale=2.0)


def test_sample_names_the_variants_where_none_or_several_fit(published: Published) -> None:
    with pytest.raises(BadInput, match=r"steps 3: .*lightning-4step \(4 steps\).*lcm-lora \(4/2 steps\)"):
        sample(published.folder, "x", steps=3)
    with pytest.raises(BadInput, match="several variants for it, name one: expected variant lightning-4step or lcm-lora"):
        sample(published.folder, "x", steps=4)
    with pytest.raises(BadInput, match="variant 'lightning'"):
        sample(published.folder, "x", steps=4, variant="lightning")
    assert read_description(published.folder).choose(2)[0] == "lcm-lora"


def test_a_published_model_is_found_on_the_store(published: Published, tmp_path: Path) -> None:
    store = published.chain.store
    assert open_published(published.manifest.identity[:12], store) == published.folder
    with pytest.raises(BadInput, match="of the kind teacher, expected published_model"):
        open_published(published.chain.teacher.identity, store)
    with pytest.raises(BadInput, match="expected a folder made by the stage publish"):
        sample(tmp_path, "x", steps=4)


def test_the_card_is_what_the_hub_reads(published: Published) -> None:
    card = (published.folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "openrail++"
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert metadata["base_model"] == "someone/tiny"
    assert {"text-to-image", "lora", "lcm"} <= set(metadata["tags"])
    assert card_metadata(published.folder) == metadata, "as the hub's own library reads it"
    assert "widget" not in metadata
    for manifest in (published.chain.teacher, published.evaluation, *published.students.values()):
        assert manifest.identity in card
    assert published.chain.teacher.content.weights_digest in card
    assert "999 749 499 249" in card
    assert "| 8.5, an input |" in card and "choose one from 3.0 to 15.0" in card and "guidance_scale=8.5, generator" in card
    assert not re.search(r"\b20\d\d-\d\d-\d\d|/tmp/|file://", card)


def test_schedulers_are_those_of_the_students(published: Published) -> None:
    def config(variant: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((published.folder / variant / "scheduler/scheduler_config.json").read_text())
        return found

    assert config("lightning-4step")["_class_name"] == "EulerDiscreteScheduler"
    assert config("lightning-4step")["timestep_spacing"] == "trailing"
    assert config("lightning-4step")["prediction_type"] == published.chain.teacher.content.prediction_type
    assert config("lightning-1step")["prediction_type"] == "sample"
    assert config("lcm-lora")["_class_name"] == "LCMScheduler"
    variants = published.manifest.content.variants
    assert {name: (variant["kind"], variant["steps"]) for name, variant in variants.items()} == {
        "lightning-4step": ("unet", [4]),
        "lightning-1step": ("unet", [1]),
        "lcm-lora": ("lora", [4, 2]),
        "lcm-5step": ("unet", [5]),
    }
    assert variants["lcm-5step"]["guidance_range"] == [3, 15]
    assert not [entry.path for entry in published.manifest.files if entry.path.endswith((".bin", ".pt", ".ckpt", ".pkl"))]


@pytest.mark.parametrize(("name", "guidance_scale"), [("lcm-lora", 1.0), ("finetune-style", EVALUATE.teacher_guidance_scale)])
def test_a_lora_lies_beside_in_kohyas_key_format_and_draws_the_same(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, guidance_scale: float
) -> None:
    path = f"{name}/{PUBLISH.name}-{name}-kohya.safetensors"
    assert f"[{path}]({path})" in (published.folder / "README.md").read_text()
    assert read_description(published.folder).kohya[name] == path
    names = _as_on_the_card(published, tmp_path, monkeypatch, name)
    pipeline = names["pipeline"]

    def drawn() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipeline(names["prompt"], num_inference_steps=4, guidance_scale=guidance_scale, generator=generator).images[0])

    pipeline.unload_lora_weights()
    assert not np.array_equal(drawn(), np.asarray(names["image"])), "the LoRA does something"
    pipeline.load_lora_weights(published.folder / path)
    assert np.array_equal(drawn(), np.asarray(names["image"]))


def test_a_style_is_described_and_is_no_variant(published: Published) -> None:
    description = read_description(published.folder)
    style = description.styles["finetune-style"]
    assert (style.rank, style.alpha, style.samples, style.training_steps) == (2, 1.5, 3, 20)
    assert style.identity in (published.folder / "README.md").read_text()
    assert "finetune-style" not in description.variants
    assert set(description.kohya) == {"lcm-lora", "finetune-style"}


def test_again_gives_equal_bytes(published: Published, tmp_path: Path) -> None:
    assert published.run(tmp_path, PUBLISH, "again").files_digest == published.manifest.files_digest


def test_the_export_is_whole_and_replaces_only_its_own(published: Published, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    config = PUBLISH.model_copy(update={"destination": str(destination)})
    manifest = published.run(tmp_path, config, "exported")
    assert {str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file()} == {
        entry.path for entry in manifest.files
    }
    (destination / "stale").write_text("of an earlier model")
    published.run(tmp_path, config, "exported")
    assert not (destination / "stale").exists()
    assert [path.name for path in destination.parent.iterdir()] == ["model"]
    (destination / "distillery.json").unlink()
    with pytest.raises(BadInput, match="something else is there"):
        published.run(tmp_path, config, "refused")
    with pytest.raises(BadInput, match="expected a local folder"):
        check_destination("s3://bucket/model")


def test_without_the_pipeline_the_card_loads_the_base_model(published: Published, tmp_path: Path) -> None:
    manifest = published.run(tmp_path, PUBLISH.model_copy(update={"include_pipeline": False}), "students only")
    folder = published.chain.store.fetch(manifest)
    assert not (folder / "model_index.json").exists()
    assert 'from_pretrained("someone/tiny"' in (folder / "README.md").read_text()
    with pytest.raises(ValidationError, match="expected the hub id of one to load"):
        PublishConfig(name="x", include_pipeline=False)


def test_a_teacher_alone_is_published_and_sampled(published: Published, tmp_path: Path) -> None:
    chain = published.chain
    evaluation = evaluate.run(
        EVALUATE, evaluate.Inputs.model_validate(chain.inputs()), make_workspace(tmp_path, chain.store, identity="teacher evaluation")
    )
    inputs = publish.Inputs.model_validate({"teacher": chain.teacher, "evaluation": evaluation})
    manifest = publish.run(PUBLISH, inputs, make_workspace(tmp_path, chain.store, identity="teacher published"))
    folder = chain.store.fetch(manifest)
    assert manifest.content.variants == {}
    assert list(snippets((folder / "README.md").read_text())) == ["The pipeline"]
    assert sample(folder, "red apple", steps=2).size == (16, 16)
