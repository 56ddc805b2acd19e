"""What lies in memory while a student is trained, and that `distill plan` foretells it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from schemas.data import EncodeConfig
from schemas.lightning import LinkConfig
from schemas.manifest import Latents, Manifest, StudentManifest, Teacher
from stages import lightning
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import predict
from stages.diffusion.discriminator import unet_discriminator
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PREDICTION_TYPES
from stages.memory_estimate import TeacherShape
from stages.training import train
from tests import tiny_pipelines
from tests.training import artifacts

ROOT = Path(__file__).resolve().parents[2]
ADAM = {"learning_rate": 1e-4}
Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]


def config(steps: int = 4, **more: object) -> LinkConfig:
    known: dict[str, object] = {"teacher_steps": 2 * steps, "steps": steps, "training_steps": 1, "batch_size": 2, "optimizer": ADAM}
    return LinkConfig.model_validate(known | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("memory")
    teacher = artifacts.make_teacher(folder, "sdxl")
    return folder, teacher, artifacts.make_latents(folder, teacher)


def run(place: Place, settings: LinkConfig, source: StudentManifest | None = None, start: StudentManifest | None = None) -> StudentManifest:
    folder, teacher, latents = place
    inputs = lightning.Inputs(teacher=teacher, latents=latents, source=source, start=start)
    return lightning.run(settings, inputs, artifacts.workspace(folder, config=settings))


def storages(of: Callable[[Any], bool]) -> dict[int, Tensor]:
    """All storages of live tensors, by address."""
    gc.collect()
    return {found.untyped_storage().data_ptr(): found for found in gc.get_objects() if isinstance(found, Tensor) and of(found)}


def weights_while_training(place: Place, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Bytes of all parameters alive when training begins, beyond those that other tests keep alive."""
    before = storages(lambda tensor: isinstance(tensor, nn.Parameter))
    seen: list[int] = []

    def stop(*_arguments: Any, **_settings: Any) -> None:
        now = storages(lambda tensor: isinstance(tensor, nn.Parameter))
        seen.append(sum(tensor.untyped_storage().nbytes() for address, tensor in now.items() if address not in before))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.lightning.stage.train", stop)
        run(place, *arguments)
    return seen[0]


@pytest.mark.slow
def test_no_network_is_held_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipelines.build("sdxl")
    unet = 4 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    judge = unet_discriminator(pipeline.unet, (4, 8, 8), conditional=True, seed=0)
    discriminator = 4 * sum(parameter.numel() for parameter in judge.parameters())
    whole, lora = run(place, config()), run(place, config(network="lora", lora_rank=2))
    other = run(place, config(training_steps=2))

    def held(*arguments: Any) -> int:
        return weights_while_training(place, monkeypatch, *arguments)

    adversarial: dict[str, object] = {"adversarial": {}}
    assert held(config()) == 2 * unet
    assert held(config(**adversarial)) == 2 * unet + discriminator
    assert held(config(teacher_precision="bfloat16", **adversarial)) == unet + unet // 2 + discriminator
    assert held(config(2, **adversarial), whole, whole) == 2 * unet + discriminator, "the base teacher is still there"
    assert held(config(2), whole, other) == 2 * unet, "what the student started as is still there"
    with_lora = held(config(2, network="lora", lora_rank=2, lora_alpha=64), lora, lora) - 2 * unet
    assert 0 < with_lora < unet // 2, "the merged teacher, the base, and an adapter"


def test_the_teacher_in_low_precision_and_the_student_and_discriminator_in_float32(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def stop(link: Any, *_arguments: Any, **_settings: Any) -> None:
        found.append(link)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.lightning.stage.train", stop)
        run(place, config(adversarial={}, teacher_precision="bfloat16"))
    (link,) = found
    teacher, student = (dict(network.unet.named_parameters()) for network in (link.teacher, link.student))
    assert {parameter.dtype for parameter in teacher.values()} == {torch.bfloat16}
    encoder = dict(link.discriminator.encoder.unet.named_parameters())
    for name, parameter in encoder.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, student[name])
        assert torch.equal(parameter.bfloat16(), teacher[name])
    assert all(isinstance(processor, AttnProcessor2_0) for processor in link.student.unet.attn_processors.values())
    assert all(isinstance(processor, AttnProcessor2_0) for processor in link.discriminator.encoder.unet.attn_processors.values())


