"""`distill publish`: a published model in a folder, on object storage, on the hub."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from flows.cli import main
from infra.hub import card_metadata
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput
from schemas.manifest import Lineage, PublishedModel
from stages.publish.variants import DESCRIPTION, Description, TeacherSampling
from tests.hub import Hub, hub_server
from tests.services import ObjectStore

TOKEN = "hf_aSecretOfThisTest"
CARD = "---\nlicense: openrail++\nlibrary_name: diffusers\nbase_model: some/teacher\ntags:\n- lora\n---\n\n# x\n"

Distill = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as `publish` lays one out, with one LoRA."""
    folder = tmp_path / "model"
    (folder / "lcm-lora" / "scheduler").mkdir(parents=True)
    (folder / "lcm-lora" / "scheduler" / "scheduler_config.json").write_text("{}")
    save_file({"unet.x.lora_A.weight": torch.arange(6.0).reshape(2, 3)}, folder / "lcm-lora" / "pytorch_lora_weights.safetensors")
    (folder / "README.md").write_text(CARD)
    teacher = TeacherSampling(scheduler="EulerDiscreteScheduler", steps=4, guidance_scale=7)
    description = Description(
        name="tiny", pipeline="StableDiffusionXLPipeline", resolution=16, complete=False, base_model="a/b", teacher=teacher
    )
    (folder / DESCRIPTION).write_text(description.model_dump_json())
    return folder


@pytest.fixture
def distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_process: None) -> Distill:
    monkeypatch.setenv("DISTILL_STORE_ADDRESS", f"file://{tmp_path / 'store'}")
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["publish", *arguments])
        assert isinstance(ended.value.code, int)
        written = capsys.readouterr()
        return ended.value.code, written.out, " ".join(written.err.split())

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_artifact_goes_to_a_folder(distill: Distill, model: Path, tmp_path: Path) -> None:
    store = ArtifactStore.open(f"file://{tmp_path / 'store'}")
    lineage = Lineage(stage="publish", node="publish", revision=3, config={}, inputs={})
    manifest = store.publish(model, identity=digest("model"), content=PublishedModel(variants={}), lineage=lineage)
    target = tmp_path / "out"
    code, text, _ = distill(manifest.identity[:12], "--to", str(target), "--dry-run")
    assert code == 0 and not target.exists()
    assert "lcm-lora/pytorch_lora_weights.safetensors" in text and f"4 files, {text.split('4 files, ')[1].split(',')[0]}, would go" in text
    assert distill(manifest.identity[:12], "--to", str(target))[0] == 0
    assert files_of(target) == files_of(model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    code, _, wrong = distill(manifest.identity[:12], "--to", str(tmp_path / "mine"))
    assert code == 2 and f"--to {tmp_path / 'mine'}: something else is there" in wrong
    code, _, wrong = distill(manifest.identity[:12], "--to", str(target), "--private")
    assert code == 2 and "--private" in wrong


def test_object_storage_holds_the_same_files_and_none_of_an_earlier_model(
    distill: Distill, model: Path, seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (seaweedfs.environment | {"AWS_ENDPOINT_URL": seaweedfs.endpoint}).items():
        monkeypatch.setenv(name, value)
    place = f"s3://{seaweedfs.bucket}/published"
    system = fsspec.filesystem("s3", use_listings_cache=False)

    def there() -> dict[str, bytes]:
        root = f"{seaweedfs.bucket}/published"
        return {path.removeprefix(root + "/"): system.cat_file(path) for path in system.find(root)}

    (model / "old.txt").write_text("of an earlier version")
    assert distill(str(model), "--to", place)[0] == 0
    assert there() == files_of(model)
    (model / "old.txt").unlink()
    (model / "README.md").write_text(CARD + "\nmore\n")
    assert distill(str(model), "--to", place, "--dry-run")[0] == 0 and "old.txt" in there()
    assert distill(str(model), "--to", place)[0] == 0
    assert there() == files_of(model)
    system.pipe_file(f"{seaweedfs.bucket}/other/notes.txt", b"keep")
    code, _, wrong = distill(str(model), "--to", f"s3://{seaweedfs.bucket}/other")
    assert code == 2 and "something else is there, such as notes.txt" in wrong


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(TOKEN) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the double speaks the older protocol for large files
        yield served


def test_the_hub_receives_every_file(distill: Distill, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, text, errors = distill(str(model), "--to", "hub:someone/tiny", "--private", "--dry-run")
    assert code == 0 and "would go to hub:someone/tiny (private)" in text and hub.repositories == {}
    code, text, more = distill(str(model), "--to", "hub:someone/tiny", "--private", "-v")
    assert code == 0 and f"{hub.endpoint}/someone/tiny/commit/" in text
    assert hub.repositories == {"someone/tiny": files_of(model)} and hub.visibility == {"someone/tiny": "private"}
    assert len(hub.objects) == 1, "weights go apart from the commit"
    assert hub.commits == ["tiny: 0 variants, 0 styles"]
    (model / "README.md").write_text(CARD + "\nmore\n")
    assert distill(str(model), "--to", "hub:someone/tiny")[0] == 0, "one that is there is committed to"
    assert hub.repositories["someone/tiny"] == files_of(model)
    assert TOKEN not in text + errors + more


def test_what_the_hub_would_refuse_is_refused_before(distill: Distill, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, wrong = distill(str(model), "--to", "hub:someone/tiny")
    assert code == 2 and "HF_TOKEN is not set" in wrong
    monkeypatch.setenv("HF_TOKEN", "hf_anotherOne")
    code, _, wrong = distill(str(model), "--to", "hub:someone/tiny", "--debug")
    assert code == 2 and "the hub refuses the upload (status 401)" in wrong and "hf_anotherOne" not in wrong
    assert distill(str(model), "--to", "hub:tiny")[0] == 2
    (model / "README.md").write_text("# no metadata\n")
    code, _, wrong = distill(str(model), "--to", "hub:someone/tiny")
    assert code == 2 and "README.md: its metadata has no license" in wrong
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(BadInput, match="no model card that the hub reads"):
        card_metadata(model)
    (model / DESCRIPTION).write_text(json.dumps({}))
    code, _, wrong = distill(str(model), "--to", "hub:someone/tiny")
    assert code == 2 and "not a description of this version" in wrong
    assert hub.repositories == {}
