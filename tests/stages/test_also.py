"""`evaluate.also`: published checkpoints by path, sampled as their names and configurations tell, in the pictures of plain diffusers calls."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.cli.options import with_also
from schemas.also import AlsoConfig, Told, told_by_name
from schemas.base import digest
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from schemas.loading import parse_recipe, read_recipe
from schemas.manifest import Manifest
from stages.diffusion.guidance import add_guidance_input
from stages.diffusion.kohya import save_kohya
from stages.diffusion.lora import add_lora, lora_parameters, save_lora
from stages.diffusion.sampling import image_generator
from stages.evaluate import Inputs, preflight, run, samples
from stages.evaluate.samples import read_pictures
from stages.plan import make_plan
from stages.students import save_unet
from tests import tiny_pipelines
from tests.distilled import Chain, shake
from tests.workspaces import make_workspace, open_store

CONFIG = EvaluateConfig(prompt_count=2, teacher_steps=(2,), extractor="efficientnet-lite0", grid_prompts=1, batch_size=1)
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/x/sdxl_lightning_4step_lora.safetensors", {"steps": (4,), "sampler": "trailing"}),
        ("sdxl_lightning_1step_unet_x0.safetensors", {"steps": (1,), "sampler": "trailing", "prediction_type": "sample"}),
        ("dmd2_sdxl_4step_unet_fp16.safetensors", {"steps": (4,), "sampler": "lcm-trailing"}),
        ("dmd2_sdxl_1step_unet.safetensors", {"steps": (1,), "sampler": "lcm-trailing", "start": 399}),
        ("s3://models/lcm-lora-sdxl/pytorch_lora_weights.safetensors", {"steps": (8, 4, 2, 1), "sampler": "lcm"}),
        ("stabilityai/sdxl-turbo@main", {"steps": (4, 2, 1), "sampler": "trailing"}),
        ("model/lightning-8step/unet", {"steps": (8,), "sampler": "trailing"}),
        ("style.safetensors", {}),
    ],
)
def test_names_tell_how_public_checkpoints_are_sampled(path: str, told: dict[str, Any]) -> None:
    assert told_by_name(path) == Told(**told)


class Published:
    """Checkpoints of a tiny teacher's architecture under the names of the public ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = Chain(open_store(folder))
        lora = copy.deepcopy(self.chain.pipeline.unet)
        add_lora(lora, 2, 3.0, seed=1)
        shake(lora_parameters(lora), 0.1, seed=2)
        save_lora(lora, folder / "lora")
        self.lightning = folder / "sdxl_lightning_2step_lora.safetensors"
        save_kohya(folder / "lora", lora.config, self.lightning)
        self.dmd = self._unet("dmd2_sdxl_1step_unet.safetensors", seed=3)
        self.x0 = self._unet("sdxl_lightning_1step_unet_x0.safetensors", seed=4)
        turbo = tiny_pipelines.build("sdxl", seed=5)
        turbo.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(turbo.scheduler.config, timestep_spacing="trailing")
        turbo.save_pretrained(folder / "turbo", safe_serialization=True)
        told = copy.deepcopy(self.chain.pipeline.unet)
        add_guidance_input(told)
        shake(list(told.parameters()), 0.05, seed=6)
        save_unet(told, folder / "lcm-sdxl")

    def _unet(self, name: str, seed: int) -> Path:
        unet = copy.deepcopy(self.chain.pipeline.unet)
        shake(list(unet.parameters()), 0.05, seed=seed)
        save_file({key: tensor.contiguous() for key, tensor in unet.state_dict().items()}, self.folder / name)
        return self.folder / name

    def entries(self) -> tuple[AlsoConfig, ...]:
        paths = {"lightning": self.lightning, "dmd": self.dmd, "x0": self.x0, "turbo": self.folder / "turbo"}
        steps = {"turbo": (2,)}
        told = AlsoConfig(name="told", path=str(self.folder / "lcm-sdxl"), steps=(2,))
        return (*(AlsoConfig(name=name, path=str(path), steps=steps.get(name)) for name, path in paths.items()), told)

    def run(self, config: EvaluateConfig, identity: str, **students: Any) -> Manifest[Any]:
        outside = {entry.outside_name: entry.path for entry in config.also}
        workspace = make_workspace(self.folder, self.chain.store, identity=identity, outside=outside)
        lineage = workspace.lineage.model_copy(update={"inputs": {name: digest(place) for name, place in outside.items()}})
        return run(config, Inputs.model_validate(self.chain.inputs(**students)), replace(workspace, lineage=lineage))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    torch.set_num_threads(1)
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def evaluated(published: Published) -> tuple[Mapping[str, Any], Path]:
    manifest = published.run(CONFIG.model_copy(update={"also": published.entries()}), "also")
    folder = published.chain.store.fetch(manifest)
    return json.loads((folder / "report.json").read_text()), folder


