"""Feature networks by config: Inception from a file, any image model of transformers from a folder; random ones here, for none can be had offline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from infra.outside import content_digest
from infra.torchvision_ops import define_missing_ops
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig
from schemas.loading import read_recipe
from schemas.watching import Watch
from stages.evaluate import Inputs, run
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import check_extractor, extractor_spec, open_extractor
from stages.evaluate.inception import INCEPTION_FILE
from stages.plan import make_plan
from tests.distilled import Chain
from tests.schemas.test_loading import GOOD
from tests.tiny_pipelines import tiny_clip
from tests.workspaces import make_workspace, open_store


class _Layers(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, (32, 64))[:, 0].flatten(1)


class _Inception(torch.nn.Module):
    """A TorchScript in the form of clean-fid's: pictures in -1..1 to 2048 features by its member `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.jit.script(_Inception()).save(str(path))
    return path


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    define_missing_ops()
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(3)]


@pytest.mark.parametrize("place", [lambda file: file, lambda file: file.parent])
def test_inception_is_read_from_the_place_that_is_named(inception: Path, pictures: list[np.ndarray], place: Any) -> None:
    check_extractor("inception", {"extractor_weights": str(place(inception))})
    network = extractor_spec("inception").build("cpu", place(inception))
    found = features_of(pictures, network, "cpu")
    assert found.shape == (3, 2048)
    assert found.mean() == pytest.approx(np.mean([picture[..., 0] for picture in pictures]) / 128 - 1, abs=1e-2), "pictures in -1..1"


def test_what_is_not_cleanfids_network_is_one_clear_error_before_work(dino: Path, tmp_path: Path) -> None:
    field = "lightning.watch.extractor_weights"

    def refused(place: Path, told: str) -> None:
        with pytest.raises(BadInput, match=rf"{field}: .*{told}.*expected"):
            check_extractor("inception", {"watch.extractor_weights": str(place)}, "lightning.watch")

    refused(dino, rf"is neither the file {INCEPTION_FILE} nor a folder with it")
    wrong = tmp_path / INCEPTION_FILE
    wrong.write_bytes(b"nothing")
    refused(wrong, "is not clean-fid's network")
    torch.jit.script(_Layers()).save(str(wrong))
    refused(wrong, "is not clean-fid's network")


def test_features_of_an_image_model_are_transformers_own(dino: Path, pictures: list[np.ndarray]) -> None:
    """Pictures of the side of its processor's crop, so that neither resizes: what its own processor and model make of them."""
    from transformers import AutoImageProcessor, AutoModel

    network = open_extractor("transformers", {"extractor_weights": f"file://{dino}"}, dino, "cpu")
    assert (network.side_px, network.title) == (28, "Dinov2Model (transformers), 28 px")
    processor, model = AutoImageProcessor.from_pretrained(dino), AutoModel.from_pretrained(dino)
    shown = processor([Image.fromarray(picture) for picture in pictures], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**shown).pooler_output.numpy()
    assert features_of(pictures, network, "cpu") == pytest.approx(expected, abs=1e-5)
    assert expected.std(axis=0).max() > 1e-3


def test_of_a_clip_model_the_pictures_embedding_is_taken(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    network = extractor_spec("transformers").build("cpu", tiny_clip(tmp_path))
    assert features_of(pictures, network, "cpu").shape == (3, 12), "projected"


def test_a_folder_that_is_no_image_model_is_one_clear_error_before_work(dino: Path, tmp_path: Path) -> None:
    def refused(told: str) -> None:
        with pytest.raises(BadInput, match=rf"evaluate.extractor_weights: .*: {told}"):
            check_extractor("transformers", {"extractor_weights": str(tmp_path)})

    refused("lacks config.json, .*processor_config.json, model.safetensors; expected an image model in transformers' layout")
    for path in dino.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused("lacks model.safetensors, and holds pickled weights")

    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "pytorch_model.bin")
    tensors.pop("layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused("its weights lack layernorm.weight, which would be random")


@pytest.mark.parametrize("section", [EvaluateConfig, Watch])
def test_a_recipe_names_weights_where_they_are_needed(section: type[EvaluateConfig | Watch]) -> None:
    with pytest.raises(ValidationError, match="extractor is transformers: expected a folder, address or hub id"):
        section(extractor="transformers")
    with pytest.raises(ValidationError, match="efficientnet-lite0 has the weights that its package carries: expected null"):
        section(extractor="efficientnet-lite0", extractor_weights="a")


def test_their_content_is_in_the_identity_of_what_reads_them(dino: Path) -> None:
    def identities(digest: str, weights: str | None) -> dict[str, str]:
        names = "" if weights is None else f", extractor_weights: {weights}"
        overrides = [f"lcm.watch={{extractor: inception{names}}}", f"evaluate={{reference: coco{names}}}"]
        plan = make_plan(read_recipe(GOOD, overrides), lambda address: digest if address == weights else "0" * 64)
        return {node.name: plan.identities[node.name] for node in plan.nodes if node.name in ("encode", "lcm", "reference", "evaluate")}

    first, moved, other, none = identities("1" * 64, "a"), identities("1" * 64, "b"), identities("2" * 64, "a"), identities("", None)
    assert first == moved
    for changed in (other, none):
        assert {name for name in first if first[name] != changed[name]} == {"lcm", "reference", "evaluate"}


def test_an_evaluation_with_an_image_model(dino: Path, tmp_path: Path) -> None:
    """Whole: figures of its features, named in the report, and no place."""
    chain = Chain(open_store(tmp_path))
    config = EvaluateConfig(
        prompt_count=2, teacher_steps=(1,), extractor="transformers", extractor_weights=str(dino), grid_prompts=1, batch_size=2
    )
    workspace = make_workspace(tmp_path, chain.store, outside={"extractor_weights": str(dino)})
    workspace.lineage.inputs["extractor_weights"] = content_digest(str(dino))
    manifest = run(config, Inputs.model_validate(chain.inputs()), workspace)
    text = (chain.store.fetch(manifest) / "report.json").read_text()
    assert '"title": "Dinov2Model (transformers), 28 px"' in text
    assert '"dimensions": 16' in text
    assert content_digest(str(dino)) in text
    assert str(dino) not in text
