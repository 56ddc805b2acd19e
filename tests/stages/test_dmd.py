"""The stage `dmd`: its players in the loop, what a checkpoint must hold, students that plain diffusers calls draw as they were trained."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from schemas.errors import BadInput, RunFailed
from schemas.manifest import Latents, Manifest, Pairs, StudentUNet, Teacher
from schemas.recipe import Recipe
from stages import dmd
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.sampling import sample
from stages.dmd.batches import batch_reader
from stages.dmd.generator import generate, roll_out
from stages.dmd.matching import DISCRIMINATOR, FAKE_SCORE, STUDENT
from stages.dmd.networks import Networks
from stages.evaluate.schedulers import checked_scheduler
from stages.students import load_student
from stages.training import train
from tests.stages.matched import MadeUpPairs, a_matching, config, make_pairs
from tests.stages.mixtures import MixtureSet
from tests.training import artifacts
from tests.training.killing import killed_and_resumed
from tests.training.toys import make_workspace

Place = tuple[Path, Manifest[Teacher], Manifest[Latents], Manifest[Pairs]]


def test_players_take_their_turns_and_reach_their_own_parameters(tmp_path: Path) -> None:
    settings = config(gan={}, fake_updates=5, training_steps=3)
    method = a_matching(settings)
    assert list(method.turns(0)) == [*[FAKE_SCORE] * 5, STUDENT]
    assert method.players[FAKE_SCORE].updates == 15 and method.players[STUDENT].updates == 3
    before = {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in method.state().items()}
    assert set(before) == {STUDENT, FAKE_SCORE, DISCRIMINATOR}
    rows = train(method, batch_reader(MixtureSet(), MadeUpPairs()), 64, settings, make_workspace(tmp_path), seed=1)
    for name, tensors in method.state().items():
        assert not any(torch.equal(before[name][key], value) for key, value in tensors.items()), name
    told = {"loss", "adversarial", "grad_norm", "learning_rate"}
    latents = {"x0_mean", "x0_std", "reference_mean", "reference_std"}
    assert {key for key in rows[0] if key != "step"} == {
        *(f"{FAKE_SCORE}.{figure}" for figure in told | {"denoising", "real_accuracy", "fake_accuracy"}),
        *(f"{STUDENT}.{figure}" for figure in told | {"matching", "regression"} | latents),
    }


def test_each_update_of_the_fake_score_has_a_batch_of_its_own(tmp_path: Path) -> None:
    """Captions, pairs and pictures; the student takes the last one's. In the order of the set, whatever the number of updates."""
    settings = config(gan={}, fake_updates=3, training_steps=2)
    read, method = batch_reader(MixtureSet(), MadeUpPairs()), a_matching(settings)
    seen: list[tuple[str, Any]] = []
    taken: list[int] = []

    def noted(player: str, prepared: Any, draw: Any) -> Any:
        seen.append((player, prepared))
        return type(method).loss(method, player, prepared, draw)

    def told(chosen: Any) -> Any:
        taken.extend(chosen)
        return read(chosen)

    method.loss = noted  # type: ignore[method-assign]
    train(method, told, 64, settings, make_workspace(tmp_path), seed=1)
    assert [player for player, _ in seen] == 2 * [*[FAKE_SCORE] * 3, STUDENT]
    assert len(taken) == len(set(taken)) == 2 * 3 * settings.batch_size, "no sample twice within an epoch"
    for batches in (seen[:4], seen[4:]):
        (_, first), (_, second), (_, third), (_, students) = batches
        for one, other in ((first, second), (second, third)):
            assert not torch.equal(one.pairs.noise, other.pairs.noise)
            assert not torch.equal(one.real.latents, other.real.latents)
        assert torch.equal(third.pairs.noise, students.pairs.noise) and torch.equal(third.real.latents, students.real.latents)
    one = a_matching(config(training_steps=2))
    assert one.batches_per_step == 1, "an update of the fake score for each of the student: DMD"