def test_rows_say_how_they_are_sampled_and_who_told(evaluated: tuple[Mapping[str, Any], Path], published: Published) -> None:
    report, folder = evaluated
    rows = {row["name"]: row for row in report["rows"]}
    found = {name: (row["timesteps"], row["sampler"], row["prediction_type"], row["guidance_scale"]) for name, row in rows.items()}
    assert list(found)[1:] == ["lightning@2", "dmd@1", "x0@1", "turbo@2", "told@2"]
    assert found["lightning@2"] == ([999, 499], "trailing", "epsilon", 1)
    assert found["dmd@1"] == ([399], "lcm-trailing", "epsilon", 1)
    assert found["x0@1"] == ([999], "trailing", "sample", 1)
    assert found["turbo@2"] == ([999, 499], "trailing", "epsilon", 1)
    assert found["told@2"] == ([999, 499], "lcm", "epsilon", 8)
    note = rows["turbo@2"]["note"]
    assert "sampler trailing (the scheduler beside it)" in note and "steps 2 (the recipe)" in note and "EulerAncestral" in note
    assert "prediction_type sample (its name)" in rows["x0@1"]["note"] and "note" not in rows["teacher@2"]
    page = (folder / "report.html").read_text()
    assert "dmd: a UNet from outside" in page and str(published.folder) not in page + json.dumps(report)


def test_the_pictures_are_those_of_the_calls_on_the_public_model_cards(
    evaluated: tuple[Mapping[str, Any], Path], published: Published
) -> None:
    """SDXL-Lightning's: Euler, trailing, guidance 0, one step predicting the sample; DMD2's: LCMScheduler, `timesteps=[399]`; LCM's: scale 8."""
    report, folder = evaluated
    prompt = report["samples"]["examples"][0]

    def drawn(scheduler: Any, weights: Path | None = None, lora: Path | None = None, **call: Any) -> np.ndarray:
        plain: Any = diffusers.DiffusionPipeline.from_pretrained(published.chain.store.fetch(published.chain.teacher))
        plain.set_progress_bar_config(disable=True)
        if weights is not None:
            plain.unet.load_state_dict(load_file(weights))
        if lora is not None:
            plain.load_lora_weights(lora)
        plain.scheduler = scheduler(plain.scheduler.config)
        picture = plain(prompt, generator=[image_generator(report["samples"]["seed"], 0)], **call).images[0]
        return np.asarray(picture)

    def euler(config: Any, **more: Any) -> Any:
        return diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", **more)

    def sample(config: Any) -> Any:
        return euler(config, prediction_type="sample")

    lcm = diffusers.LCMScheduler.from_config
    expected = {
        "lightning-at-2": drawn(euler, lora=published.lightning, num_inference_steps=2, guidance_scale=0),
        "x0-at-1": drawn(sample, published.x0, num_inference_steps=1, guidance_scale=0),
        "dmd-at-1": drawn(lcm, published.dmd, num_inference_steps=1, guidance_scale=0, timesteps=[399]),
        "turbo-at-2": drawn(euler, published.folder / "turbo" / UNET_FILE, num_inference_steps=2, guidance_scale=0),
    }
    for slug, picture in expected.items():
        assert np.array_equal(next(read_pictures(folder / "samples" / slug)), picture), slug
    plain: Any = diffusers.DiffusionPipeline.from_pretrained(
        published.chain.store.fetch(published.chain.teacher),
        unet=diffusers.UNet2DConditionModel.from_pretrained(published.folder / "lcm-sdxl" / "unet"),
    )
    plain.scheduler = lcm(plain.scheduler.config)
    picture = plain(prompt, num_inference_steps=2, guidance_scale=8, generator=[image_generator(report["samples"]["seed"], 0)]).images[0]
    assert np.array_equal(next(read_pictures(folder / "samples" / "told-at-2")), np.asarray(picture))


