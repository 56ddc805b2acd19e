"""Drawing: from numbers of pairs and their text to noise and what the deterministic teacher makes of it."""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from schemas.errors import RunFailed
from schemas.manifest import Pairs
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.pipeline import TeacherPipeline
from stages.diffusion.prediction import PredictionType
from stages.diffusion.sampling import draw_noise, image_generator, make_scheduler, sample
from stages.diffusion.schedule import NoiseSchedule
from stages.training.randomness import derive_seed, deterministic_kernels

logger = logging.getLogger(__name__)


def pair_noise(seed: int, pairs: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Noise (B, *shape) float32 of unit variance on the CPU, each a function of (seed, the pair's number) alone.

    Not that of the same seed's evaluation: a student would be measured on the very noise that it was taught.
    """
    own = derive_seed(seed, "pairs")
    return draw_noise([image_generator(own, pair) for pair in pairs], shape)


def time_ids_of(content: Pairs) -> Tensor | None:
    """(1, 6) float32, what an SDXL-type teacher is told of size and crop; else None."""
    return None if content.time_ids is None else torch.tensor([content.time_ids], dtype=torch.float32)


class Drawer:
    """The teacher's UNet on one device, drawing as `content` says.

    Noise depends on (seed, pair) alone, but no network gives the same last bits in batches of different sizes. So an output is defined together with
    those it is drawn with: shard s holds the pairs from s * shard_pairs on, which are drawn from the shard's beginning in batches of `batch_size`.
    Whoever makes a shard, whenever, on the same kind of device, makes the same bits.
    """

    def __init__(self, teacher: Path, content: Pairs, device: str) -> None:
        """`teacher` is a pipeline folder, of which the UNet alone is loaded."""
        self.content = content
        pipeline = TeacherPipeline.load(teacher, device, only=frozenset({"unet"}))
        pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.device = pipeline.device
        self.scheduler = make_scheduler(content.sampler, pipeline.scheduler_config, pipeline.prediction.name)
        self.denoiser: Denoiser = pipeline.denoiser()
        if content.precision == "bfloat16":
            self.denoiser = LowPrecision(self.denoiser, self.device)

    def draw(self, pairs: Sequence[int], texts: Conditioning, unconditional: Conditioning) -> tuple[Tensor, Tensor]:
        """Noise and outputs (B, C, h, w), float32, on the CPU.

        `texts` has the B captions, `unconditional` (1) no text; both without time ids. Raises `RunFailed` naming a pair that is not finite, and
        where memory does not suffice.
        """
        noise = pair_noise(self.content.seed, pairs, self.content.latent_shape)
        outputs = self._attempt(noise, texts, unconditional, self.content.steps)
        if outputs is None:
            raise RunFailed(
                f"pairs: {len(pairs)} together do not fit the memory of {self.device} any more; "
                f"expected pairs.batch_size of at most {max(1, len(pairs) // 2)}, or other work to leave the device"
            )
        for pair, output in zip(pairs, outputs, strict=True):
            if not torch.isfinite(output).all():
                raise RunFailed(f"pairs: the output of pair {pair} is not finite; expected pairs.precision float32, or a sound teacher")
        return noise, outputs.clone()  # outside inference mode, for whoever trains on them

    def fitting(self, tried: int, unconditional: Conditioning) -> int:
        """Pairs that fit memory together: `tried`, halved until one step of so many does. Raises `RunFailed` when one pair does not fit."""
        batch = tried
        while batch:
            if self._attempt(torch.zeros(batch, *self.content.latent_shape), unconditional.expand(batch), unconditional, 1) is not None:
                return batch
            logger.warning("out of memory with %d pairs at once", batch)
            batch //= 2
        raise RunFailed(f"pairs: one pair does not fit the memory of {self.device}: expected pairs.precision bfloat16, or a larger device")

    @torch.inference_mode()
    def _attempt(self, noise: Tensor, texts: Conditioning, unconditional: Conditioning, steps: int) -> Tensor | None:
        """Outputs on the CPU, or None where memory ran out. Whatever the attempt held is let go before another is made."""
        time_ids = time_ids_of(self.content)
        given, nothing = (text.with_time_ids(time_ids).to(self.device) for text in (texts, unconditional))
        try:
            with deterministic_kernels():
                outputs = sample(
                    self.denoiser,
                    noise.to(self.device),
                    given,
                    scheduler=self.scheduler,
                    steps=steps,
                    guidance_scale=self.content.guidance_scale,
                    unconditional=nothing,
                )
            return outputs.float().cpu().contiguous()
        except torch.OutOfMemoryError:
            pass  # what the exception holds is let go with it
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where there is no CUDA
        return None


class LowPrecision:
    """A denoiser that computes in bfloat16 by autocast, and says in float32 what it found: what is done with it is done in float32."""

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        self.denoiser, self.device = denoiser, device

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's."""
        return self.denoiser.schedule

    @property
    def prediction(self) -> PredictionType:
        """The denoiser's."""
        return self.denoiser.prediction

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output (B, C, h, w) float32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.denoiser(x_t, timesteps, conditioning).float()