def test_without_matching_what_is_left_is_learnt_from(tmp_path: Path) -> None:
    """Regression alone: the fake score has no turns and stays as it was. Beside a GAN, whose head is on it, it follows the student still."""
    alone = config(matching=False, training_steps=2)
    method = a_matching(alone)
    before = {name: value.clone() for name, value in method.state()[FAKE_SCORE].items()}
    data = batch_reader(MixtureSet(), MadeUpPairs()), 64
    rows = train(method, *data, alone, make_workspace(tmp_path), seed=1)
    assert all(torch.equal(before[name], value) for name, value in method.state()[FAKE_SCORE].items())
    assert rows[0]["student.loss"] == pytest.approx(alone.regression.weight * rows[0]["student.regression"])  # type: ignore[union-attr]
    assert not any(key.startswith(FAKE_SCORE) or key == "student.matching" for row in rows for key in row)
    beside = a_matching(config(matching=False, gan={}, regression=None))
    assert list(beside.turns(0)) == [FAKE_SCORE, STUDENT]


@pytest.mark.parametrize("lost", ["network-fake_score", "network-discriminator", "network-student", "optimizer-fake_score"])
def test_a_checkpoint_that_lacks_a_piece_is_refused_by_its_name(tmp_path: Path, lost: str) -> None:
    settings = config(gan={}, training_steps=2)
    data = batch_reader(MixtureSet(), MadeUpPairs()), 64
    train(a_matching(settings), *data, settings, make_workspace(tmp_path), seed=1)
    workspace = make_workspace(tmp_path)
    (part,) = workspace.parts()
    with workspace.folder("edited") as folder:
        workspace.load_part(part, folder / "part")
        (folder / "part" / f"{lost}.safetensors").unlink()
        workspace.delete_parts([part.name])
        workspace.save_part(part.name, folder / "part", part.note)
    with pytest.raises(RunFailed, match=f"missing piece {lost}"):
        train(a_matching(settings), *data, settings, workspace, seed=1)


def test_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, cut = (config(gan={}, fake_updates=2, training_steps=steps, checkpoint_every=3) for steps in (6, 3))
    found = []
    for name, runs in (("whole", (whole,)), ("cut", (cut, whole))):
        for settings in runs:
            method = a_matching(settings)
            train(method, batch_reader(MixtureSet(), MadeUpPairs()), 64, settings, make_workspace(tmp_path / name), seed=1)
        found.append(method.state())
    for piece, tensors in found[0].items():
        assert all(torch.equal(tensor, found[1][piece][name]) for name, tensor in tensors.items()), piece


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("sdxl")
    teacher = artifacts.make_teacher(folder, "sdxl")
    latents = artifacts.make_latents(folder, teacher)
    return folder, teacher, latents, make_pairs(folder, teacher, latents)


def made(place: Place, settings: Any) -> Manifest[Any]:
    folder, teacher, latents, pairs = place
    inputs = dmd.Inputs(teacher=teacher, latents=latents, pairs=pairs if settings.reads_pairs else None)
    return dmd.run(settings, inputs, artifacts.workspace(folder, config=settings))


DMD2 = {"regression": None, "gan": {}, "fake_updates": 2}
LOOKS = {"every": 1, "images": 4, "teacher_steps": 2, "extractor": "efficientnet-lite0", "grid_images": 2, "batch_size": 4}


def drawn(place: Place, student: Manifest[Any]) -> tuple[UNetDenoiser, TeacherPipeline, Any]:
    """The published student, its pipeline and its scheduler as plain diffusers loads it."""
    folder, teacher, *_ = place
    store = artifacts.open_store(folder)
    pipeline = TeacherPipeline.load(store.fetch(teacher))
    content = student.content
    steps = content.steps[0]
    scheduler = checked_scheduler("dmd", content.sampler, pipeline.scheduler_config, content.prediction_type, [content.timesteps[steps]])
    scheduler.save_pretrained(folder / f"scheduler-{student.identity[:8]}")
    loaded = type(scheduler).from_pretrained(folder / f"scheduler-{student.identity[:8]}")
    return load_student(pipeline, student, store.fetch(student)), pipeline, loaded