def test_guidance_of_a_low_precision_teacher_is_float32_arithmetic(place: Place) -> None:
    class Low:
        schedule = TeacherPipeline.load(artifacts.open_store(place[0]).fetch(place[1])).schedule
        prediction = PREDICTION_TYPES["epsilon"]

        def __call__(self, x_t: Tensor, _t: Tensor, conditioning: Conditioning) -> Tensor:
            return (x_t * 0.1 + conditioning.prompt_embeds[:, :1, :1, None]).bfloat16()

    denoiser = Low()
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 499])
    text, nothing = Conditioning(torch.full((2, 1, 1), 0.3)), Conditioning(torch.full((2, 1, 1), 0.29))
    eps = predict(denoiser, x, t, text, unconditional=nothing, guidance_scale=6.0).eps
    u, c = denoiser(x, t, nothing).float(), denoiser(x, t, text).float()
    assert eps.dtype == torch.float32
    torch.testing.assert_close(eps, u + 6 * (c - u))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_discriminators_encoder_recomputes_its_activations(checkpointed: bool) -> None:
    unet = tiny_pipelines.build("sdxl").unet
    discriminator = unet_discriminator(unet, (4, 8, 8), conditional=True, seed=0).train()
    if checkpointed:
        discriminator.encoder.unet.enable_gradient_checkpointing()
    calls: list[str] = []
    watched = [module for module in discriminator.encoder.modules() if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    for module in watched:
        module.register_forward_pre_hook(lambda module, _inputs: calls.append(type(module).__name__))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 499])
    conditioning = Conditioning(torch.randn(2, 12, 40), torch.randn(2, 20), torch.zeros(2, 6))
    discriminator(x, t, x, t, conditioning).sum().backward()
    resnets = sum(type(module).__name__ == "ResnetBlock2D" for module in watched)
    # diffusers' mid block never recomputes its first residual block
    assert calls.count("ResnetBlock2D") == (2 * resnets - 1 if checkpointed else resnets)
    assert calls.count("BasicTransformerBlock") == (2 if checkpointed else 1) * (len(watched) - resnets)


def measured_peak(stage: str, train_student: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of tensors at the peak of a stage's training, as the allocator tells torch's profiler."""
    before = storages(lambda _tensor: True)
    peaks: list[int] = []

    def profiled(*arguments: Any, **more: Any) -> Any:
        now = storages(lambda _tensor: True)
        alive = peak = sum(tensor.untyped_storage().nbytes() for address, tensor in now.items() if address not in before)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            rows = train(*arguments, **more)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        peaks.append(peak)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(f"stages.{stage}.stage.train", profiled)
        train_student()
    return peaks[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, TeacherShape]:
    """The tiny recipe's own teacher."""
    folder, source = tmp_path_factory.mktemp("tiny"), ROOT / "recipes" / "tiny_teacher"
    teacher = artifacts.make_teacher(folder, source)
    return (folder, teacher, artifacts.make_latents(folder, teacher)), TeacherShape.read(source, EncodeConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"adversarial": {}},
        {"adversarial": {}, "gradient_checkpointing": True, "ema_decay": 0.9},
        {"network": "lora", "lora_rank": 16, "accumulation_steps": 2},
    ],
)
def test_the_estimate_is_what_is_measured(
    tiny: tuple[Place, TeacherShape], monkeypatch: pytest.MonkeyPatch, more: dict[str, object]
) -> None:
    place, shape = tiny
    settings = config(batch_size=16, training_steps=2, checkpoint_every=100, **more)
    estimate, measured = shape.estimate(settings), measured_peak("lightning", lambda: run(place, settings), monkeypatch)
    assert estimate.peak == pytest.approx(measured, rel=0.15), (measured, estimate)
