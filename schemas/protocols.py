"""Settings of published evaluations, by name: what `evaluate.protocol` fills in where the recipe says nothing else.

Prompts and real images of COCO are not part of them: `evaluate.prompts` names the file of captions. Figures of different protocols, and of different
papers under one, are not comparable.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

MetricGroup = Literal["fid", "patch_fid", "kid", "precision_recall", "density_coverage", "clip_score", "lpips", "diversity"]
"""What is computed together."""

Protocol = Literal["lightning-coco10k", "dmd-coco30k", "dmd2-coco10k", "tiny"]

PATCH_PX: Final = 299
"""Side of the patch FID's crop: Inception's input, so that nothing is resized."""

_CLIP_G: Final = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"

PROTOCOLS: Final[Mapping[Protocol, Mapping[str, Any]]] = {
    # SDXL-Lightning, arXiv 2402.13929, 4.3: one image each of the first 10K prompts at 1024 px; FID of the whole and of the patch. Its CLIP model is
    # not published: OpenAI's large one is this project's choice.
    "lightning-coco10k": {
        "prompt_count": 10_000,
        "images_per_prompt": 1,
        "metrics": ("fid", "patch_fid", "clip_score"),
        "extractor": "inception",
        "clip_model": "openai/clip-vit-large-patch14",
    },
    # DMD, arXiv 2311.18828: 30K prompts of COCO 2014, 512 px brought to 256 by Lanczos; OpenCLIP-G/14.
    "dmd-coco30k": {
        "prompt_count": 30_000,
        "images_per_prompt": 1,
        "metrics": ("fid", "clip_score"),
        "extractor": "inception",
        "resize_px": 256,
        "clip_model": _CLIP_G,
    },
    # DMD2, arXiv 2405.14867: centre square, Lanczos to 512; the patch from the picture as it is; CLIP with its authors' prefix.
    "dmd2-coco10k": {
        "prompt_count": 10_000,
        "images_per_prompt": 1,
        "metrics": ("fid", "patch_fid", "clip_score"),
        "extractor": "inception",
        "resize_px": 512,
        "clip_model": _CLIP_G,
        "clip_prefix": "A photo depicts ",
    },
    # Every metric that needs no weights from elsewhere and one picture of a prompt, for pictures of 64 px: ours, comparable with nothing.
    "tiny": {
        "prompt_count": 96,
        "metrics": ("fid", "patch_fid", "kid", "precision_recall", "density_coverage", "lpips"),
        "extractor": "efficientnet-lite0",
        "patch_px": 32,
        "perceptual": {"distance": "lpips-efficientnet-lite0"},
    },
}