@pytest.mark.parametrize("timestep", [999, 399])
def test_a_one_step_student_is_drawn_at_its_timestep(sdxl: Place, timestep: int) -> None:
    warmed: dict[str, object] = {"warm_up": {"training_steps": 2, "learning_rate": 1e-4}} if timestep == 399 else {}
    student = made(sdxl, config(timestep=timestep, training_steps=2, **warmed))
    assert isinstance(student.content, StudentUNet)
    assert student.content.timesteps == {1: (timestep,)} and student.content.method == "dmd"
    files = {entry.path for entry in student.files}
    assert ("conversion.parquet" in files) == (timestep == 399) and "unet/diffusion_pytorch_model.safetensors" in files
    denoiser, pipeline, scheduler = drawn(sdxl, student)
    noise = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(1))
    conditioning = pipeline.conditioning(["cat", "dog"])
    with torch.no_grad():
        expected = generate(denoiser, noise, timestep, conditioning)
    torch.testing.assert_close(sample(denoiser, noise, conditioning, scheduler=scheduler, steps=1), expected, rtol=1e-4, atol=1e-4)


def test_a_student_of_several_steps_is_drawn_as_it_was_trained(sdxl: Place) -> None:
    student = made(sdxl, config(steps=4, training_steps=2, watch=LOOKS, alarms={"latent_std_band": [0.01, 100]}, **DMD2))
    assert student.content.best_step in (1, 2)
    assert {"grids/step-000001.png", "grids/step-000002.png", "report.html"} <= {entry.path for entry in student.files}
    assert student.content.timesteps == {4: (999, 749, 499, 249)} and student.content.method == "dmd2"
    denoiser, pipeline, scheduler = drawn(sdxl, student)
    assert scheduler.config.original_inference_steps == 4
    noise = torch.randn(2, *pipeline.latent_shape, generator=torch.Generator().manual_seed(1))
    conditioning = pipeline.conditioning(["cat", "dog"])
    random, again = (torch.Generator().manual_seed(5) for _ in range(2))
    ours = sample(denoiser, noise, conditioning, scheduler=scheduler, steps=4, generator=random)
    fresh = [torch.randn(noise.shape, generator=again) for _ in range(3)]
    with torch.no_grad():
        x_t = roll_out(denoiser, noise, (999, 749, 499, 249), conditioning, fresh)
        torch.testing.assert_close(ours, generate(denoiser, x_t, 249, conditioning), rtol=1e-3, atol=1e-4)


