"""Whatever a person can get wrong, and whatever can go wrong with what lies on disks: one clear error each, before costly work, the right exit code.

Every case goes through the real command line and the real stages. What is said must name what was found, where, and what was expected.
"""

import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from infra.store import ArtifactStore
from schemas.manifest import Lineage, Manifest, PublishedModel
from stages.publish.variants import DESCRIPTION, Description, TeacherSampling, Variant
from tests import tiny_pipelines
from tests.services import ObjectStore
from tests.stages.pictures import encoded, noise, publish_images, sample
from tests.web import Site, serve

ROOT = Path(__file__).resolve().parents[1]
UNET = "unet/diffusion_pytorch_model.safetensors"
TABLE = "url,caption,width,height,aesthetic\nhttp://a/1.png,one,2000,2000,6.5\n"
CLOSED = "http://127.0.0.1:9"
PROGRAM = "from flows.cli import main; main()"
WITHOUT = "import sys; sys.modules |= dict.fromkeys({blocked!r}); " + PROGRAM
"""As where these packages are not installed: the import fails, and none is found."""


@dataclass
class Bench:
    """A recipe that is right, with its table and teacher, in a folder of its own; each case breaks something of it."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"file://{self.folder / 'store'}"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore.open(self.address)

    def recipe(self, **changes: Any) -> str:
        """Write the recipe with sections changed (None: left out) and return its path."""
        sections: dict[str, Any] = {
            "name": "bench",
            "ingest": {"table": "table.csv", "processes": 1, "timeout_seconds": 2, "retries": 0},
            "measure": {"processes": 1},
            "teacher": {"source": "teacher"},
            "lightning": {"chain": [8, 4]},
            "evaluate": {"extractor": "efficientnet-lite0"},
            "publish": {"name": "bench"},
        }
        for name, change in changes.items():
            sections[name] = sections[name] | change if isinstance(sections.get(name), dict) and change is not None else change
        kept = {name: value for name, value in sections.items() if value is not None}
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
        return "recipe.yaml"

    def table(self, data: str | bytes, name: str = "table.csv") -> str:
        """Write a table, and a recipe that names it."""
        (self.folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return self.recipe(ingest={"table": name})

    def edit_teacher(self, file: str, change: Callable[[bytes], bytes]) -> str:
        path = self.folder / "teacher" / file
        path.write_bytes(change(path.read_bytes()))
        return self.recipe()

    def images(self) -> Manifest[Any]:
        """Six sharp pictures, as `ingest` would have left them, in two shards."""
        pictures = [sample(number, encoded(noise(number, 1100, 1040), "JPEG", quality=20)) for number in range(3)]
        return publish_images(self.folder, self.store, pictures, shard_images=2)

    def published(self) -> Manifest[Any]:
        """A published model with a 4-step student and none of its weights: what is asked of it is refused before they are read."""
        variant = Variant(
            kind="unet", steps=(4,), timesteps={4: (999, 749, 499, 249)}, sampler="trailing", scheduler="EulerDiscreteScheduler",
            prediction_type="epsilon", guidance_scale=1.0, method="lightning-mse", node="lightning-8-4", identity="0" * 64,
        )  # fmt: skip
        teacher = TeacherSampling(scheduler="DDIMScheduler", steps=32, guidance_scale=4.0)
        description = Description(
            name="bench", pipeline="StableDiffusionPipeline", resolution=16, complete=True, teacher=teacher,
            variants={"lightning-4step": variant},
        )  # fmt: skip
        folder = self.folder / "published"
        folder.mkdir()
        (folder / DESCRIPTION).write_text(description.model_dump_json())
        content = PublishedModel(variants={"lightning-4step": variant.model_dump(mode="json")})
        return self.publish(folder, "c" * 64, content)

    def publish(self, folder: Path, identity: str, content: Any) -> Manifest[Any]:
        lineage = Lineage(stage="publish", node="publish", revision=1, config={}, inputs={})
        return self.store.publish(folder, identity=identity, content=content, lineage=lineage)

    def file_of(self, manifest: Manifest[Any], name: str) -> Path:
        """The file on the store behind a name of an artifact, writable."""
        (path,) = (self.folder / "store" / "artifacts" / manifest.identity).rglob(name)
        path.chmod(0o644)
        return path

    def tree(self) -> dict[str, bytes]:
        """Every file on the store, what is unfinished included; not the leases, of which a released one stays until it is collected, nor notes of
        what failed attempts cost."""
        root = self.folder / "store"
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if not name.startswith("leases/") and "/spent/" not in name}

    def run(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
        """Run the command line in this process: exit code, stdout, stderr."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert isinstance(ended.value.code, int)
        written = capsys.readouterr()
        return ended.value.code, written.out, written.err

    def process(self, arguments: list[str], program: str = PROGRAM, **options: Any) -> tuple[int, str, str]:
        """Run the command line in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=self.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False, **options,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.save("sd15", tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def bench(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, restored_process: None) -> Bench:
    shutil.copytree(teacher, tmp_path / "teacher")
    (tmp_path / "table.csv").write_text(TABLE)
    for name in [name for name in os.environ if name.startswith(("DISTILL", "PREFECT_API", "AWS_"))]:
        monkeypatch.delenv(name)
    made = Bench(tmp_path, monkeypatch)
    settings = {"DISTILL_STORE_ADDRESS": made.address, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PREFECT_HOME": str(tmp_path / "prefect")}
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in (settings | nowhere | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return made


@dataclass(frozen=True)
class Case:
    """One way to go wrong."""

    name: str
    arrange: Callable[[Bench], list[str]]
    """Breaks something and returns the command that meets it."""
    expected: tuple[str, ...]
    """What the message must say: what was found, where, what was expected."""
    code: int = 2
    started: bool = False
    """Whether a stage has to begin to find out."""


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def index(data: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(data) | changes).encode()


def damage(bench: Bench, change: Callable[[bytes], bytes], name: str = "shard-00001.tar") -> Manifest[Any]:
    manifest = bench.images()
    path = bench.file_of(manifest, name)
    path.write_bytes(change(path.read_bytes()))
    return manifest


def reading(bench: Bench, manifest: Manifest[Any]) -> list[str]:
    return ["stage", "measure", bench.recipe(), "--input", f"images={manifest.identity[:12]}"]


def same_first_digits(bench: Bench) -> list[str]:
    for last in "12":
        folder = bench.folder / f"model-{last}"
        folder.mkdir()
        (folder / "x").write_text(last)
        bench.publish(folder, "abcdef" + "0" * 57 + last, PublishedModel(variants={}))
    return ["show", "abcdef"]


def as_pickle(bench: Bench) -> list[str]:
    (bench.folder / "teacher" / UNET).rename(bench.folder / "teacher" / "unet" / "diffusion_pytorch_model.bin")
    return ["run", bench.recipe()]


def without_index(bench: Bench) -> list[str]:
    (bench.folder / "teacher" / "model_index.json").unlink()
    return ["run", bench.recipe()]


def hub_out_of_reach(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    return ["run", bench.recipe(teacher={"source": "someone/no-such-model"})]


def occupied(bench: Bench) -> list[str]:
    (bench.folder / "mine").mkdir()
    (bench.folder / "mine" / "thesis.tex").write_text("years of work")
    return ["run", bench.recipe(publish={"destination": "mine"})]


def prompts(bench: Bench, text: bytes) -> list[str]:
    (bench.folder / "prompts.txt").write_bytes(text)
    return ["run", bench.recipe(evaluate={"prompts": "prompts.txt"})]


def s3(bench: Bench, **environment: str) -> list[str]:
    for name, value in ({"DISTILL_STORE_ENDPOINT_URL": CLOSED, "DISTILL_STORE_RETRIES": "0"} | environment).items():
        bench.monkeypatch.setenv(name, value)
    return ["run", bench.recipe(), "--store", "s3://pictures/run"]


def file_as_store(bench: Bench) -> list[str]:
    (bench.folder / "notes.txt").write_text("x")
    return ["run", bench.recipe(), "--store", "notes.txt"]


def not_a_model(bench: Bench) -> list[str]:
    return ["sample", "teacher", "--prompt", "a cat", "-o", "x.png"]


def of_published(bench: Bench, *more: str) -> list[str]:
    return ["sample", bench.published().identity[:10], "--prompt", "a cat", "-o", "x.png", *more]


def unfinished_model(bench: Bench) -> list[str]:
    bench.published()
    return ["sample", "published", "--prompt", "a cat", "-o", "x.png"]


def below_a_file(bench: Bench) -> list[str]:
    return ["run", bench.recipe(publish={"destination": "table.csv/model"})]


def cache_below_a_file(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("DISTILL_STORE_CACHE_DIR", str(bench.folder / "table.csv" / "cache"))
    return ["run", bench.recipe()]


def bare_predictor(bench: Bench) -> list[str]:
    (bench.folder / "clip").mkdir()
    (bench.folder / "clip" / "config.json").write_text("{}")
    return ["run", bench.recipe(measure={"aesthetic_predictor": "clip"})]


CASES = (
    # The recipe.
    Case(
        "an unknown field",
        lambda b: ["run", b.recipe(select={"colour": "red"})],
        ("recipe.yaml", "select.colour (line", "'red'", "no such field"),
    ),
    Case(
        "several mistakes at once",
        lambda b: ["run", b.recipe(name="Not Good", select={"min_sharpness": -1}, lightning={"chain": [8, 3]}, teacher=None)],
        (
            "4 mistakes",
            "name (line 1): found 'Not Good'",
            "select.min_sharpness",
            "found -1",
            "lightning.chain.1",
            "teacher: found 'neither'",
        ),
    ),
    Case(
        "a chain that does not nest",
        lambda b: ["plan", b.recipe(lightning={"chain": [32, 8, 3]})],
        ("lightning.chain.2 (line", "found 3", "does not nest in that of 8; expected a divisor of 8"),
    ),
    Case(
        "a LoRA on a one-step x0 student",
        lambda b: ["run", b.recipe(lightning={"chain": [2, 1], "links": {1: {"network": "lora", "prediction": "sample"}}})],
        ("lightning.links.1.prediction (line", "'sample'", "a LoRA cannot carry the switch", "expected network: unet"),
    ),
    Case(
        "start timesteps off the grid of the level that teaches",
        lambda b: ["plan", b.recipe(lightning={"chain": [64, 16, 4, 1], "adversarial": {"start_timesteps": [250, 999]}})],
        ("lightning.adversarial.start_timesteps (line", "found [250]", "expected entries of the trailing grid of 4 steps"),
    ),
    Case(
        "a batch that the processes cannot share",
        lambda b: ["plan", b.recipe(lightning={"chain": [8, 4], "batch_size": 8, "world_size": 3})],
        ("lightning.world_size (line", "found 3", "expected a divisor of lightning.batch_size = 8"),
    ),
    Case(
        "a phase whose name is no part of a run's",
        lambda b: ["plan", b.recipe(), "--set", "lightning.adversarial={phases: {LoRA: {objective: conditional, network: lora}}}"],
        ("lightning.adversarial.phases.LoRA", "(--set)", "found 'LoRA'", "^[a-z][a-z0-9-]"),
    ),
    Case(
        "a threshold and nothing that scores",
        lambda b: ["run", b.recipe(ingest={"columns": {"aesthetic": []}})],
        ("select.min_aesthetic", "found 5.5", "expected names in ingest.columns.aesthetic, or measure.aesthetic_predictor, or null"),
    ),
    Case("a recipe that is no file", lambda _: ["run", "gone.yaml"], ("recipe gone.yaml", "cannot be read", "expected a YAML file")),
    Case("a malformed override", lambda b: ["run", b.recipe(), "--set", "seed"], ("--set seed", "expected section.field=value, such as")),
    Case(
        "an override of the wrong type",
        lambda b: ["plan", b.recipe(), "--set", "lightning.batch_size=many"],
        ("lightning.batch_size (--set)", "found 'many'", "expected: input should be a valid integer"),
    ),
    # The table.
    Case(
        "no table",
        lambda b: ["run", b.recipe(ingest={"table": "gone.csv"})],
        ("ingest.table", "gone.csv", "nothing is there; expected a file"),
    ),
    Case(
        "a table of an unknown scheme",
        lambda b: ["run", b.recipe(ingest={"table": "carrier-pigeon://urls.csv"})],
        ("ingest.table", "carrier-pigeon://urls.csv", "cannot be read", "Protocol not known"),
    ),
    Case(
        "a table without url",
        lambda b: ["run", b.table("address,caption\nhttp://a,b\n")],
        ("ingest.table", "table.csv", "no column for the url", "found address, caption", "expected one of url", "ingest.columns.url"),
    ),
    Case(
        "an empty table",
        lambda b: ["run", b.table(parquet(url=[], caption=[]), "table.parquet")],
        ("ingest.table", "table.parquet", "has no rows"),
    ),
    Case(
        "a table that is no parquet",
        lambda b: ["run", b.table("url,caption", "table.parquet")],
        ("ingest.table", "table.parquet", "not a readable parquet file"),
    ),
    Case(
        "a table cut short",
        lambda b: ["run", b.table(cut(parquet(url=["http://a/1"], caption=["x"])), "table.parquet")],
        ("ingest.table", "table.parquet", "not a readable parquet file"),
    ),
    Case(
        "a table of another format",
        lambda b: ["run", b.table("x", "table.xlsx")],
        ("ingest.table", "table.xlsx", "expected a .parquet or .csv file"),
    ),
    Case(
        "a threshold and a table without scores",
        lambda b: ["run", b.table("url,caption\nhttp://a/1.png,one\n")],
        (
            "select.min_aesthetic = 5.5: ingest.table table.csv",
            "has no column with a score",
            "expected one of aesthetic, aesthetic_score",
            "or null",
        ),
    ),
    Case(
        "a table none of whose rows can pass",
        lambda b: ["stage", "ingest", b.table("url,caption,width,height,aesthetic\nhttp://a/1.png,one,64,64,6.5\n")],
        ("ingest.table", "table.csv", "none of its 1 rows passes by its metadata", "dropped:"),
        code=1,
        started=True,
    ),
    # The teacher.
    Case(
        "no teacher",
        lambda b: ["run", b.recipe(teacher={"source": "gone"})],
        ("teacher.source", "gone", "nothing is there; expected a file or a folder"),
    ),
    Case(
        "table and teacher missing",
        lambda b: ["run", b.recipe(ingest={"table": "gone.csv"}, teacher={"source": "gone"})],
        ("ingest.table: gone.csv", "teacher.source: gone"),
    ),
    Case(
        "a teacher that is a file",
        lambda b: ["run", b.recipe(teacher={"source": "table.csv"})],
        ("teacher.source", "table.csv", "found a file, expected a pipeline folder"),
    ),
    Case(
        "a teacher without index",
        without_index,
        ("teacher.source", "teacher/model_index.json", "missing; expected a pipeline folder in diffusers layout"),
    ),
    Case(
        "an unsupported pipeline",
        lambda b: ["run", b.edit_teacher("model_index.json", lambda data: index(data, _class_name="FluxPipeline"))],
        ("teacher.source", "teacher", "pipeline 'FluxPipeline' is not supported; expected StableDiffusionPipeline or"),
    ),
    Case(
        "truncated weights",
        lambda b: ["run", b.edit_teacher(UNET, cut)],
        ("teacher.source", f"teacher/{UNET}", "cut short", "its header promises"),
    ),
    Case(
        "weights of nonsense",
        lambda b: ["run", b.edit_teacher(UNET, lambda _: struct.pack("<Q", 4) + b"{{{{")],
        ("teacher.source", f"teacher/{UNET}", "not a safetensors file"),
    ),
    Case(
        "pickled weights",
        as_pickle,
        (
            "teacher.source",
            "teacher/unet",
            "no safetensors weights",
            "diffusion_pytorch_model.bin",
            "expected diffusion_pytorch_model.safetensors",
        ),
    ),
    Case(
        "a hub out of reach",
        hub_out_of_reach,
        ("teacher.source", "someone/no-such-model", "the hub does not give such a model", "expected an existing path"),
    ),
    Case(
        "a resolution that the VAE cannot take",
        lambda b: ["run", b.recipe(encode={"resolution_px": 17})],
        ("encode.resolution_px = 17", "expected a multiple of 2, the VAE's factor"),
    ),
    # Other files that a recipe names.
    Case(
        "no prompts file",
        lambda b: ["run", b.recipe(evaluate={"prompts": "gone.txt"})],
        ("evaluate.prompts", "gone.txt", "nothing is there"),
    ),
    Case("an empty prompts file", lambda b: prompts(b, b"\n \n"), ("prompts.txt", "holds no prompt")),
    Case("prompts that are no text", lambda b: prompts(b, b"\xff\xfe\x00"), ("prompts.txt", "cannot be read")),
    Case(
        "a destination where something else lies", occupied, ("publish.destination mine", "something else is there; expected a new folder")
    ),
    Case(
        "a predictor without its head",
        bare_predictor,
        ("measure.aesthetic_predictor clip", "head.safetensors missing; expected a CLIP model"),
    ),
    # The store.
    Case(
        "a store of an unknown scheme",
        lambda b: ["run", b.recipe(), "--store", "ftp://x/y"],
        ("'ftp://x/y'", "unknown scheme 'ftp'", "expected file://, s3://"),
    ),
    Case("a file for a store", file_as_store, ("notes.txt", "cannot be used", "expected a writable folder")),
    Case(
        "a store that cannot be written",
        lambda b: ["run", b.recipe(), "--store", "/proc/store"],
        ("file:///proc/store", "expected a writable folder"),
    ),
    Case("no credentials", s3, ("no credentials for s3://pictures/run", "Expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
    Case(
        "a store out of reach",
        lambda b: s3(b, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y"),
        ("store s3://pictures/run cannot be reached at http://127.0.0.1:9",),
    ),
    Case(
        "a wrong setting", lambda b: s3(b, DISTILL_STORE_RETRIES="often"), ("environment", "DISTILL_STORE_RETRIES='often'", "valid integer")
    ),
    # The command.
    Case(
        "an unknown stage",
        lambda b: ["stage", "dmd2", b.recipe()],
        ("stage 'dmd2'", "is not in this recipe; expected one of ingest, measure, select"),
    ),
    Case("an unknown device", lambda b: ["run", b.recipe(), "--device", "tpu"], ("device 'tpu'", "expected cpu, cuda, cuda:0 or mps")),
    Case("no such GPU", lambda b: ["run", b.recipe(), "--device", "cuda:64"], ("device 'cuda:64'", "this machine has", "that torch")),
    Case("no such artifact", lambda _: ["show", "123456"], ("'123456'", "no such artifact in file://")),
    Case("an ambiguous reference", same_first_digits, ("'abcdef' is ambiguous in file://", "01 (published_model), abcdef")),
    Case(
        "an artifact of another kind",
        lambda b: ["stage", "measure", b.recipe(), "--input", f"images={b.published().identity}"],
        ("measure: input images is of another kind than the stage reads", "ingest is published_model cccccccccccc"),
    ),
    # A published model.
    Case(
        "a step count that no student has",
        lambda b: of_published(b, "--steps", "3"),
        ("steps 3", "expected one of lightning-4step (4 steps)"),
    ),
    Case(
        "a variant that is not there", lambda b: of_published(b, "--variant", "dmd2"), ("variant 'dmd2'", "expected one of lightning-4step")
    ),
    Case(
        "a folder that is no published model",
        not_a_model,
        (f"teacher/{DESCRIPTION}", "cannot be read", "expected a folder made by the stage publish"),
    ),
    Case(
        "a model of another kind",
        lambda b: ["sample", b.images().identity, "--prompt", "a cat", "-o", "x.png"],
        ("is an artifact of the kind image_shards, expected published_model",),
    ),
    Case("a model without its weights", unfinished_model, ("published/lightning-4step/unet", "cannot be loaded", "expected a whole model")),
    Case(
        "a mistyped model",
        lambda _: ["sample", "modls/x", "--prompt", "a", "-o", "x.png"],
        ("modls/x: no such folder here", "expected an identity"),
    ),
    # Damage on the store.
    Case(
        "a flipped byte, looked for",
        lambda b: ["verify", damage(b, flip).identity[:12]],
        ("(image_shards) on file://", "shard-00001.tar: expected SHA-256", "found", "distill verify", "--remove"),
        code=1,
    ),
    Case(
        "a flipped byte, met by a stage",
        lambda b: reading(b, damage(b, flip, "shard-00000.tar")),  # the first: what is measured before a damaged one is kept
        ("is damaged: shard-00000.tar: expected SHA-256", "found", "to have it made again: distill verify", "--remove"),
        code=1,
        started=True,
    ),
    Case(
        "a truncated shard, looked for",
        lambda b: ["verify", damage(b, cut).identity],
        ("shard-00001.tar: expected", "bytes, found"),
        code=1,
    ),
    Case(
        "a truncated shard, met by a stage",
        lambda b: reading(b, damage(b, cut)),
        ("measure: the artifact given for ingest (", "is not whole on file://", "see distill verify"),
        code=1,
    ),
    Case(
        "a damaged manifest",
        lambda b: ["show", damage(b, cut, "manifest.json").identity],
        ("manifest.json is not a manifest of this version", "Invalid JSON", "--remove"),
        code=1,
    ),
)


def errors_in(text: str) -> int:
    return sum(line.lower().startswith("error:") for line in text.splitlines())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_clear_error(bench: Bench, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = case.arrange(bench)
    before = bench.tree()
    code, output, shown = bench.run(arguments, capsys)
    missing = [words for words in case.expected if words not in shown]
    assert not missing and errors_in(shown) == 1 and "Traceback" not in shown, shown
    assert (code, output) == (case.code, ""), shown
    assert bench.tree() == before
    assert (": started" in shown) == case.started, shown
    if not case.started:
        assert shown.splitlines()[-1] != "" and not (bench.folder / "x.png").exists()


def test_there_are_at_least_twenty_kinds() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 20


def test_the_recipe_of_the_cases_is_right(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Else every case would be refused for another reason than its own."""
    from flows.preparation import prepare

    assert len(prepare(bench.recipe(), bench.address).unfinished) == 8
    code, output, _ = bench.run(["plan", bench.recipe()], capsys)
    assert code == 0 and "would run" in output


