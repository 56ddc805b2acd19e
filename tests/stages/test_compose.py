"""Composition: base + w x acceleration + w x style, fused and apart, through files and plain diffusers calls."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flows.cli import main
from schemas.errors import BadInput, RunFailed
from stages.compose import Ask, compose, write
from stages.compose.grid import draw_weights
from stages.compose.sources import Form, find_sources, parse_weights
from stages.diffusion.lora import LORA_FILE, add_lora, lora_parameters, save_lora
from stages.diffusion.pipeline import TeacherPipeline
from stages.sample import read_composition, read_description, sample
from tests import tiny_pipelines
from tests.cards import run_snippet
from tests.distilled import Chain, shake
from tests.workspaces import open_store

WEIGHTS = (0.9, 0.6)
FORMS: tuple[Form, ...] = ("lora", "unet", "adapters")


def style_file(unet: Any, path: Path, *, rank: int = 3, alpha: float = 5.0, seed: int = 9) -> Path:
    """A style as peft's scripts write it: attention only, another rank, alpha in the metadata."""
    unet = copy.deepcopy(unet)
    add_lora(unet, rank, alpha, seed=seed)
    shake(lora_parameters(unet), 0.1, seed=seed)
    save_lora(unet, path.parent / f"{path.stem}-whole")
    whole = path.parent / f"{path.stem}-whole" / LORA_FILE
    kept = {name: tensor for name, tensor in load_file(whole).items() if ".to_q." in name or ".to_v." in name}
    metadata = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": ["to_q", "to_v"]}
    save_file(kept, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return path


class Composed:
    """A chain with an LCM-LoRA, another base with its shapes, a style, and what is composed of them."""

    def __init__(self, folder: Path, kind: tiny_pipelines.Kind) -> None:
        self.chain = Chain(open_store(folder), kind)
        self.acceleration = self.chain.lora()
        self.base = tiny_pipelines.save(kind, folder / "base", seed=4)
        self.style = style_file(self.chain.pipeline.unet, folder / "ink.safetensors")
        self.ask = Ask(str(self.base), self.acceleration.identity[:12], (str(self.style),), WEIGHTS, FORMS)
        self.folder = compose(self.ask, str(folder / "composed"), store=self.chain.store)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def composed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    torch.set_num_threads(1)
    return Composed(tmp_path_factory.mktemp(request.param), request.param)


def _apart(composed: Composed, weights: tuple[float, ...] = WEIGHTS) -> Any:
    """The same composition by diffusers' own calls on the files that were given."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(composed.base)
    acceleration = composed.chain.store.fetch(composed.acceleration)
    pipeline.load_lora_weights(acceleration, weight_name=LORA_FILE, adapter_name="a")
    pipeline.load_lora_weights(composed.style.parent, weight_name=composed.style.name, adapter_name="s")
    pipeline.set_adapters(["a", "s"], adapter_weights=list(weights))
    return pipeline


def test_fused_weights_are_the_sum(composed: Composed) -> None:
    """W' = W + w_a (alpha/r) B A + w_s (alpha/r) B A, from the files' own tensors."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(composed.folder, subfolder="composed-unet/unet")
    base = diffusers.UNet2DConditionModel.from_pretrained(composed.base, subfolder="unet").state_dict()
    acceleration = load_file(composed.chain.store.fetch(composed.acceleration) / LORA_FILE)
    style = load_file(composed.style)
    fused = load_file(composed.folder / "composed-lora" / LORA_FILE)
    changed = 0
    for name, weight in unet.state_dict().items():
        layer = f"unet.{name.removesuffix('.weight')}"
        expected = base[name].clone()
        for tensors, scale in ((acceleration, WEIGHTS[0] * 3.0 / 2), (style, WEIGHTS[1] * 5.0 / 3), (fused, 1.0)):
            if f"{layer}.lora_A.weight" in tensors:
                change = tensors[f"{layer}.lora_B.weight"].flatten(1) @ tensors[f"{layer}.lora_A.weight"].flatten(1)
                expected += (0.5 * scale * change).view(expected.shape)  # half the parts and half the fused one
                changed += 1
        assert torch.allclose(weight, expected, atol=1e-5), name
    assert changed > 20
    ranks = {tensor.shape[0] for name, tensor in fused.items() if ".lora_A." in name}
    assert ranks == {2, 2 + 3}, "ranks add up where both change a layer"


def test_every_form_is_diffusers_own_composition(composed: Composed) -> None:
    pipeline = _apart(composed)
    pipeline.scheduler = diffusers.LCMScheduler.from_pretrained(composed.folder, subfolder="composed-lora/scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = np.asarray(pipeline("the cat", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]).astype(int)
    assert expected.std() > 0
    for form in FORMS:
        drawn = np.asarray(sample(composed.folder, "the cat", steps=4, seed=3, variant=f"composed-{form}")).astype(int)
        assert np.abs(drawn - expected).max() <= (0 if form == "adapters" else 2), form
    other = np.asarray(sample(composed.folder, "the cat", steps=32, seed=3, variant="teacher")).astype(int)
    assert np.abs(other - expected).max() > 2


@pytest.mark.parametrize("form", FORMS)
def test_the_cards_code_draws_what_sample_draws(*, composed: Composed, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_snippet(composed.folder, "composed", f"composed-{form}", tmp_path, monkeypatch)
    ours = sample(composed.folder, names["prompt"], steps=4, seed=0, variant=f"composed-{form}")
    assert np.array_equal(np.asarray(ours), np.asarray(names["image"]))


def test_the_folder_says_what_it_is_made_of(composed: Composed) -> None:
    composition = read_composition(composed.folder)
    assert [(one.adapter, one.weight) for one in composition.ingredients] == [("acceleration", 0.9), ("style", 0.6)]
    assert composition.ingredients[0].identity == composed.acceleration.identity
    assert composition.ingredients[0].sha256 == composed.acceleration.file(LORA_FILE).sha256
    assert composition.ingredients[1].name == "ink"
    assert set(composition.agreement) == {"composed-lora", "composed-unet"}
    assert all(0 <= difference < 1e-4 for difference in composition.agreement.values())
    assert set(read_description(composed.folder).variants) == {f"composed-{form}" for form in FORMS}
    text = "".join((composed.folder / name).read_text() for name in ("README.md", "distillery.json", "composition.json"))
    assert str(composed.style.parent) not in text


def test_a_sum_that_is_not_the_sum_is_refused_and_leaves_nothing(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused file with one factor off by 20 %, as a forgotten alpha would make it."""
    right = write.save_fused

    def wrong(unet: Any, weights: Any, folder: Path) -> Path:
        return right(unet, {name: weight * 1.2 for name, weight in weights.items()}, folder)

    monkeypatch.setattr(write, "save_fused", wrong)
    with pytest.raises(RunFailed, match=r"composed-lora: its output differs .* expected at most 0.001"):
        compose(composed.ask, str(tmp_path / "out"), store=composed.chain.store)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_kohyas_files_compose_too(composed: Composed, tmp_path: Path, alpha: float | None) -> None:
    """As most styles and the public acceleration LoRAs are: names with underscores, alpha a tensor of each layer, or none."""
    kohya = {}
    for name, tensor in load_file(composed.style).items():
        layer, _, side = name.removeprefix("unet.").partition(".lora_")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{layer}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = tensor
        if alpha is not None:
            kohya[f"{layer}.alpha"] = torch.tensor(alpha)
    path = tmp_path / "kohya.safetensors"
    save_file(kohya, path)
    ask = Ask(str(composed.base), composed.acceleration.identity, (str(path),), WEIGHTS)
    folder = compose(ask, str(tmp_path / "out"), store=composed.chain.store)
    assert read_composition(folder).agreement["composed-lora"] < 1e-4
    # Kohya's alpha / rank is 1/3, or 1, where the same factors in the fixture's file have 5/3.
    again = Ask(
        str(composed.base), composed.acceleration.identity, (str(composed.style),), (0.9, 0.6 * (3 / 5 if alpha is None else 1 / 5))
    )
    same = compose(again, str(tmp_path / "same"), store=composed.chain.store)
    one, two = (load_file(place / "composed-lora" / LORA_FILE) for place in (folder, same))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_the_grid_is_the_weights(composed: Composed, tmp_path: Path) -> None:
    ask = Ask(str(composed.base), composed.acceleration.identity, (str(composed.style),), WEIGHTS)
    folder = compose(ask, str(tmp_path / "out"), store=composed.chain.store, grid=True)
    picture = Image.open(folder / "grid.png")
    assert picture.width > 5 * 128 and picture.height > 5 * 128  # 0, 0.4, 0.6, 0.8, 1.2 by 0, 0.5, 0.75, 0.9, 1
    assert "grid.png" in (folder / "README.md").read_text()
    assert read_composition(folder).agreement["composed-lora"] < 1e-4, "the grid does not leave its weights behind"
    with pytest.raises(BadInput, match="expected --style"):
        compose(Ask(str(composed.base), composed.acceleration.identity), str(tmp_path / "o"), store=composed.chain.store, grid=True)


def test_the_grid_varies_the_weight_of_each_style_in_turn(composed: Composed) -> None:
    """Every cell is painted with the weights it was drawn with: of acceleration and both styles in red, green and blue, where 100 is the weight 1."""
    ask = Ask(str(composed.base), composed.acceleration.identity, (str(composed.style),) * 2, (0.9, 0.6, 0.3))
    sources = find_sources(ask, composed.chain.store)
    drawn: list[dict[str, float]] = []

    class Pipeline:
        def set_adapters(self, names: list[str], adapter_weights: list[float]) -> None:
            self.weights = dict(zip(names, adapter_weights, strict=True))

        def __call__(self, _prompt: str, **_: object) -> Any:
            drawn.append(self.weights)
            colour = [round(100 * self.weights[name]) for name in ("acceleration", "style", "style-2")]
            return SimpleNamespace(images=[np.full((16, 16, 3), colour, np.uint8)])

    picture = np.asarray(draw_weights(Pipeline(), sources, "the cat", 0))
    accelerations, first, second = (0.0, 0.5, 0.75, 0.9, 1.0), (0.0, 0.4, 0.6, 0.8, 1.2), (0.0, 0.3, 0.4, 0.8, 1.2)
    expected = {(each, weight, 0.3) for each in accelerations for weight in first}
    expected |= {(each, 0.6, weight) for each in accelerations for weight in second}
    assert {tuple(weights.values()) for weights in drawn} == expected
    shown = {tuple(colour) for colour in picture.reshape(-1, 3)[::7].tolist()}
    assert {tuple(round(100 * weight) for weight in cell) for cell in expected} <= shown


@pytest.mark.parametrize("form", FORMS)
def test_lightnings_lora_composes_as_diffusers_composes_it(*, composed: Composed, form: Form, tmp_path: Path) -> None:
    chain = composed.chain
    acceleration = chain.lightning_lora(4)
    ask = Ask(str(composed.base), acceleration.identity, (str(composed.style),), WEIGHTS, (form,))
    folder = compose(ask, str(tmp_path / "out"), store=chain.store)
    variant = read_description(folder).variants[f"composed-{form}"]
    assert (variant.sampler, variant.scheduler, variant.steps) == ("trailing", "EulerDiscreteScheduler", (4,))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(composed.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(chain.store.fetch(acceleration), weight_name=LORA_FILE, adapter_name="a")
    pipeline.load_lora_weights(composed.style.parent, weight_name=composed.style.name, adapter_name="s")
    pipeline.set_adapters(["a", "s"], adapter_weights=list(WEIGHTS))
    euler: Any = diffusers.EulerDiscreteScheduler
    pipeline.scheduler = euler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    generator = torch.Generator().manual_seed(3)
    expected = np.asarray(pipeline("the cat", num_inference_steps=4, guidance_scale=0, generator=generator).images[0]).astype(int)
    drawn = np.asarray(sample(folder, "the cat", steps=4, seed=3)).astype(int)
    assert np.abs(drawn - expected).max() <= (0 if form == "adapters" else 2)


def test_without_a_style_the_base_is_only_accelerated(composed: Composed, tmp_path: Path) -> None:
    """By default with the weight 1: the LoRA itself on another base."""
    folder = compose(Ask(str(composed.base), composed.acceleration.identity), str(tmp_path / "out"), store=composed.chain.store)
    ours = np.asarray(sample(folder, "the cat", steps=2, seed=1)).astype(int)
    pipeline = _apart(composed, (1.0, 0.0))
    pipeline.scheduler = diffusers.LCMScheduler.from_pretrained(folder, subfolder="composed-lora/scheduler")
    generator = torch.Generator().manual_seed(1)
    theirs = np.asarray(pipeline("the cat", num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0]).astype(int)
    assert np.abs(ours - theirs).max() <= 2


def _refused(composed: Composed, match: str, **changes: Any) -> None:
    given = {"base": str(composed.base), "acceleration": composed.acceleration.identity, "styles": (str(composed.style),)} | changes
    with pytest.raises(BadInput, match=match):
        find_sources(Ask(**given), composed.chain.store)


def test_what_does_not_fit_is_refused(composed: Composed, tmp_path: Path) -> None:
    chain = composed.chain
    _refused(composed, r"--weights: 3 for 2 LoRAs; expected one for the acceleration", weights=(1.0, 0.5, 0.5))
    _refused(composed, "--style nowhere: no such file or folder here", styles=("nowhere",))
    _refused(composed, "--base nowhere: no such file or folder here", base="nowhere")
    _refused(composed, "--base .*: is an artifact of the kind student_lora, expected teacher", base=composed.acceleration.identity)
    _refused(composed, "--acceleration .*: is a whole UNet", acceleration=chain.unet(4).identity)
    _refused(composed, "--style .*: a whole network", styles=(str(composed.base / "unet"),))
    _refused(composed, "--style .*: a whole network", styles=(str(composed.base),))
    whole = composed.base / "unet" / "diffusion_pytorch_model.safetensors"
    _refused(composed, "holds the weights of a whole network", styles=(str(whole),))
    _refused(composed, "expected pytorch_lora_weights.safetensors in it", styles=(str(tmp_path),))

    tensors = load_file(composed.style)
    name = min(tensors)
    save_file(tensors | {name: torch.zeros(3, 99)}, tmp_path / "wide.safetensors")
    _refused(composed, r"made for another UNet: its .*to_q is .* x 99, the base's is", styles=(str(tmp_path / "wide.safetensors"),))
    save_file({f"unet.nowhere.{side}.weight": torch.zeros(2, 2) for side in ("lora_A", "lora_B")}, tmp_path / "other.safetensors")
    _refused(composed, "changes the layer nowhere, which the base does not have", styles=(str(tmp_path / "other.safetensors"),))
    save_file({name: tensors[name]}, tmp_path / "half.safetensors")
    _refused(composed, "do not belong together", styles=(str(tmp_path / "half.safetensors"),))
    save_file(tensors | {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "text.safetensors")
    _refused(composed, "expected a LoRA of the UNet alone", styles=(str(tmp_path / "text.safetensors"),))
    (tmp_path / "cut.safetensors").write_bytes(composed.style.read_bytes()[:-5])
    _refused(composed, "cut short", styles=(str(tmp_path / "cut.safetensors"),))
    other = tiny_pipelines.save("sd2-v", tmp_path / "other")
    _refused(composed, "made for another UNet|does not have|was trained for epsilon", base=str(other))


def test_an_acceleration_that_is_only_a_file_is_told_how_it_is_sampled(composed: Composed, tmp_path: Path) -> None:
    file = tmp_path / "fast.safetensors"
    shutil.copyfile(composed.chain.store.fetch(composed.acceleration) / LORA_FILE, file)
    _refused(composed, "does not say how it is sampled; expected --sampler lcm or trailing, and --steps", acceleration=str(file))
    _refused(composed, "--steps: 51 steps: expected 1..50", acceleration=str(file), sampler="lcm", steps=(51,))
    sources = find_sources(Ask(str(composed.base), str(file), sampler="trailing", steps=(2, 4)), None)
    assert sources.sampling.timesteps == {4: (999, 749, 499, 249), 2: (999, 499)}
    assert type(sources.scheduler).__name__ == "EulerDiscreteScheduler"
    inside = find_sources(Ask(str(composed.base), str(composed.folder / "composed-lora")), None)
    assert inside.sampling.sampler == "lcm" and inside.sampling.steps == (4, 2), "a published model says it"
    _refused(composed, "expected these, or neither option", sampler="trailing")


def test_the_runs_own_styles_and_bases_compose_as_the_same_files_do(composed: Composed, tmp_path: Path) -> None:
    """What `finetune` publishes, named as artifacts, beside the same as a folder and a file."""
    chain = composed.chain
    style, base = chain.style(), chain.finetuned_base(composed.base)
    ask = Ask(base.identity[:12], composed.acceleration.identity, (style.identity[:12],), WEIGHTS)
    folder = compose(ask, str(tmp_path / "own"), store=chain.store)
    file = tmp_path / "style.safetensors"
    shutil.copyfile(chain.store.fetch(style) / LORA_FILE, file)
    same = compose(
        Ask(str(composed.base), composed.acceleration.identity, (str(file),), WEIGHTS), str(tmp_path / "same"), store=chain.store
    )
    for name in (f"composed-lora/{LORA_FILE}", "unet/diffusion_pytorch_model.safetensors"):
        assert (folder / name).read_bytes() == (same / name).read_bytes(), name
    ingredient = read_composition(folder).ingredients[1]
    assert (ingredient.name, ingredient.identity) == ("finetune-style", style.identity)
    assert read_composition(folder).base_digest == read_composition(same).base_digest
    _refused(composed, "--acceleration .*: is an artifact of the kind finetuned_lora, expected student_lora", acceleration=style.identity)
    _refused(composed, "--style .*: is an artifact of the kind teacher, expected finetuned_lora or student_lora", styles=(base.identity,))


def test_numbers_are_read_with_commas() -> None:
    assert parse_weights("1.0, 0.8") == (1.0, 0.8)
    for text in ("", "1;2", "nan", "1,inf", "1,,2"):
        with pytest.raises(BadInput, match=r"--weights .*expected numbers with commas"):
            parse_weights(text)


@pytest.mark.usefixtures("restored_process")
def test_the_command_composes_and_says_where(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_STORE_ADDRESS", composed.chain.store.address)
    arguments = ["compose", "--base", composed.chain.teacher.identity[:12], "--acceleration", composed.acceleration.identity[:12]]
    arguments += ["--style", str(composed.style), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--weights", "1.0"])
    assert ended.value.code == 2
    assert "--weights: 1 for 2 LoRAs" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--form", "lycoris"])
    assert ended.value.code == 2
    assert "--form lycoris: expected one of lora, unet, adapters" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--weights", "1.0,0.8", "--form", "unet"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert TeacherPipeline.load(tmp_path / "out").facts.architecture == composed.chain.teacher.content.architecture
    assert set(read_description(tmp_path / "out").variants) == {"composed-unet"}
