"""A training step of the loop beside its bare parts: `python -m benchmarks.train_step [--only NAME]`, and on a GPU `--device cuda --sdxl`.

The loop is `stages.training.train` with the real methods over real `latents` shards, as the stages call it: reading, noise, teacher's targets, the
players' turns, figures, checkpoints. The bare parts are what the mathematics of the step cannot do without, written straight down: the same calls
of the same networks forward and backward, on a batch of the same shape that lies ready, and fused Adam. After every step of the loop the bare
parts are done once and timed too, so that a busy machine slows both; a step's ratio is its time over the mean of the bare parts before and after it.

The networks are those of recipes/tiny_teacher, batch and checkpoints those of recipes/tiny.yaml. With `--sdxl`: SDXL's UNet with random weights in
bfloat16 autocast with recomputed activations, and beside the ratio peak memory, samples per second, and the share of the rate that a large bfloat16
matrix product reaches on the same device. The last line is JSON: each method's worst median ratio under its name (`lightning_mse`,
`lightning_adversarial`, `lcm`, `dmd`), with `--sdxl` every case's figures too.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.interleaved import WARM_UP, Enough, Interleaved, matrix_rate
from benchmarks.train_step_setup import Setup
from infra.progress import Progress
from schemas.adversarial import AdversarialConfig
from schemas.dmd import DmdConfig, GanConfig
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.training import OptimizerConfig, TrainingConfig
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser, added_conditions
from stages.diffusion.discriminator import encoder_features, unet_discriminator, unet_head
from stages.diffusion.lora import add_lora, lora_layers, without_lora
from stages.dmd.batches import batch_reader
from stages.dmd.matching import DistributionMatching
from stages.dmd.networks import BottleneckJudge, FakeDenoiser, FakeScore
from stages.lcm.distillation import ConsistencyDistillation
from stages.lightning.adversarial import AdversarialLink
from stages.lightning.regression import ProgressiveLink
from stages.students import Student, ready_for_training
from stages.training import Method, train
from stages.training.latent_batches import LatentBatch, reader
from stages.training.optimization import OPTIMIZERS


@dataclass(frozen=True)
class Batch:
    """Tensors of a step, on the device."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning

    def repeated(self, times: int) -> "Batch":
        """The same several times over."""
        return Batch(
            self.x.repeat(times, 1, 1, 1),
            self.t.repeat(times),
            Conditioning.cat([self.conditioning] * times),
        )


@dataclass(frozen=True)
class Case:
    """A method as its stage would train it, and what its step must do at least."""

    method: Method[Any, Any]
    config: TrainingConfig
    bare: Callable[[], None]
    read: Callable[[Sequence[int]], Any]


def a_batch(setup: Setup) -> Batch:
    """The set's first samples, on the device."""
    size = setup.training["batch_size"] // setup.training.get("accumulation_steps", 1)
    latents = LatentBatch(*setup.latents.samples(range(size))).to(setup.device)
    return Batch(latents.latents, torch.full((size,), 499, device=setup.device), latents.conditioning)


def call(unet: Any, batch: Batch) -> Tensor:
    """One pass of a UNet."""
    given = batch.conditioning
    output: Tensor = unet(
        batch.x,
        batch.t,
        encoder_hidden_states=given.prompt_embeds,
        added_cond_kwargs=added_conditions(unet, given, given.prompt_embeds.dtype),
        return_dict=False,
    )[0]
    return output


