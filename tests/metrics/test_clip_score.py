"""CLIP score against transformers' own arithmetic, on a random CLIP model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from stages.evaluate.metrics import clip_score
from stages.evaluate.metrics.clip_score import ClipScorer
from stages.evaluate.singles import check_singles
from stages.transformers_files import is_model_file
from tests.tiny_pipelines import tiny_clip

PROMPTS = ["the red cat", "a house", "red", "the flag", "cat cat cat cat cat cat cat cat cat cat cat cat cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in PROMPTS]


def test_scores_are_transformers_own(folder: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """logits_per_image is the cosine times exp(logit_scale)."""
    from transformers import CLIPModel, CLIPProcessor

    monkeypatch.setattr(clip_score, "_BATCH", 2)
    found = ClipScorer.load(folder, "cpu", "").scores(pictures, PROMPTS)
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        inputs = processor(images=Image.fromarray(picture), text=[prompt], truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
        assert found[number] == pytest.approx(100 * expected, abs=1e-4)
    assert found.std() > 0.1


def test_prefix_stands_before_every_prompt(folder: Path, pictures: list[np.ndarray]) -> None:
    plain, prefixed = ClipScorer.load(folder, "cpu", ""), ClipScorer.load(folder, "cpu", "the ")
    assert np.array_equal(prefixed.scores(pictures[:1], ["cat"]), plain.scores(pictures[:1], ["the cat"]))
    assert not np.array_equal(prefixed.scores(pictures[:1], ["cat"]), plain.scores(pictures[:1], ["cat"]))


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"lacks config\.json.*model\.safetensors; expected a CLIP model in transformers' layout"):
        ClipScorer.load(tmp_path, "cpu", "")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (("model.safetensors", "open_clip_model.safetensors", "open_clip_config.json"), None),
        (("model.safetensors.index.json", "model-00001-of-00002.safetensors"), None),
        (
            ("open_clip_pytorch_model.safetensors", "open_clip_config.json"),
            "lacks model.safetensors, and holds OpenCLIP's own layout; expected",
        ),
        (("pytorch_model.bin",), "lacks model.safetensors, and holds pickled weights, which are not read; expected a CLIP model"),
    ],
)
def test_what_a_repository_holds_is_told_by_names(weights: tuple[str, ...], expected: str | None, tmp_path: Path) -> None:
    """Before any work, wherever it is: OpenCLIP's own layout is another than transformers', and stands beside it in repositories that have both."""
    names = (*weights, "config.json", "preprocessor_config.json", "tokenizer_config.json")
    for name in names:
        (tmp_path / name).touch()
    config = EvaluateConfig(metrics=("fid", "clip_score"), clip_model=str(tmp_path))
    if expected is None:
        check_singles(config, {"clip_model": f"file://{tmp_path}"})
    else:
        with pytest.raises(BadInput, match=rf"evaluate.clip_model file://.*: {expected}"):
            check_singles(config, {"clip_model": f"file://{tmp_path}"})


def test_other_formats_of_the_weights_are_left_out() -> None:
    assert is_model_file("model.safetensors")
    assert is_model_file("model-00001-of-00002.safetensors")
    assert is_model_file("merges.txt")
    assert not is_model_file("pytorch_model.bin")
    assert not is_model_file("open_clip_model.safetensors")
    assert not is_model_file("onnx/model.safetensors")