def test_one_more_draws_its_own_rows_only(
    evaluated: tuple[Mapping[str, Any], Path], published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    batch = samples.Sampler.batch
    monkeypatch.setattr(samples.Sampler, "batch", lambda self, row, net, first: drawn.append(row.name) or batch(self, row, net, first))
    more = AlsoConfig(name="again", path=str(published.x0), steps=(2,))
    manifest = published.run(CONFIG.model_copy(update={"also": (*published.entries(), more)}), "one more")
    assert set(drawn) == {"again@2"} and "dmd@1" in manifest.content.scores


def test_what_does_not_fit_is_refused_before_sampling(published: Published, tmp_path: Path) -> None:
    def refused(match: str, path: Path, students: Mapping[str, Any] | None = None, name: str = "x", **more: Any) -> None:
        config = CONFIG.model_copy(update={"also": (AlsoConfig(name=name, path=str(path), **more),)})
        with pytest.raises(BadInput, match=match):
            published.run(config, "refused", **(students or {}))

    sd15 = tiny_pipelines.save("sd15", tmp_path / "turbo-sd15")
    refused(r"evaluate.also.x diffusion_pytorch_model.safetensors: .*; expected a UNet of the teacher's architecture", sd15)
    wide = {name: torch.zeros(3, 99) if "lora_down" in name else tensor for name, tensor in load_file(published.lightning).items()}
    save_file(wide, tmp_path / "lightning_4step.safetensors")
    refused(r"evaluate.also.x lightning_4step.safetensors: ", tmp_path / "lightning_4step.safetensors")
    (tmp_path / "dmd2_sdxl_4step_unet_fp16.bin").write_bytes(b"x")
    refused(r"dmd2_sdxl_4step_unet_fp16.bin: pickled weights can run code", tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(2)}, tmp_path / "sdxl_lightning_4step.safetensors")
    refused(r"names of the original code", tmp_path / "sdxl_lightning_4step.safetensors")
    refused(r"neither its name nor a configuration tells its steps; expected steps: \[4\]", published.folder / "lora")
    refused(r"tells its sampler; expected", published.folder / "lora", steps=(4,))
    refused(r"a student has this name", published.dmd, {"four": published.chain.unet(4)}, name="four")
    refused(r"no such file or folder; expected a LoRA", tmp_path / "missing")
    other = tiny_pipelines.build("sdxl", seed=5)
    other.scheduler = diffusers.EulerDiscreteScheduler.from_config(other.scheduler.config, beta_end=0.02)
    other.save_pretrained(tmp_path / "turbo-other", safe_serialization=True)
    refused(r"another noise schedule than the teacher", tmp_path / "turbo-other")

    data = {"name": "x", "ingest": {"table": "t.csv"}, "teacher": {"source": str(published.folder / "turbo")}, "lcm": {}}
    entry = {"name": "x", "path": str(sd15), "steps": [4], "sampler": "trailing"}
    recipe = parse_recipe(data | {"evaluate": {"extractor": "efficientnet-lite0", "also": [entry]}})
    assert recipe.evaluate is not None
    with pytest.raises(BadInput, match="expected a UNet of the teacher's architecture"):
        preflight(recipe.evaluate, {"also.x": str(sd15)}, recipe)


def test_the_plan_digests_content_and_what_the_name_tells(published: Published) -> None:
    content = {"t.csv": "1" * 64, "teacher": "2" * 64, "a/lightning_4step.safetensors": "3" * 64, "b/lightning_4step.safetensors": "3" * 64}
    content |= {"a/lightning_8step.safetensors": "3" * 64}

    def evaluate(*also: dict[str, Any]) -> str:
        data = {"name": "x", "ingest": {"table": "t.csv"}, "teacher": {"source": "teacher"}, "lcm": {}, "evaluate": {"also": also}}
        return make_plan(parse_recipe(data), lambda address: content[address]).identities["evaluate"]

    plain, first = evaluate(), evaluate({"name": "p", "path": "a/lightning_4step.safetensors"})
    assert "also" not in EvaluateConfig().identity_fields() and plain != first
    assert evaluate({"name": "p", "path": "b/lightning_4step.safetensors"}) == first, "where it lies is no part of it"
    assert evaluate({"name": "p", "path": "a/lightning_8step.safetensors"}) != first, "its name tells another step count"
    content["a/lightning_4step.safetensors"] = "4" * 64
    assert evaluate({"name": "p", "path": "a/lightning_4step.safetensors"}) != first


def test_the_command_line_adds_to_the_recipes_entries() -> None:
    text = "name: x\ningest: {table: t.csv}\nteacher: {source: t}\nlcm: {}\nevaluate: {also: [{name: a, path: turbo}]}\n"
    recipe = read_recipe(text, with_also(None, ["b=lcm=2"]))
    assert recipe.evaluate is not None
    assert [(entry.name, entry.path) for entry in recipe.evaluate.also] == [("a", "turbo"), ("b", "lcm=2")]
    with pytest.raises(BadInput, match="--also b: expected NAME=PATH"):
        with_also(None, ["b"])
    with pytest.raises(BadInput, match=r"evaluate.also.1.name \(--set\): found 'a'; an entry before it has this name"):
        read_recipe(text, with_also(None, ["a=x"]))
    with pytest.raises(BadInput, match="runs of lcm have such names: expected another"):
        read_recipe(text, with_also(None, ["lcm=x"]))
    read_recipe(text, with_also(None, ["dmd=x", "lightning=y"]))
    with pytest.raises(BadInput, match="found 'lightning-32-8'; runs of lightning have such names"):
        read_recipe(text + "lightning: {chain: [32, 8]}\n", with_also(None, ["lightning-32-8=x"]))
    with pytest.raises(BadInput, match="rows of the teacher have this name"):
        read_recipe(text, with_also(None, ["teacher=x"]))
    with pytest.raises(BadInput, match="resamples is 5, expected a list to add to"):
        read_recipe(text, ["evaluate.resamples=5", "evaluate.resamples+=5"])