def test_all_networks_begin_as_the_teacher(sdxl: Place) -> None:
    folder, teacher, latents, _ = sdxl
    settings = config(**DMD2)
    networks = Networks.build(settings, teacher, latents.content.latent_shape, artifacts.workspace(folder, config=settings), seed=0)
    pipeline = TeacherPipeline.load(artifacts.open_store(folder).fetch(teacher))
    x, t, conditioning = torch.randn(2, *pipeline.latent_shape), torch.tensor([999, 19]), pipeline.conditioning(["cat", "dog"])
    with torch.no_grad():
        expected = pipeline.denoiser()(x, t, conditioning)
        for denoiser in (networks.teacher, networks.student.denoiser, networks.fake.denoiser):
            torch.testing.assert_close(denoiser(x, t, conditioning), expected, rtol=1e-4, atol=1e-5)
        assert networks.judge is not None and networks.judge(x, t, conditioning).shape == (2,)
    pointers = [{tensor.data_ptr() for tensor in student.parameters.values()} for student in (networks.student, networks.fake)]
    pointers.append({parameter.data_ptr() for parameter in networks.teacher.unet.parameters()})
    assert not any(pointers[i] & pointers[j] for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", ["sd15", "sd2-v"])
def test_other_teachers_get_their_lora(tmp_path: Path, kind: str) -> None:
    teacher = artifacts.make_teacher(tmp_path, kind)  # type: ignore[arg-type]
    latents = artifacts.make_latents(tmp_path, teacher)
    place = tmp_path, teacher, latents, make_pairs(tmp_path, teacher, latents)
    distance = {"distance": "lpips-efficientnet-lite0", "size_px": 32}
    settings = config(network="lora", lora_rank=4, lora_alpha=8, training_steps=2, precision="bfloat16", regression=distance, gan={})
    student = made(place, settings)
    assert student.content.kind == "student_lora" and student.content.sampler == "lcm-trailing"
    path = artifacts.open_store(tmp_path).fetch(student) / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        assert all(float(file.get_tensor(name).abs().max()) > 0 for name in file.keys() if ".lora_B." in name)  # noqa: SIM118


@pytest.mark.parametrize("network", ["lora", "unet"])
def test_a_student_is_gone_on_with(sdxl: Place, network: str) -> None:
    """Stages of lambda, as DMD at guidance 8: a slow step from a student ends beside it, and none of the teacher's."""
    folder, teacher, latents, pairs = sdxl
    inputs = dmd.Inputs(teacher=teacher, latents=latents, pairs=pairs)
    small: dict[str, object] = {"network": network, "lora_rank": 4, "lora_alpha": 4, "training_steps": 1}
    first = made(sdxl, config(**small, optimizer={"learning_rate": 1e-2}))
    begun = artifacts.open_store(folder).fetch(first)
    slow = {"optimizer": {"learning_rate": 1e-6}, "regression": {"distance": "l2", "weight": 0.5}, "start": str(begun)}
    settings = config(**small, **slow)
    outside = {"start": str(begun)}
    dmd.preflight(settings, outside, Recipe.model_construct())
    second = dmd.run(settings, inputs, replace(artifacts.workspace(folder, config=settings), outside=outside))
    name = "pytorch_lora_weights.safetensors" if network == "lora" else "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(artifacts.open_store(folder).fetch(student) / name) for student in (first, second))
    assert any(not torch.equal(after[key], value) for key, value in before.items()), "it was trained"
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-5)
    if network == "lora":
        with pytest.raises(BadInput, match=r"dmd.start: .*expected lora_rank 2"):
            dmd.preflight(settings.model_copy(update={"lora_rank": 2}), outside, Recipe.model_construct())


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_files(sdxl: Place, tmp_path: Path) -> None:
    settings = config(training_steps=12, checkpoint_every=3, fake_updates=2, gan={})
    folder, teacher, latents, pairs = sdxl
    whole = made(sdxl, settings)
    shutil.copytree(folder / "store", tmp_path / "store", ignore=shutil.ignore_patterns(f"{whole.identity}*"))
    inputs = dmd.Inputs(teacher=teacher, latents=latents, pairs=pairs)
    assert killed_and_resumed(tmp_path, "dmd", settings, inputs, "checkpoint-00000006").files == whole.files


def test_bad_input_is_named_before_training(sdxl: Place) -> None:
    folder, teacher, latents, pairs = sdxl
    settings = config()
    workspace = artifacts.workspace(folder, config=settings)
    with pytest.raises(BadInput, match="regression and warm_up read pairs"):
        dmd.run(settings, dmd.Inputs(teacher=teacher, latents=latents), workspace)
    others = pairs.model_copy(update={"content": pairs.content.model_copy(update={"teacher": "0" * 64})})
    with pytest.raises(BadInput, match="drawn by the teacher 000000000000"):
        dmd.run(settings, dmd.Inputs(teacher=teacher, latents=latents, pairs=others), workspace)


@pytest.mark.parametrize(
    ("wrong", "place", "says"),
    [
        ({"steps": 4}, "regression", "does not say in one call: expected null here"),
        ({"steps": 3, "regression": None}, "steps", "expected a divisor of 1000"),
        ({"steps": 2, "regression": None, "timestep": 399}, "timestep", "expected nothing here"),
        ({"matching": False, "regression": None}, "matching", "no loss is left to learn from"),
        ({"noise_range": [0.5, 0.5]}, "noise_range", "lowest share before the highest"),
        ({"network": "lora", "teacher_precision": "bfloat16"}, "teacher_precision", "expected network: unet"),
        ({"regression": {"distance": "l2", "decoder": "x"}}, "regression.decoder", "has no use for it"),
        (
            {"warm_up": {"training_steps": 5}, "warmup_steps": 5, "training_steps": 9},
            "warm_up.training_steps",
            "expected more than warmup_steps",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(wrong: dict[str, object], place: str, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**wrong)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == place and says in error["msg"]
