"""LPIPS beside the package `lpips` on drawings and on a photograph, and the distance through decoders."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from infra.demo.emoji import captions, render
from infra.torchvision_ops import define_missing_ops
from schemas.dmd import RegressionConfig
from schemas.errors import BadInput
from stages.dmd.decoding import DecodedDistance, decoder, tiny_decoder
from stages.perceptual import build
from tests import tiny_pipelines


@cache
def packages_own() -> Any:
    """The package's distance. Its VGG is random, for trained weights cannot be had without a network; its heads are the trained ones."""
    define_missing_ops()
    import lpips

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


def saved_vgg(folder: Path) -> Path:
    """The same VGG in a file, named as torchvision names its weights."""
    numbered = {}
    for part in packages_own().net.children():
        for name, tensor in part.state_dict().items():
            numbered[f"features.{name}"] = tensor.contiguous()
    save_file(numbered, folder / "vgg.safetensors")
    torch.save(numbered, folder / "vgg.pth")
    return folder / "vgg.safetensors"


def drawings() -> tuple[Tensor, Tensor]:
    """Drawings of OpenMoji, each (4, 3, 64, 64) in -1..1: four, and four others."""
    pictures = [Image.open(io.BytesIO(render(emoji, 64, number))).convert("RGB") for number, emoji in enumerate(captions(0, 8))]
    tensors = torch.stack([torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1 for picture in pictures])
    return tensors[:4], tensors[4:]


def photographs() -> tuple[Tensor, Tensor]:
    """Parts of the photograph that matplotlib carries, each (4, 3, 128, 128) in -1..1: as they are, and enlarged from half the size as a JPEG."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as file:
        whole = file.convert("RGB")
    parts = [whole.crop((left, upper, left + 128, upper + 128)) for left in (60, 250) for upper in (40, 300)]
    spoilt = []
    for part in parts:
        kept = io.BytesIO()
        part.resize((64, 64)).save(kept, "JPEG", quality=30)
        spoilt.append(Image.open(kept).resize((128, 128)))
    sharp, blurred = (
        torch.stack([torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1) / 127.5 - 1 for part in those]) for those in (parts, spoilt)
    )
    return sharp, blurred


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("pictures", [drawings, photographs])
def test_it_is_the_packages_distance(tmp_path: Path, suffix: str, pictures: Callable[[], tuple[Tensor, Tensor]]) -> None:
    ours = build(RegressionConfig(vgg="given"), saved_vgg(tmp_path).with_suffix(suffix))
    x, y = pictures()
    with torch.no_grad():
        expected = packages_own()(x, y).flatten()
        assert float(expected.min()) > 1e-3, "nothing is compared"
        torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours(x, x), torch.zeros(4))


def test_pictures_are_resized_where_the_recipe_says_so(tmp_path: Path) -> None:
    ours = build(RegressionConfig(vgg="given", size_px=96), saved_vgg(tmp_path))
    x, y = (torch.nn.functional.interpolate(part, (96, 96), mode="bilinear") for part in drawings())
    with torch.no_grad():
        torch.testing.assert_close(ours(*drawings()), packages_own()(x, y).flatten(), rtol=1e-4, atol=1e-6)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    for name, message in (("other.safetensors", "not VGG-16's weights"), ("gone.pth", "cannot be read")):
        with pytest.raises(BadInput, match=rf"dmd.regression.vgg .*{name}: {message}"):
            build(RegressionConfig(vgg="given"), tmp_path / name)


def test_the_packaged_network_tells_noise_from_drawings() -> None:
    ours = build(RegressionConfig(distance="lpips-efficientnet-lite0"))
    x, _ = drawings()
    random = torch.Generator().manual_seed(0)
    little, much = (x + amount * torch.randn(x.shape, generator=random) for amount in (0.05, 0.5))
    with torch.no_grad():
        assert torch.equal(ours(x, x), torch.zeros(4))
        assert bool((ours(x, little) < ours(x, much)).all())


def test_the_distance_goes_through_either_decoder_with_a_gradient(tmp_path: Path) -> None:
    define_missing_ops()
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    tiny.save_pretrained(tmp_path / "tiny", safe_serialization=True)
    vae = tiny_pipelines.build("sdxl").vae
    distance = build(RegressionConfig(distance="lpips-efficientnet-lite0", size_px=64))
    random = torch.Generator().manual_seed(0)
    x, reference = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(2))
    for network in (vae, tiny_decoder(tmp_path / "tiny", 4)):
        whole = DecodedDistance(decoder(network), distance)
        latents = x.clone().requires_grad_(True)
        whole(latents, reference).backward()
        assert latents.grad is not None and float(latents.grad.abs().max()) > 0
        assert all(parameter.grad is None for parameter in network.parameters())
        assert float(whole(reference, reference)) == 0
    with torch.no_grad():
        decode = decoder(vae)
        torch.testing.assert_close(decode(x), vae.decode(x / 0.13025).sample)
    with pytest.raises(BadInput, match="decodes latents of 4 channels; expected the teacher's 16"):
        tiny_decoder(tmp_path / "tiny", 16)
    with pytest.raises(BadInput, match="cannot be loaded"):
        tiny_decoder(tmp_path, 4)