def optimizer(parameters: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The player's, made anew."""
    return OPTIMIZERS[config.name](parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def descend(loss: Tensor, steps: torch.optim.Optimizer) -> None:
    """Backward and one update."""
    loss.backward()  # type: ignore[no-untyped-call]
    steps.step()
    steps.zero_grad(set_to_none=True)


def require_gradients(parameters: Sequence[Tensor], wanted: bool) -> None:
    """Freeze or thaw."""
    for parameter in parameters:
        parameter.requires_grad_(wanted)


def a_student(setup: Setup, network: str) -> UNetDenoiser:
    """A copy of the teacher in training, whole or with an adapter."""
    unet = copy.deepcopy(setup.teacher.unet).requires_grad_(True)
    if network == "lora":
        add_lora(unet, setup.lora_rank, setup.lora_rank, seed=0)
    return UNetDenoiser(
        ready_for_training(unet, gradient_checkpointing=setup.training["gradient_checkpointing"]),
        setup.teacher.schedule,
        setup.teacher.prediction,
    )


def mse(setup: Setup, network: str, teacher_steps: int, steps: int, guidance_scale: float = 1.0) -> Case:
    """A progressive link: n calls of the teacher, of twice the batch where it is guided; the student forward and backward; its update."""
    config = LinkConfig(
        **setup.training,
        teacher_steps=teacher_steps,
        steps=steps,
        guidance_scale=guidance_scale,
        optimizer=OptimizerConfig(learning_rate=1e-6),
    )
    denoiser = a_student(setup, network)
    student = Student.of_unet(denoiser)
    unconditional = setup.latents.unconditional(1) if guidance_scale > 1 else None
    method = ProgressiveLink(config, teacher=setup.teacher, student=student, unconditional=unconditional)
    batch, target = a_batch(setup), a_batch(setup).x
    asked = batch.repeated(2) if guidance_scale > 1 else batch
    steps_of_student = optimizer(list(student.parameters.values()), config.optimizer)

    def bare() -> None:
        with torch.no_grad(), setup.autocast():
            for _ in range(teacher_steps // steps):
                call(setup.teacher.unet, asked)
        with setup.autocast():
            loss = mse_loss(call(denoiser.unet, batch).float(), target)
        descend(loss, steps_of_student)

    return Case(method, config, bare, reader(setup.latents))


def adversarial(setup: Setup, network: str, *, conditional: bool) -> Case:
    """An adversarial link 8 -> 4.

    Two calls of the teacher. The discriminator's turn: the student forward, the discriminator forward and backward on real and fake samples, where it
    is conditional together with x_t, once for both. The student's: its forward, the features of x_t, which changed with the discriminator, forward
    alone; the fake through the frozen discriminator and back, the student backward.

    The student's pass of the discriminator's turn could be spared by keeping that of its own turn, whose weights are the same: with its activations,
    of every part of an accumulated batch, through the discriminator's turn. That memory is what the pass is the price of.
    """
    config = LinkConfig(
        **setup.training, teacher_steps=8, steps=4, optimizer=OptimizerConfig(learning_rate=1e-6, betas=(0.0, 0.99)),
        adversarial=AdversarialConfig(conditional=conditional),
    )  # fmt: skip
    assert config.adversarial is not None
    denoiser = a_student(setup, network)
    student = Student.of_unet(denoiser)
    discriminator = unet_discriminator(setup.teacher.unet, setup.latents.latent_shape, conditional=conditional, seed=0)
    ready_for_training(discriminator.encoder.unet, gradient_checkpointing=setup.training["gradient_checkpointing"])
    method = AdversarialLink(config, teacher=setup.teacher, student=student, discriminator=discriminator)
    batch, size = a_batch(setup), config.batch_size
    for_judge = batch.repeated(3 if conditional else 2)
    own, judges = list(student.parameters.values()), list(discriminator.parameters())
    steps_of_student, steps_of_judge = optimizer(own, config.optimizer), optimizer(judges, config.adversarial.optimizer)

    def encode(asked: Batch) -> Tensor:
        return discriminator.encoder(asked.x, asked.t, asked.conditioning)

    def bare() -> None:
        require_gradients(judges, True)
        require_gradients(own, False)
        with torch.no_grad(), setup.autocast():
            for _ in range(2):
                call(setup.teacher.unet, batch)
            fake = call(denoiser.unet, batch).float()
        with setup.autocast():
            seen = encode(replace(for_judge, x=torch.cat([batch.x, fake, *([batch.x] if conditional else [])])))
            if conditional:
                pairs, given = seen[: 2 * size], seen[2 * size :]
                seen = torch.cat([pairs, given.repeat(2, 1, 1, 1)], dim=1)
            real_logits, fake_logits = discriminator.head(seen).float().chunk(2)
            loss = (softplus(-real_logits) + softplus(fake_logits)).mean()
        descend(loss, steps_of_judge)

        require_gradients(judges, False)
        require_gradients(own, True)
        with setup.autocast():
            fake = call(denoiser.unet, batch).float()
            seen = encode(replace(batch, x=fake))
            if conditional:
                with torch.no_grad():
                    given = encode(batch)
                seen = torch.cat([seen, given], dim=1)
            loss = softplus(-discriminator.head(seen).float()).mean()
        descend(loss, steps_of_student)

    return Case(method, config, bare, reader(setup.latents))


def lcm(setup: Setup) -> Case:
    """Consistency distillation of a LoRA: a guided call of the teacher, the student there without gradient, its own forward and backward."""
    config = LcmConfig(**setup.training, lora_rank=setup.lora_rank, lora_alpha=setup.lora_rank, max_grad_norm=1.0)
    denoiser = a_student(setup, "lora")
    student = Student.of_unet(denoiser)
    layers = lora_layers(denoiser.unet)
    method = ConsistencyDistillation(
        config,
        teacher=denoiser,
        student=student,
        unconditional=setup.latents.unconditional(1),
        as_teacher=lambda: without_lora(layers),
    )
    batch, target = a_batch(setup), a_batch(setup).x
    guided = batch.repeated(2)
    steps_of_student = optimizer(list(student.parameters.values()), config.optimizer)

    def bare() -> None:
        with torch.no_grad(), setup.autocast():
            with without_lora(layers):
                call(denoiser.unet, guided)
            call(denoiser.unet, batch)
        with setup.autocast():
            loss = mse_loss(call(denoiser.unet, batch).float(), target)
        descend(loss, steps_of_student)

    return Case(method, config, bare, reader(setup.latents))


def dmd(setup: Setup, network: str, *, gan: bool, fake_updates: int) -> Case:
    """Distribution matching without regression, of one step.

    The fake score's turns: the student without gradient, the fake score forward and backward on noised outputs; with a GAN its encoder and the head
    on noised real and fake samples too, apart, as each may be another number of samples. The student's: its forward, the fake score and the guided
    teacher without gradient; with a GAN its outputs through the frozen encoder and head; backward.
    """
    config = DmdConfig(
        **setup.training, network=network, lora_rank=setup.lora_rank, lora_alpha=setup.lora_rank, regression=None, warmup_steps=0,
        fake_updates=fake_updates, gan=GanConfig() if gan else None, optimizer=OptimizerConfig(learning_rate=1e-6),
    )  # fmt: skip
    denoiser = a_student(setup, network)
    student, layers = Student.of_unet(denoiser), lora_layers(denoiser.unet)
    teacher = setup.teacher if network == "unet" else denoiser
    unet = a_student(setup, "unet").unet
    fake = FakeScore(unet, unet_head(unet, setup.latents.latent_shape, seed=0) if gan else None)
    head = dict(fake.head.named_parameters()) if fake.head is not None else {}
    of_fake = FakeDenoiser(fake, setup.teacher.schedule, setup.teacher.prediction)
    method = DistributionMatching(
        config,
        teacher=teacher,
        student=student,
        fake=Student(of_fake, dict(unet.named_parameters()), unet.state_dict()),
        unconditional=setup.latents.unconditional(1),
        judge=BottleneckJudge(fake, head, head) if gan else None,
        as_teacher=lambda: without_lora(layers),
    )
    batch, target = a_batch(setup), a_batch(setup).x
    guided = batch.repeated(2)
    own, follower = list(student.parameters.values()), list(fake.parameters())
    steps_of_student, steps_of_fake = optimizer(own, config.optimizer), optimizer(follower, config.fake)

    def judged(x: Tensor) -> Tensor:
        assert fake.head is not None
        logits: Tensor = fake.head(encoder_features(unet, x, batch.t, batch.conditioning))
        return logits.float()

    def bare() -> None:
        for _ in range(fake_updates):
            require_gradients(follower, True)
            require_gradients(own, False)
            with torch.no_grad(), setup.autocast():
                x = call(denoiser.unet, batch).float()
            with setup.autocast():
                loss = mse_loss(call(unet, replace(batch, x=x)).float(), target)
                if gan:
                    loss = loss + (softplus(-judged(batch.x)) + softplus(judged(x))).mean()
            descend(loss, steps_of_fake)

        require_gradients(follower, False)
        require_gradients(own, True)
        with setup.autocast():
            x = call(denoiser.unet, batch).float()
            with torch.no_grad():
                x_fake = call(unet, replace(batch, x=x)).float()
                with without_lora(layers):
                    x_real = call(teacher.unet, replace(guided, x=x.repeat(2, 1, 1, 1))).float()[: len(x)]
            loss = mse_loss(x, x.detach() + x_real - x_fake)
            if gan:
                loss = loss + softplus(-judged(x)).mean()
        descend(loss, steps_of_student)

    return Case(method, config, bare, batch_reader(setup.latents, None))


CASES: Mapping[str, Mapping[str, Callable[[Setup], Case]]] = {
    "lightning_mse": {
        "128 -> 32, guided": lambda setup: mse(setup, "unet", 128, 32, guidance_scale=6.0),
        "8 -> 4": lambda setup: mse(setup, "unet", 8, 4),
        "8 -> 4, LoRA": lambda setup: mse(setup, "lora", 8, 4),
    },
    "lightning_adversarial": {
        "conditional": lambda setup: adversarial(setup, "unet", conditional=True),
        "unconditional": lambda setup: adversarial(setup, "unet", conditional=False),
        "conditional, LoRA": lambda setup: adversarial(setup, "lora", conditional=True),
    },
    "lcm": {"LoRA": lcm},
    "dmd": {
        "one update of the fake score": lambda setup: dmd(setup, "unet", gan=False, fake_updates=1),
        "GAN, two updates": lambda setup: dmd(setup, "unet", gan=True, fake_updates=2),
        "LoRA": lambda setup: dmd(setup, "lora", gan=False, fake_updates=1),
    },
}


def measure(make: Callable[[Setup], Case], setup: Setup) -> dict[str, float]:
    """Figures of one case."""
    case = make(setup)
    watch = Interleaved(case.bare, setup.device)
    run(case, setup, watch)
    return watch.figures()


def run(case: Case, setup: Setup, watch: Progress) -> None:
    """Train until the watch has seen enough."""
    with setup.workspace(watch) as workspace, suppress(Enough):
        train(case.method, case.read, len(setup.latents), case.config, workspace, seed=0)


def on_the_card(make: Callable[[Setup], Case], setup: Setup) -> dict[str, float]:
    """Peak memory of the loop alone, its rate, and the share of the device's matrix rate, recomputed activations counted as work."""
    case = make(setup)
    cuda = setup.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(setup.device)
    run(case, setup, Interleaved(lambda: None, setup.device))
    peak = torch.cuda.max_memory_allocated(setup.device) / 1e9 if cuda else float("nan")
    with FlopCounterMode(display=False) as counted:
        case.bare()
    return {"peak_memory_gb": peak, "teraflop": counted.get_total_flops() / 1e12}


def main() -> None:
    """Print a table for people, and the figures as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each case")
    parser.add_argument("--only", choices=[*CASES], help="one method")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sdxl", action="store_true", help="SDXL's UNet, random weights, and the figures of a card")
    parser.add_argument("--small", action="store_true", help="with --sdxl: its shape with few channels, to try the code without a card")
    parser.add_argument("--batch-size", type=int, default=4, help="with --sdxl")
    given = parser.parse_args()
    worst: dict[str, float] = {}
    card: dict[str, float] = {}
    device, steps = torch.device(given.device), given.steps + WARM_UP + 2
    rate = matrix_rate(device, 512 if given.small else 8192) if given.sdxl else 0.0
    for method, cases in CASES.items():
        if given.only not in (None, method):
            continue
        for name, make in cases.items():
            with tempfile.TemporaryDirectory(prefix="train-step-") as place:
                folder = Path(place)
                setup = (
                    Setup.sdxl(folder, steps, device, batch_size=given.batch_size, small=given.small)
                    if given.sdxl
                    else Setup.tiny(folder, steps)
                )
                found = measure(make, setup)
                if given.sdxl:
                    found |= on_the_card(make, setup)
                    found["samples_per_second"] = 1e3 * given.batch_size / found["loop_ms"]
                    found["of_matrix_rate"] = found["teraflop"] / (found["loop_ms"] / 1e3) / rate
                    card |= {f"{method}, {name}, {key}": round(value, 3) for key, value in found.items()}
            worst[method] = max(found["ratio"], worst.get(method, 0.0))
            sys.stdout.write(f"{method + ', ' + name:44}" + "".join(f"{key} {value:<10.4g}" for key, value in found.items()) + "\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps({method: round(ratio, 3) for method, ratio in worst.items()} | card) + "\n")


if __name__ == "__main__":
    main()