@pytest.mark.service
@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [
        ("s3://nowhere/x", {}, ("store s3://nowhere/x: the bucket 'nowhere' does not exist at http", "create it first")),
        (
            "s3://distill/x",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            ("store s3://distill/x", "refused the credentials", "SignatureDoesNotMatch"),
        ),
        ("s3://distill/x", {"AWS_ACCESS_KEY_ID": "nobody"}, ("store s3://distill/x", "refused the credentials", "InvalidAccessKeyId")),
    ],
)
def test_what_an_object_store_refuses(  # noqa: PLR0917 - the parameters of a table
    bench: Bench, seaweedfs: ObjectStore, capsys: pytest.CaptureFixture[str], address: str, environment: dict[str, str],
    expected: tuple[str, ...],
) -> None:  # fmt: skip
    for name, value in (seaweedfs.environment | environment).items():
        bench.monkeypatch.setenv(name, value)
    code, output, shown = bench.run(["run", bench.recipe(), "--store", address], capsys)
    assert (code, output, errors_in(shown)) == (2, "", 1), shown
    assert all(words in shown for words in expected), shown


def test_too_many_failed_downloads(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Site()) as site:
        rows = (
            "".join(f"{site.url(f'/{number}.png')},picture {number},2000,2000,6.5\n" for number in range(3))
            + f"{CLOSED}/x,x,2000,2000,6.5\n"
        )
        bench.table("url,caption,width,height,aesthetic\n" + rows)
        arguments = ["stage", "ingest", "recipe.yaml", "--set", "ingest.allow_private_addresses=true"]
        code, output, shown = bench.run(arguments, capsys)
    assert (code, output, errors_in(shown)) == (1, "", 1) and "Traceback" not in shown, shown
    assert "4 of 4 downloads failed, more than ingest.max_failed_fraction = 0.5: http 404 3, connection 1" in shown
    assert bench.tree() == {}


