"""Teacher, student and fake score as one network under two adapters: the losses and gradients of networks apart, resumed exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.dmd import DmdConfig
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from stages import dmd
from stages.diffusion import lora_merged
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.lora import active_adapter, lora_layers, under
from stages.dmd.batches import batch_reader
from stages.dmd.matching import DISCRIMINATOR, FAKE_SCORE, STUDENT, DistributionMatching
from stages.dmd.networks import FAKE_ADAPTER, BottleneckJudge, FakeDenoiser, FakeScore, Networks
from stages.latents import LatentSet
from stages.pairs.pair_set import PairSet
from stages.students import Student
from stages.training import Draw, Figure, train
from tests.stages.matched import config, l2, make_pairs
from tests.training import artifacts

Place = tuple[Path, Manifest[Teacher], Manifest[Latents], Manifest[Pairs]]
SHARED = {"fake_network": "lora", "lora_rank": 4, "lora_alpha": 4, "gan": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("shared")
    teacher = artifacts.make_teacher(folder, "sdxl")
    latents = artifacts.make_latents(folder, teacher)
    return folder, teacher, latents, make_pairs(folder, teacher, latents)


def built(place: Place, settings: DmdConfig) -> tuple[Networks, LatentSet]:
    folder, teacher, latents, _ = place
    workspace = artifacts.workspace(folder, config=settings)
    networks = Networks.build(settings, teacher, latents.content.latent_shape, workspace, seed=0)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():  # B = 0 would make the adapters no change at all
        for student in (networks.student, networks.fake):
            for name, parameter in sorted(student.parameters.items()):
                if ".lora_B." in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return networks, LatentSet.open(latents, workspace, teacher)


def method_of(settings: DmdConfig, networks: Networks, latents: LatentSet) -> DistributionMatching:
    return DistributionMatching(
        settings,
        teacher=networks.teacher,
        student=networks.student,
        fake=networks.fake,
        unconditional=latents.unconditional(1),
        distance=l2,
        judge=networks.judge,
        as_teacher=networks.as_teacher,
    )


def apart(networks: Networks) -> Networks:
    """The same networks, none sharing anything with another."""
    base, fake = networks.teacher, networks.fake.denoiser
    assert isinstance(fake, FakeDenoiser) and isinstance(networks.student.denoiser, UNetDenoiser) and networks.judge is not None
    student = UNetDenoiser(copy.deepcopy(networks.student.denoiser.unet), base.schedule, base.prediction)
    alone = FakeScore(copy.deepcopy(fake.network.unet), copy.deepcopy(fake.network.head))
    for layer in lora_layers(alone.unet):
        layer._active_adapter = [FAKE_ADAPTER]
    named = dict(alone.named_parameters())
    head = {name: named[f"head.{name}"] for name in networks.judge.parameters}
    trained = {name: dict(student.unet.named_parameters())[name] for name in networks.student.parameters}
    teacher = UNetDenoiser(copy.deepcopy(base.unet), base.schedule, base.prediction)
    for layer in lora_layers(teacher.unet):
        layer._disable_adapters = True
    return Networks(
        teacher,
        Student(student, trained, {}),
        Student(FakeDenoiser(alone, base.schedule, base.prediction), {name: named[name] for name in networks.fake.parameters}, {}),
        BottleneckJudge(alone, head, {}),
        lambda: under([], None),
    )


def turn(method: DistributionMatching, player: str, batch: Any) -> tuple[dict[str, Figure], dict[str, Tensor]]:
    """Figures of one turn, and the gradients of its player."""
    for name, other in method.players.items():
        for parameter in other.parameters.values():
            parameter.requires_grad_(name == player)
            parameter.grad = None
    draw = Draw(5, (0,), range(4), torch.device("cpu"))
    figures = dict(method.loss(player, method.prepare(batch, draw), draw.fold(player)))
    figures["loss"].backward()  # type: ignore[union-attr,operator]
    return figures, {name: p.grad for name, p in method.players[player].parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("network", "checkpointed"), [("lora", False), ("lora", True), ("unet", True)])
def test_losses_and_gradients_are_those_of_networks_apart(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, network: str, checkpointed: bool
) -> None:
    """Both adapters take part in the student's turn, whose backward pass recomputes each under its own."""
    monkeypatch.setattr(lora_merged, "merging_is_cheaper", lambda *_arguments, **_more: checkpointed)  # both ways through a layer
    settings = config(network=network, gradient_checkpointing=checkpointed, **SHARED)
    networks, latents = built(place, settings)
    unet = networks.teacher.unet
    assert isinstance(networks.student.denoiser, UNetDenoiser) and isinstance(networks.fake.denoiser, FakeDenoiser)
    assert networks.fake.denoiser.network.unet is unet
    assert (networks.student.denoiser.unet is unet) == (network == "lora")
    rest = active_adapter(lora_layers(unet)[0])
    batch = batch_reader(latents, PairSet.open(place[3], artifacts.workspace(place[0], config=settings)))(range(4))
    ours, theirs = (method_of(settings, each, latents) for each in (networks, apart(networks)))
    for player in (STUDENT, FAKE_SCORE):
        (figures, gradients), (expected, wanted) = (turn(method, player, batch) for method in (ours, theirs))
        assert active_adapter(lora_layers(unet)[0]) == rest
        for name in expected:
            if isinstance(value := expected[name], Tensor):
                torch.testing.assert_close(figures[name], value, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == wanted.keys() and len(gradients) == len(ours.players[player].parameters)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * max(1e-3, float(gradient.abs().max())))


def test_resumed_it_ends_with_the_same_weights_and_names_each_network(place: Place) -> None:
    whole, cut = (config(network="lora", training_steps=steps, checkpoint_every=2, **SHARED) for steps in (4, 2))
    folder, teacher, latents, pairs = place
    found = []
    for name, runs in (("whole", (whole,)), ("cut", (cut, whole))):
        for settings in runs:
            workspace = artifacts.workspace(folder, config=config(seed=len(name), **SHARED))  # the same identity for both runs
            networks = Networks.build(settings, teacher, latents.content.latent_shape, workspace, seed=0)
            opened = LatentSet.open(latents, workspace, teacher)
            method = method_of(settings, networks, opened)
            before = {piece: {key: value.clone() for key, value in tensors.items()} for piece, tensors in method.state().items()}
            train(method, batch_reader(opened, PairSet.open(pairs, workspace)), 10, settings, workspace, seed=1)
        found.append(method.state())
    assert set(found[0]) == {STUDENT, FAKE_SCORE, DISCRIMINATOR}
    assert all(FAKE_ADAPTER in name for name in found[0][FAKE_SCORE]) and not any(FAKE_ADAPTER in name for name in found[0][STUDENT])
    for piece, tensors in found[0].items():
        assert tensors and all(torch.equal(tensor, found[1][piece][name]) for name, tensor in tensors.items()), piece
        assert not any(torch.equal(before[piece][name], tensor) for name, tensor in tensors.items() if ".lora_B." in name), piece


def test_the_published_lora_is_the_students(place: Place) -> None:
    folder, teacher, latents, pairs = place
    settings = config(network="lora", training_steps=1, precision="bfloat16", gradient_checkpointing=True, **SHARED)
    inputs = dmd.Inputs(teacher=teacher, latents=latents, pairs=pairs)
    student = dmd.run(settings, inputs, artifacts.workspace(folder, config=settings))
    assert student.content.kind == "student_lora"
    assert "pytorch_lora_weights.safetensors" in {entry.path for entry in student.files}
