"""The `teacher` stage: a pipeline becomes an artifact with what makes it one, and nothing else; what is broken is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.outside import HubModel, content_digest, local_copy
from infra.store import ArtifactStore, StoreSettings
from schemas.errors import BadInput
from schemas.manifest import Lineage, Manifest, Teacher
from schemas.teacher import TeacherConfig
from stages.diffusion.pipeline import TeacherPipeline
from stages.teacher import Inputs, is_wanted, run
from stages.workspace import Workspace
from tests import tiny_pipelines

UNET = "unet/diffusion_pytorch_model.safetensors"
Copy = Callable[..., Manifest[Teacher]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(kind, root / kind) for kind in tiny_pipelines.KINDS}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("DISTILL_STORE_CACHE_DIR", str(tmp_path / "cache"))
    return ArtifactStore.open(f"file://{tmp_path / 'store'}", StoreSettings())


@pytest.fixture
def copy(store: ArtifactStore, tmp_path: Path) -> Copy:
    """`copy(source, **config)` runs the stage, each time as another artifact."""
    made: list[str] = []

    def run_stage(source: Path | str, **config: str) -> Manifest[Teacher]:
        made.append("")
        scratch = tmp_path / f"scratch-{len(made)}"
        scratch.mkdir()
        workspace = Workspace(
            store=store,
            identity=f"{len(made):064x}",
            lineage=Lineage(stage="teacher", node="teacher", revision=1, config={}, inputs={}),
            scratch=scratch,
            outside={"source": str(source)},
        )
        manifest = run(TeacherConfig(source=str(source), **config), Inputs(), workspace)
        assert not list(scratch.iterdir())
        return manifest

    return run_stage


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_a_pipeline_becomes_an_artifact_that_loads(sources: dict[str, Path], copy: Copy, store: ArtifactStore, kind: str) -> None:
    manifest = copy(sources[kind])
    content = manifest.content
    assert (content.kind, content.resolution) == ("teacher", 16)
    assert content.prediction_type == ("v_prediction" if kind == "sd2-v" else "epsilon")
    assert content.architecture == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    assert sorted(content.parameters) == sorted(
        name for name in ("text_encoder", "text_encoder_2", "unet", "vae") if (sources[kind] / name).is_dir()
    )
    fetched = store.fetch(manifest)
    found, expected = TeacherPipeline.load(fetched).unet.state_dict(), load_file(sources[kind] / UNET)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (
        diffusers.DiffusionPipeline.from_pretrained(fetched).config.keys()
        == diffusers.DiffusionPipeline.from_pretrained(sources[kind]).config.keys()
    )


def test_equal_teachers_have_equal_digests_wherever_they_lie(sources: dict[str, Path], copy: Copy, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(sources["sdxl"], tmp_path / "elsewhere")
    first, second = copy(sources["sdxl"]), copy(f"file://{elsewhere}")
    assert first.content.weights_digest == second.content.weights_digest
    assert first.files == second.files
    weights = load_file(elsewhere / UNET)
    weights["conv_in.bias"] += 1
    save_file(weights, elsewhere / UNET, metadata={"format": "pt"})
    assert copy(elsewhere).content.weights_digest != first.content.weights_digest


def test_what_does_not_make_the_pipeline_stays_behind(sources: dict[str, Path], copy: Copy, tmp_path: Path) -> None:
    crowded = shutil.copytree(sources["sd15"], tmp_path / "crowded")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "v1-5.safetensors",
        "unet/model.py",
        "README.md",
    ):
        (crowded / name).write_bytes(b"anything")
    (crowded / "safety_checker").mkdir()
    (crowded / "safety_checker" / "model.safetensors").write_bytes(b"anything")
    index = json.loads((crowded / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (crowded / "model_index.json").write_text(json.dumps(index))
    assert [entry.path for entry in copy(crowded).files] == [entry.path for entry in copy(sources["sd15"]).files]


def test_a_variant_and_shards_become_plain_weights(sources: dict[str, Path], copy: Copy, store: ArtifactStore, tmp_path: Path) -> None:
    half = tmp_path / "half"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sources["sdxl"]).to(torch.float16)
    pipeline.save_pretrained(half, variant="fp16", safe_serialization=True)
    pipeline.unet.save_pretrained(half / "unet", variant="fp16", safe_serialization=True, max_shard_size="60KB")
    (half / "unet/diffusion_pytorch_model.fp16.safetensors").unlink(missing_ok=True)
    assert len(list((half / "unet").glob("*.safetensors"))) > 1
    with pytest.raises(BadInput, match=r"no safetensors weights; found .*fp16"):
        copy(half)
    fetched = store.fetch(copy(half, variant="fp16"))
    assert not [path for path in fetched.rglob("*") if "fp16" in path.name]
    found = TeacherPipeline.load(fetched).unet.state_dict()
    assert all(torch.equal(value.half(), found[name].half()) for name, value in pipeline.unet.state_dict().items())
    next(iter(sorted((half / "unet").glob("*-00001-of-*.safetensors")))).unlink()
    with pytest.raises(BadInput, match=r"shards .*00001-of.* missing"):
        copy(half, variant="fp16")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae.*missing"),
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer: no vocabulary"),
        (lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"), r"found pytorch_model\.bin"),
        (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-1]), "cut short"),
        (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes() + b"x"), "too long"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}'),
            "'StableDiffusion3Pipeline' is not supported",
        ),
    ],
)
def test_broken_and_unsupported_pipelines_are_refused_before_anything_is_stored(
    sources: dict[str, Path], copy: Copy, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    broken = shutil.copytree(sources["sd15"], tmp_path / "broken")
    spoil(broken)
    with pytest.raises(BadInput, match=message):
        copy(broken)
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_a_file_or_nothing_at_the_source_is_refused(sources: dict[str, Path], copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a pipeline folder"):
        copy(sources["sd15"] / UNET)
    with pytest.raises(BadInput, match="nothing"):
        copy(tmp_path / "nothing")


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert HubModel.parse("stabilityai/stable-diffusion-xl-base-1.0") == HubModel("stabilityai/stable-diffusion-xl-base-1.0")
    assert HubModel.parse("a/b@refs/pr/3") == HubModel("a/b", "refs/pr/3")
    assert TeacherConfig(source="a/b", revision="v1").address == "a/b@v1"
    (tmp_path / "data").mkdir()
    for path in ("data/anything", "tables/urls.parquet", "/a/b", "./a/b", "s3://a/b", "file:///a/b", "a", "a/b/c"):
        assert HubModel.parse(path) is None, path


def test_without_the_hub_a_hub_id_is_one_clear_error(copy: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for call in (content_digest, lambda address: local_copy(address, tmp_path), copy):
        with pytest.raises(BadInput, match=r"nobody/nothing: no such file or folder here, and the hub does not give such a model"):
            call("nobody/nothing")


def test_only_one_set_of_weights_is_downloaded() -> None:
    weights = "unet/diffusion_pytorch_model"
    plain = [
        "model_index.json",
        "unet/config.json",
        f"{weights}.safetensors",
        f"{weights}-00001-of-00002.safetensors",
        "tokenizer/merges.txt",
    ]
    half = [f"{weights}.fp16.safetensors", f"{weights}.fp16-00001-of-00002.safetensors"]
    others = ["README.md", "v1-5-pruned.safetensors", f"{weights}.bin", "text_encoder/flax_model.msgpack", "onnx/unet/model.safetensors"]
    assert [name for name in plain + half + others if is_wanted(name, None)] == plain
    assert [name for name in plain + half + others if is_wanted(name, "fp16") and name.endswith(".safetensors")] == half


def test_a_pipeline_on_any_file_system_is_the_same_teacher(sources: dict[str, Path], copy: Copy) -> None:
    """fsspec's memory file system goes the way of every remote one."""
    memory = fsspec.filesystem("memory")
    memory.put(str(sources["sd15"]), "/teachers/sd15", recursive=True)
    memory.pipe("/teachers/sd15/unet/diffusion_pytorch_model.bin", b"never fetched")
    assert copy("memory://teachers/sd15").files == copy(sources["sd15"]).files
    memory.rm("/teachers/sd15/unet/diffusion_pytorch_model.bin")
    assert content_digest("memory://teachers/sd15") == content_digest(str(sources["sd15"]))
    with pytest.raises(BadInput, match="nothing is there"):
        copy("memory://teachers/none")
