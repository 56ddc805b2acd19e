"""A teacher: any diffusers pipeline of the SD1.5, SD2.x or SDXL type, with its own rules for text, latents and time ids."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import diffusers
import torch
import transformers
from torch import Tensor

from schemas.errors import BadInput
from stages.diffusion.conditioning import Conditioning
from stages.diffusion.denoiser import UNetDenoiser
from stages.diffusion.facts import TeacherFacts, components, inspect, read_config
from stages.diffusion.prediction import prediction_type
from stages.diffusion.schedule import NoiseSchedule

__all__ = ["TeacherFacts", "TeacherPipeline", "inspect"]

Part = Literal["unet", "vae", "text"]
"""Networks of a pipeline; `text` is one or two encoders."""
PARTS: frozenset[Part] = frozenset({"unet", "vae", "text"})

# Captions of the web are often longer than a tokenizer's 77: that they are cut is how such teachers were trained, and no news a line each.
logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)

_DECODED_PIXELS = 2**20
"""Pixels decoded at once: the VAE of SDXL in float32 needs about 6 GB for one image of 1024 x 1024."""


class TeacherPipeline:
    """The parts of a loaded pipeline, in evaluation mode, behind the few calls that stages need."""

    def __init__(self, pipeline: Any, facts: TeacherFacts, vae_dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.facts = facts
        self._vae_dtype = vae_dtype
        self.schedule = NoiseSchedule.from_scheduler_config(facts.scheduler_config)
        """Noise schedule of the UNet."""
        self.prediction = prediction_type(facts.prediction_type)
        """What the UNet's output means."""

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        only: frozenset[Part] = PARTS,
    ) -> Self:
        """Load a pipeline folder, or `only` some of its networks; nothing is downloaded and no code of the folder is run.

        The VAE is of `vae_dtype`; where that is None of `dtype`, or of float32 where `dtype` is float16 and the VAE's configuration says
        `force_upcast` (SDXL's overflows in half precision). Raises `BadInput` for what
        `inspect` refuses, and for weights that do not fill the configured networks.
        """
        facts = inspect(folder)
        parts: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
        if "text_encoder_2" not in components(folder):
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        parts |= {name: None for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in components(folder)}
        if "unet" in only:
            parts["unet"] = _load(diffusers.UNet2DConditionModel, folder / "unet", dtype)
        force_upcast = read_config(folder, "vae").get("force_upcast", True)
        vae_dtype = vae_dtype or (torch.float32 if dtype == torch.float16 and force_upcast else dtype)
        if "vae" in only:
            parts["vae"] = _load(diffusers.AutoencoderKL, folder / "vae", vae_dtype)
        if "text" in only:
            parts["text_encoder"] = _load(transformers.CLIPTextModel, folder / "text_encoder", dtype)
        if "text" in only and "text_encoder_2" in components(folder):
            parts["text_encoder_2"] = _load(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2", dtype)
        pipeline = getattr(diffusers, facts.architecture).from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), facts, vae_dtype)

    @property
    def architecture(self) -> str:
        """The pipeline class of diffusers."""
        return self.facts.architecture

    @property
    def unet(self) -> Any:
        """UNet2DConditionModel."""
        return self._pipeline.unet

    @property
    def vae(self) -> Any:
        """AutoencoderKL."""
        return self._pipeline.vae

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """One or two CLIP text models, in the order of concatenation."""
        return tuple(encoder for name in ("text_encoder", "text_encoder_2") if (encoder := getattr(self._pipeline, name, None)) is not None)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """One or two CLIP tokenizers."""
        return tuple(tokenizer for name in ("tokenizer", "tokenizer_2") if (tokenizer := getattr(self._pipeline, name, None)) is not None)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The complete configuration of the folder's scheduler."""
        return dict(self._pipeline.scheduler.config)

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's mean times this."""
        return self.facts.scaling_factor

    @property
    def resolution(self) -> int:
        """Pixels on a side that the UNet was trained for."""
        return self.facts.resolution

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) at `resolution`."""
        return self.facts.latent_shape

    @property
    def downscale(self) -> int:
        """Pixels on a side of one latent."""
        return self.resolution // self.latent_shape[1]

    @property
    def micro_conditioned(self) -> bool:
        """Whether the UNet takes pooled text and time ids (SDXL)."""
        return self.architecture == "StableDiffusionXLPipeline"  # `inspect` has checked that the UNet agrees

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self._pipeline.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the UNet and the text encoders."""
        dtype: torch.dtype = (self.unet or self.text_encoders[0]).dtype
        return dtype

    def denoiser(self) -> UNetDenoiser:
        """The UNet with its schedule and prediction type."""
        return UNetDenoiser(self.unet, self.schedule, self.prediction)

    def diffusers(self) -> Any:
        """The plain diffusers pipeline, sharing all networks with this object (so a VAE held in float32 stays so)."""
        return self._pipeline

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning (B, L, F) and, for SDXL, pooled (B, P), without time ids.

        The pipeline's own `encode_prompt` does it: padding to each tokenizer's full length with its own pad token; for SDXL the penultimate hidden
        states of both encoders concatenated and the pooled output of the second (SDXL, arXiv 2307.01952, 2.1).
        """
        encoded = self._pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(encoded[0], encoded[2] if self.micro_conditioned else None)

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Conditioning (1, L, F) of no text by the pipeline's own rule, without time ids: zeros for SDXL (force_zeros_for_empty_prompt), else ""."""
        encoded = self._pipeline.encode_prompt([""], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True)
        return Conditioning(encoded[1], encoded[3] if self.micro_conditioned else None)

    def time_ids(
        self,
        original_hw: tuple[int, int] | None = None,
        crop_tl: tuple[int, int] = (0, 0),
        target_hw: tuple[int, int] | None = None,
        batch: int = 1,
    ) -> Tensor | None:
        """(B, 6) float32 in pixels for an SDXL-type UNet, else None. Sizes default to the teacher's resolution, as in the pipeline's call."""
        if not self.micro_conditioned:
            return None
        native = (self.resolution, self.resolution)
        ids = torch.tensor([[*(original_hw or native), *crop_tl, *(target_hw or native)]], dtype=torch.float32, device=self.device)
        return ids.repeat(batch, 1)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts at the teacher's own resolution, time ids included."""
        return self.encode_prompts(prompts).with_time_ids(self.time_ids(batch=len(prompts)))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, at_once: int | None = None) -> Tensor:
        """Latents (B, C, h, w) float32 of pixels (B, 3, H, W) in -1..1: the posterior's mean times the scaling factor, without randomness.

        `at_once` pictures go through the VAE together; None: 2**20 pixels.

        Raises `BadInput` when H or W is no multiple of the VAE's downscale factor.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % self.downscale or pixels.shape[3] % self.downscale:
            raise BadInput(f"pixels {tuple(pixels.shape)}: expected (B, 3, H, W) with H and W multiples of {self.downscale}")
        parts = [
            self.vae.encode(part.to(self.device, self._vae_dtype)).latent_dist.mean.float()
            for part in torch.split(pixels, at_once or _images_at_once(pixels.shape[2] * pixels.shape[3]))
        ]
        return torch.cat(parts) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in 0..1 of scaled latents (B, C, h, w); at most 2**20 pixels are decoded at once."""
        unscaled = latents.to(self.device, self._vae_dtype) / self.vae.config.scaling_factor
        pixels = latents.shape[2] * latents.shape[3] * self.downscale**2
        parts = [self.vae.decode(part, return_dict=False)[0] for part in torch.split(unscaled, _images_at_once(pixels))]
        # as diffusers' image processor: first halved and shifted, then clamped
        return (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1).float()


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet2DConditionModel in `unet/` of a folder, on the CPU, in evaluation mode. Raises `BadInput` for weights that do not fill it."""
    return _load(diffusers.UNet2DConditionModel, folder / "unet", dtype)


def load_controlnet(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The ControlNetModel in a folder, on the CPU, in evaluation mode. Raises `BadInput` for weights that do not fill it."""
    return _load(diffusers.ControlNetModel, folder, dtype)


def _images_at_once(pixels: int) -> int:
    return max(1, _DECODED_PIXELS // pixels)


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load one network, refusing weights that leave a parameter of the configured network at its random start."""
    try:
        network, info = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{folder}: its weights do not fit its configuration ({str(error).strip().splitlines()[0]})") from error
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info.get("mismatched_keys") or ()))
    if missing or mismatched:
        what = f"tensors are missing, such as {missing[0]}" if missing else f"shapes differ: {mismatched[0]}"
        raise BadInput(f"{folder}: its weights do not fit its configuration; {what}")
    # Parameters keep requiring gradients, as plain diffusers leaves them: on CPUs the choice of kernels, and so the last bit, depends on it.
    return network.eval()
