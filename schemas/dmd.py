"""Recipe section of `dmd`: distribution matching distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

from collections.abc import Iterator
from typing import Annotated, Literal

from schemas.base import Field, Mistake, Model, NotIdentity
from schemas.lightning import TRAIN_TIMESTEPS, trailing_timesteps
from schemas.training import OptimizerConfig, PositiveInt, StudentTraining
from schemas.watching import unknown_steps

Weight = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RegressionConfig(Model):
    """The generator's output beside the teacher's on the same noise (DMD 3.3)."""

    weight: Weight = 0.25
    """lambda. DMD 3.4; .1 to 1 at guidance 8."""
    distance: Literal["lpips", "lpips-efficientnet-lite0", "l2"] = "lpips"
    """`lpips`: of decoded pictures, with VGG-16 (arXiv 1801.03924). `lpips-efficientnet-lite0`: the same form, its heads all one, with the network
    that a package carries. `l2`: mean squared error of latents."""
    vgg: Annotated[str | None, NotIdentity] = None
    """File with torchvision's VGG-16 weights (.pth or .safetensors), for `lpips`. Its content is part of the identity. null: torchvision downloads
    them."""
    decoder: Annotated[str | None, NotIdentity] = None
    """Folder of a tiny decoder (diffusers' `AutoencoderTiny`) to decode with, as DMD does first. Its content is part of the identity. null: the
    teacher's VAE."""
    size_px: PositiveInt | None = None
    """Side that pictures are resized to, bilinearly, before they are compared; 224 in DMD on CIFAR-10. null: as they are decoded."""


class GanConfig(Model):
    """A discriminator on the fake score's bottleneck, against the encoded pictures (DMD2 4.3)."""

    generator_weight: Weight = 5e-3
    """Of the generator's loss. The authors' SDXL settings."""
    discriminator_weight: Weight = 1e-2
    """Of the discriminator's, beside the fake score's denoising loss. The authors' SDXL settings."""


class WarmUpConfig(Model):
    """Regression alone, on latents of pairs, before the distribution is matched (DMD2, one-step SDXL)."""

    training_steps: PositiveInt = 2000
    learning_rate: Weight = 1e-5


class DmdConfig(StudentTraining):
    """`dmd`: a student whose outputs are distributed as the teacher's. The defaults are DMD's for SD1.5 at guidance 3."""

    network: Literal["unet", "lora"] = "unet"
    lora_rank: PositiveInt = 64
    lora_alpha: Weight = 64
    start: Annotated[str | None, NotIdentity] = None
    """Student to go on from, of the same teacher, network, rank and alpha: a folder with `unet/` or `pytorch_lora_weights.safetensors`, such as a
    variant of a published model. Its content is part of the identity. null: the teacher. So guidance 8 is trained in stages (DMD, appendix): lambda
    .1, .5, 1, .25, through a tiny decoder first. The fake score begins as the teacher again."""
    fake_network: Literal["unet", "lora"] = "unet"
    """The fake score: a copy of the teacher that is trained whole, or an adapter on the teacher's own network, of the student's rank and alpha. With
    `network: lora` teacher, student and fake score are one network under two adapters or none."""
    steps: PositiveInt = 1
    """Calls of the student. Several: DMD2's student, on the trailing grid, fresh noise between two calls; it is trained on its own outputs (backward
    simulation, DMD2 4.5)."""
    timestep: Annotated[int, Field(ge=0, lt=TRAIN_TIMESTEPS)] = TRAIN_TIMESTEPS - 1
    """The fixed timestep that a one-step student is told, its input pure noise. T - 1 in DMD 3.1; 399 in DMD2 for SDXL."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """Imagen-convention scale uncond + s (cond - uncond) of the real score; the fake score is not guided."""
    noise_range: tuple[Share, Share] = (0.02, 0.98)
    """Lowest and highest timestep at which distributions are compared, as shares of T. DMD 3.2."""
    matching: bool = True
    """Whether distributions are matched. false: the ablation of both papers, where regression, or the GAN, is left alone."""
    fake_updates: PositiveInt = 1
    """Updates of the fake score for each of the student, each on a batch of its own. 1 in DMD, 5 in DMD2 (4.2)."""
    regression: RegressionConfig | None = RegressionConfig()
    """The second loss of DMD, on the artifact of `pairs`. null: none, as in DMD2."""
    gan: GanConfig | None = None
    """null: none."""
    warm_up: WarmUpConfig | None = None
    """null: none."""
    teacher_precision: Literal["bfloat16"] | None = None
    """Type that the teacher's weights are held and computed in. null: float32, computed in `precision`. Its outputs are taken to float32 before any
    arithmetic."""
    training_steps: PositiveInt = 20_000
    batch_size: PositiveInt = 1152
    """Samples of one update. With `regression` each is a pair, and as many outputs on fresh noise join its own in the matching of distributions: 2304
    and 1152 in DMD, appendix."""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    max_grad_norm: Weight | None = 10.0
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", learning_rate=1e-5, weight_decay=1e-2)
    """DMD, appendix. DMD2 for SDXL: 5e-7, a LoRA 5e-5."""
    fake_optimizer: OptimizerConfig | None = None
    """Of the fake score and the discriminator's head. null: `optimizer`."""

    @property
    def follows(self) -> bool:
        """Whether a fake score follows the student's outputs on fresh noise."""
        return self.matching or self.gan is not None

    @property
    def reads_pairs(self) -> bool:
        """Whether it needs the teacher's noise-output pairs."""
        return self.regression is not None or self.warm_up is not None

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The student's timesteps, descending."""
        return (self.timestep,) if self.steps == 1 else trailing_timesteps(self.steps)

    @property
    def fake(self) -> OptimizerConfig:
        """The fake score's optimiser."""
        return self.fake_optimizer or self.optimizer


def _several_steps_have_their_grid(config: DmdConfig) -> Iterator[Mistake]:
    if TRAIN_TIMESTEPS % config.steps:
        yield ("steps",), config.steps, f"expected a divisor of {TRAIN_TIMESTEPS}, such as 1, 2, 4 or 8"
    if config.steps == 1:
        return
    if config.timestep != TRAIN_TIMESTEPS - 1:
        yield ("timestep",), config.timestep, f"a student of {config.steps} steps goes through the trailing grid; expected nothing here"
    for name in ("regression", "warm_up"):
        if getattr(config, name) is not None:
            expected = f"pairs tell where noise ends, which a student of {config.steps} steps does not say in one call: expected null here"
            yield (name,), getattr(config, name).model_dump(), expected


def _warm_up_outlasts_the_rates(config: DmdConfig) -> Iterator[Mistake]:
    if config.warm_up is not None and config.warm_up.training_steps <= config.warmup_steps:
        expected = f"it would end inside its rate's warm-up: expected more than warmup_steps = {config.warmup_steps}"
        yield ("warm_up", "training_steps"), config.warm_up.training_steps, expected


def _something_is_learnt(config: DmdConfig) -> Iterator[Mistake]:
    if not config.follows and config.regression is None:
        yield ("matching",), False, "no loss is left to learn from: expected true, or regression or gan beside it"


def _noise_range_is_open(config: DmdConfig) -> Iterator[Mistake]:
    if config.noise_range[0] >= config.noise_range[1]:
        yield ("noise_range",), list(config.noise_range), "expected the lowest share before the highest, such as [0.02, 0.98]"


def _a_lora_shares_its_teacher(config: DmdConfig) -> Iterator[Mistake]:
    if config.teacher_precision is None:
        return
    for name in ("network", "fake_network"):
        if getattr(config, name) == "lora":
            expected = f"a LoRA is put on the teacher's own network, which stays float32: expected {name}: unet, or null here"
            yield ("teacher_precision",), config.teacher_precision, expected
            return


def _a_shared_network_is_whole(config: DmdConfig) -> Iterator[Mistake]:
    if config.fake_network == "lora" and config.sharding == "full":
        expected = "the fake score is called by parts of the network that it shares: expected none or optimizer here, or fake_network: unet"
        yield ("sharding",), config.sharding, expected


def _looks_are_at_its_steps(config: DmdConfig) -> Iterator[Mistake]:
    yield from unknown_steps(config.watch, (config.steps,))


def _backbones_have_a_use(config: RegressionConfig) -> Iterator[Mistake]:
    unused = {"lpips": (), "lpips-efficientnet-lite0": ("vgg",), "l2": ("vgg", "decoder", "size_px")}[config.distance]
    for name in unused:
        if getattr(config, name) is not None:
            yield (name,), getattr(config, name), f"distance {config.distance} has no use for it: expected null"


RegressionConfig.cross_checks = (_backbones_have_a_use,)
DmdConfig.cross_checks = (
    _several_steps_have_their_grid,
    _warm_up_outlasts_the_rates,
    _something_is_learnt,
    _noise_range_is_open,
    _a_lora_shares_its_teacher,
    _looks_are_at_its_steps,
    _a_shared_network_is_whole,
)