def test_a_full_disk(bench: Bench) -> None:
    """A limit on the size of files stands in for a full disk: the same calls fail in the same places (EFBIG for ENOSPC)."""
    limit = 100_000  # bytes: below the teacher's weights, above its configurations and the index of the read cache
    code, output, shown = bench.process(
        ["stage", "teacher", bench.recipe()], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert (code, output, errors_in(shown)) == (1, "", 1) and "Traceback" not in shown, shown
    assert "teacher: disk full while working in" in shown and "free space, and run again" in shown
    assert bench.tree() == {}
    code, output, shown = bench.process(["stage", "teacher", bench.recipe()])
    assert code == 0 and "teacher" in output, shown


@pytest.mark.parametrize(
    ("stage", "blocked", "expected"),
    [
        ("ingest", "img2dataset", "ingest: img2dataset is not installed; expected the extra: pip install 'diffusion-distillery[data]'"),
        ("measure", "cv2", "stage measure: the package cv2 is not installed here; expected the extras of this stage"),
        ("evaluate", "cleanfid", "cleanfid not installed; expected the extra: pip install 'diffusion-distillery[evaluate]'"),
    ],
)
def test_a_missing_package_names_its_extra(bench: Bench, stage: str, blocked: str, expected: str) -> None:
    arguments = ["stage", stage, bench.recipe(evaluate={"extractor": "inception"})]
    code, output, shown = bench.process(arguments, WITHOUT.format(blocked=(blocked,)))
    assert (code, output, errors_in(shown)) == (2, "", 1) and "Traceback" not in shown, shown
    assert expected in shown
    assert bench.tree() == {}


def test_exit_codes_of_a_real_process(bench: Bench) -> None:
    code, output, shown = bench.process(["run", bench.recipe(teacher={"source": "gone"})])
    assert (code, output) == (2, "") and shown == "error: teacher.source: gone: nothing is there; expected a file or a folder\n"
    code, output, shown = bench.process(["verify", damage(bench, flip).identity])
    assert (code, output, errors_in(shown)) == (1, "", 1) and "Traceback" not in shown


def test_text_in_brackets_is_text(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal library would take it for markup, and leave out what should be installed, or fail over a path."""
    for name in ("[red]", "[/red]", "x[data]", ":smile:"):
        code, _, shown = bench.run(["run", f"{name}.yaml"], capsys)
        assert code == 2 and f"recipe {name}.yaml: cannot be read" in shown


@pytest.mark.parametrize(
    ("change", "name"), [(flip, "measurements-00000.parquet"), (cut, "measurements-00000.parquet"), (cut, "manifest.json")]
)
def test_a_damaged_artifact_is_removed_on_demand_and_made_again(
    bench: Bench, capsys: pytest.CaptureFixture[str], change: Callable[[bytes], bytes], name: str
) -> None:
    images = bench.images()
    command = ["stage", "measure", bench.recipe(), "--input", f"images={images.identity}"]
    assert bench.run(command, capsys)[0] == 0
    (measured,) = [manifest for manifest in bench.store.manifests() if manifest.kind == "measurements"]
    path = bench.file_of(measured, name)
    path.write_bytes(change(path.read_bytes()))
    assert bench.run(["verify", measured.identity], capsys)[0] == 1
    assert path.exists()
    code, output, shown = bench.run(["verify", measured.identity[:12], "--remove"], capsys)
    assert (code, shown) == (0, "") and f"{measured.identity}: was damaged and is removed" in output
    assert not any(measured.identity in key for key in bench.tree())
    assert bench.run(command, capsys)[0] == 0
    (again,) = [manifest for manifest in bench.store.manifests() if manifest.kind == "measurements"]
    assert (again.identity, again.files) == (measured.identity, measured.files)
    assert bench.store.verify(again) == []


def test_a_sound_artifact_is_not_removed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    images = bench.images()
    code, output, _ = bench.run(["verify", images.identity, "--remove"], capsys)
    assert code == 0 and "files are as the manifest says" in output
    assert bench.store.find(images.identity) == images


def test_a_damaged_piece_of_an_unfinished_stage_is_removed_and_made_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    images = bench.images()
    command = ["stage", "measure", bench.recipe(), "--input", f"images={images.identity}"]
    assert bench.run(command, capsys)[0] == 0
    (whole,) = [manifest for manifest in bench.store.manifests() if manifest.kind == "measurements"]
    unfinished = bench.folder / "unfinished"  # what a run killed after its first shard has left
    unfinished.mkdir()
    name = "measurements-00000"
    shutil.copyfile(bench.file_of(whole, f"{name}.parquet"), unfinished / f"{name}.parquet")
    bench.store.remove(whole.identity)
    bench.store.save_part(whole.identity, name, unfinished)
    table = next((bench.folder / "store" / "parts").rglob(f"{name}.parquet"))
    table.chmod(0o644)
    table.write_bytes(flip(table.read_bytes()))
    code, _, shown = bench.run(command, capsys)
    assert (code, errors_in(shown)) == (1, 1) and f"{name}.parquet: expected SHA-256" in shown and "run the same command again" in shown
    assert bench.run(command, capsys)[0] == 0
    (again,) = [manifest for manifest in bench.store.manifests() if manifest.kind == "measurements"]
    assert again.files == whole.files
