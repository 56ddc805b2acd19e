"""The command line: exit codes, one clear error for each mistake, and signals that leave a state which resumes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from flows.cli import main
from tests.flows.conftest import ToyChain

ROOT = Path(__file__).resolve().parents[2]

ALL = ("ingest", "measure", "select", "teacher", "encode")


@pytest.fixture(autouse=True)
def own_process(chain: ToyChain, monkeypatch: pytest.MonkeyPatch, restored_process: None) -> None:
    """Commands run in this process where no signal and no Prefect is meant."""
    monkeypatch.setenv("DISTILL_STORE_ADDRESS", chain.address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.chdir(chain.folder)


def distill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def stages(chain: ToyChain, *names: str) -> None:
    for name in names:
        assert distill("stage", name, chain.recipe_file()) == 0


def test_one_stage_after_the_other_without_prefect(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    stages(chain, "ingest", "measure", "select", "teacher", "encode")
    assert chain.runs() == ["ingest", "measure", "select", "teacher", "encode"]
    capsys.readouterr()
    assert distill("plan", chain.recipe_file(), "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["done"]) for row in planned["stages"]] == [
        (name, True) for name in ("ingest", "measure", "select", "teacher", "encode")
    ]
    assert distill("plan", chain.recipe_file(), "--json", "--set", "encode.batch_size=2") == 0
    changed = json.loads(capsys.readouterr().out)
    assert [row["done"] for row in changed["stages"]] == [True, True, True, True, False]
    assert distill("plan", chain.recipe_file(), "--set", "encode.batch_size=2") == 0
    assert "would run" in capsys.readouterr().out
    stages(chain, "encode")
    assert chain.runs() == []


def test_the_newest_artifact_of_another_recipe_is_an_input(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = chain.recipe_file()
    for threshold in ("0.2", "0.3"):
        for name in ("ingest", "measure", "select"):
            assert distill("stage", name, recipe, "--set", f"select.min_sharpness={threshold}") == 0
    (selection,) = [found for found in chain.store.manifests() if found.lineage.config.get("min_sharpness") == 0.3]
    other = ("--set", "name=other", "--set", "seed=7")
    assert distill("stage", "teacher", recipe, *other) == 0
    assert distill("stage", "ingest", recipe, *other) == 0
    capsys.readouterr()
    assert distill("stage", "encode", recipe, *other, "--input", "selection=latest:toy") == 0
    (latents,) = [found for found in chain.store.manifests() if found.kind == "latents"]
    assert latents.lineage.inputs["selection"] == selection.identity
    assert distill("stage", "encode", recipe, *other, "--input", "selection=latest:moon") == 2
    assert "latest:moon: no artifact of its stage run select is in" in capsys.readouterr().err


def test_plan_says_what_encode_takes_on_disk(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    def cost() -> dict[str, object]:
        capsys.readouterr()
        assert distill("plan", chain.recipe_file(), "--json") == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)["encode"]
        return found

    unknown = {"latent_bytes_per_sample": None, "text_bytes_per_sample": None, "samples": None, "precomputed_bytes": None}
    assert cost().items() >= unknown.items()
    assert distill("plan", chain.recipe_file()) == 0
    assert "known once the teacher's configuration files are here" in " ".join(capsys.readouterr().out.split())
    for name, content in {
        "unet": {"sample_size": 8}, "vae": {"latent_channels": 4, "block_out_channels": [8, 8]}, "text_encoder": {"hidden_size": 10},
    }.items():  # fmt: skip
        (chain.folder / "teacher" / name).mkdir()
        (chain.folder / "teacher" / name / "config.json").write_text(json.dumps(content))
    (chain.folder / "teacher" / "tokenizer").mkdir()
    (chain.folder / "teacher" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    known = {"text": "precomputed", "latent_bytes_per_sample": 4 * 8 * 8 * 4, "text_bytes_per_sample": 77 * 10 * 4, "samples": None}
    assert cost().items() >= known.items()
    stages(chain, "ingest", "measure")
    counted = cost()
    assert counted["samples_by"] == "measure" and counted["samples_are_a_bound"] is True
    stages(chain, "select")
    counted = cost()
    samples = counted["samples"]
    assert isinstance(samples, int) and counted["samples_are_a_bound"] is False
    assert (counted["precomputed_bytes"], counted["on_the_fly_bytes"]) == (samples * (1024 + 3080), samples * 1024)
    assert distill("plan", chain.recipe_file()) == 0
    sentence = f"encode: 3.1 KB text + 1.0 KB latents a sample: {samples} samples"
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_plan_says_what_training_takes_of_a_devices_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text("url,caption\n")
    arguments = [
        "plan",
        str(ROOT / "recipes" / "tiny.yaml"),
        "--store",
        str(tmp_path / "store"),
        "--set",
        f"ingest.table={tmp_path / 'table.csv'}",
    ]
    arguments += ["--set", "lightning.chain=[8, 4]", "--set", "lightning.links={}"]
    teacher = f"teacher.source={ROOT / 'recipes' / 'tiny_teacher'}"

    def memory(*more: str) -> dict[str, dict[str, int]]:
        capsys.readouterr()
        assert distill(*arguments, "--json", "--set", teacher, *more) == 0
        return {row["name"]: row["memory"] for row in json.loads(capsys.readouterr().out)["stages"]}

    alone = memory()
    assert {name for name, found in alone.items() if found is not None} == {"lightning-8-4", "lcm"}
    one = alone["lightning-8-4"]
    parameters = one["student_bytes"]
    assert (one["teacher_bytes"], one["gradients_bytes"], one["optimizer_bytes"]) == (parameters, parameters, 2 * parameters)
    assert one["peak_bytes"] == sum(size for name, size in one.items() if name not in ("peak_bytes", "processes"))
    four = memory("--set", "lightning.world_size=4", "--set", "lightning.sharding=full")["lightning-8-4"]
    assert (four["student_bytes"], four["optimizer_bytes"], four["teacher_bytes"]) == (parameters // 4, parameters // 2, parameters)
    assert one["activations_bytes"] / four["activations_bytes"] == pytest.approx(4, rel=0.05)
    zero = memory(
        "--set", "lightning.world_size=4", "--set", "lightning.sharding=optimizer", "--set", "lightning.teacher_precision=bfloat16"
    )
    assert (zero["lightning-8-4"]["optimizer_bytes"], zero["lightning-8-4"]["student_bytes"]) == (parameters // 2, parameters)
    assert zero["lightning-8-4"]["teacher_bytes"] == parameters // 2
    assert distill(*arguments, "--set", teacher) == 0
    assert "memory: at most" in " ".join(capsys.readouterr().out.split())
    arguments[1] = str(ROOT / "recipes" / "tiny-teacher.yaml")  # from which the tiny teacher is
    capsys.readouterr()
    assert distill(*arguments, "--json", "--set", "lightning.batch_size=16") == 0
    trained = {row["name"]: row["memory"] for row in json.loads(capsys.readouterr().out)["stages"]}
    assert trained["lightning-8-4"] == one, "of a teacher that is yet to be trained"
    arguments[1] = str(ROOT / "recipes" / "tiny.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.bin").write_bytes(b"x")
    assert distill(*arguments, "--set", f"teacher.source={tmp_path / 'elsewhere'}") == 0
    assert "memory: of training is known once the teacher's configuration files are here" in " ".join(capsys.readouterr().out.split())


def test_a_stage_with_a_given_input_is_another_artifact(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    stages(chain, "ingest", "measure", "select", "teacher", "encode")
    assert distill("stage", "select", chain.recipe_file(), "--set", "select.min_sharpness=0.9") == 0
    other = next(
        manifest for manifest in chain.store.manifests() if manifest.kind == "selection" and 0.9 in manifest.lineage.config.values()
    )
    for name in ("selection", "select"):  # the field of the stage's inputs, or the run it stands for
        chain.runs()
        assert distill("stage", "encode", chain.recipe_file(), "--input", f"{name}={other.identity[:10]}") == 0
    made = [manifest for manifest in chain.store.manifests() if manifest.kind == "latents"]
    assert len(made) == 2
    assert {manifest.lineage.inputs["selection"] == other.identity for manifest in made} == {True, False}


def test_show_and_verify(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    stages(chain, "ingest")
    (manifest,) = chain.store.manifests()
    capsys.readouterr()
    assert distill("show", manifest.identity[:8]) == 0
    shown = capsys.readouterr().out
    assert "image_shards" in shown and "rows.txt" in shown and manifest.identity in shown
    assert distill("show", manifest.identity, "--json") == 0
    assert json.loads(capsys.readouterr().out)["identity"] == manifest.identity
    assert distill("show", manifest.identity, "--file", "rows.txt") == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("url,caption")
    assert distill("verify", manifest.identity) == 0
    capsys.readouterr()
    file = next((chain.folder / "store" / "artifacts").rglob("rows.txt"))
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert distill("verify", manifest.identity) == 1
    assert "rows.txt: expected SHA-256" in capsys.readouterr().err
    file.write_bytes(data[:-1])
    assert distill("verify", manifest.identity) == 1
    file.unlink()
    assert distill("verify", manifest.identity) == 1
    assert "found no object" in capsys.readouterr().err


def test_gc_says_first_and_deletes_when_told(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    stages(chain, "ingest")
    (manifest,) = chain.store.manifests()
    orphan = chain.folder / "store" / "artifacts" / manifest.identity / "files" / ("0" * 16) / "orphan.bin"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x" * 2048)
    os.utime(orphan, (1, 1))
    capsys.readouterr()
    assert distill("gc") == 0
    assert "orphan.bin" in capsys.readouterr().out and orphan.exists()
    assert distill("gc", "--delete") == 0
    assert "2.0 KiB deleted" in capsys.readouterr().out
    assert not orphan.exists()
    assert distill("verify", manifest.identity) == 0


def test_the_schema_is_one_that_editors_take(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(yaml.safe_load(Path(chain.recipe_file()).read_text()))))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "missing.yaml"], "recipe missing.yaml: cannot be read"),
        (["run", "toy.yaml", "--set", "select.colour=red"], "select.colour (--set): found 'red'; expected no such field here"),
        (["run", "toy.yaml", "--set", "seed"], "--set seed: expected section.field=value"),
        (["run", "toy.yaml", "--set", "ingest.table=gone.csv"], "gone.csv: nothing is there"),
        (["run", "toy.yaml", "--set", "ingest.table=headless.csv"], "headless.csv: has no column url"),
        (["run", "toy.yaml", "--set", "teacher.source=gone"], "gone: nothing is there"),
        (["run", "toy.yaml", "--set", "ingest.table=gopher://host/t.csv"], "gopher://host/t.csv: cannot be read"),
        (
            ["run", "toy.yaml", "--set", "ingest.table=s3://bucket/t.csv"],
            "s3://bucket/t.csv: cannot be read (Unable to locate credentials)",
        ),
        (["run", "toy.yaml", "--store", "ftp://host/x"], "unknown scheme 'ftp'"),
        (["run", "toy.yaml", "--store", "s3://"], "names no bucket"),
        (["run", "toy.yaml", "--store", "file:///proc/store"], "cannot be used"),
        (["run", "toy.yaml", "--device", "tpu"], "device 'tpu': expected cpu, cuda"),
        (["run", "toy.yaml", "--device", "cuda:99"], "this machine has"),
        (["stage", "publish", "toy.yaml"], "stage 'publish': is not in this recipe; expected one of ingest, measure, select"),
        (["stage", "encode", "toy.yaml", "--input", "images"], "--input images: expected NAME=ARTIFACT"),
        (
            ["stage", "encode", "toy.yaml", "--input", "pairs=abcdef"],
            "input 'pairs': is read by nothing here; expected one of images, selection, teacher",
        ),
        (["stage", "encode", "toy.yaml", "--input", "selection=abcdef"], "no such artifact"),
        (["show", "xyz"], "expected an identity, or its first 6 or more hex digits"),
        (["verify", "0" * 64], "no such artifact"),
        (["sample", "0" * 64, "--prompt", "a", "-o", "x.jpg"], "expected a file name that ends in .png"),
        (["sample", "0" * 64, "--prompt", "a", "-o", "no/x.png"], "the folder no does not exist"),
        (["run"], "Missing argument 'RECIPE'"),
        (["train", "toy.yaml"], "No such command 'train'"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(
    chain: ToyChain, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    chain.recipe_file()
    (chain.folder / "headless.csv").write_text("address,caption")
    assert distill(*arguments) == 2
    written = capsys.readouterr()
    assert expected in written.err and "Traceback" not in written.err and written.out == ""
    assert written.err.count("error:") + written.err.count("Error:") == 1
    assert chain.runs() == []


def test_everything_wrong_before_a_run_is_named_together(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    (chain.folder / "table.csv").write_text("address,caption")
    assert distill("run", chain.recipe_file(), "--device", "tpu") == 2
    shown = capsys.readouterr().err
    assert "device 'tpu'" in shown and "has no column url" in shown


def test_a_full_disk_is_told_before_work(chain: ToyChain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.preflight.MIN_FREE_BYTES", 2**60)
    assert distill("run", chain.recipe_file()) == 2
    assert "MiB free on its disk, expected at least" in capsys.readouterr().err


def test_an_input_of_another_kind_is_refused(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    stages(chain, "ingest", "measure", "select", "teacher")
    teacher = next(manifest for manifest in chain.store.manifests() if manifest.kind == "teacher")
    chain.runs()
    assert distill("stage", "encode", chain.recipe_file(), "--input", f"selection={teacher.identity}") == 2
    assert "encode: input selection is of another kind than the stage reads" in capsys.readouterr().err
    assert chain.runs() == []


@pytest.mark.parametrize(("error", "code"), [("RunFailed", 1), ("Transient", 1), ("BadInput", 2)])
def test_exit_codes_of_a_stage_that_fails(chain: ToyChain, capsys: pytest.CaptureFixture[str], error: str, code: int) -> None:
    chain.fail("ingest", error)
    assert distill("stage", "ingest", chain.recipe_file()) == code
    shown = capsys.readouterr().err
    assert "error: ingest was told to" in shown and "Traceback" not in shown


def test_a_mistake_of_the_program_keeps_its_traceback(chain: ToyChain) -> None:
    chain.fail("ingest", "ZeroDivisionError")
    code, _, shown = chain.run("stage", "ingest", chain.recipe_file())
    assert code == 1 and "Traceback" in shown and "ZeroDivisionError: ingest was told to" in shown


@pytest.mark.service
def test_a_chain_that_fails_says_why_in_one_sentence(chain: ToyChain, prefect_server: str) -> None:
    chain.fail("select", "RunFailed")
    code, _, shown = chain.run("run", chain.recipe_file(), server=prefect_server)
    assert code == 1 and shown.splitlines()[-1] == "error: select was told to" and "Traceback" not in shown, shown
    assert shown.count("select was told to") == 1, shown


def test_brackets_of_a_message_are_no_markup(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("stage", "encode", chain.recipe_file(), "--input", "[red]") == 2
    assert "--input [red]: expected" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("plan", "missing.yaml", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_input_names_the_stage_to_run(chain: ToyChain, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("stage", "encode", chain.recipe_file()) == 1
    assert "run that stage first" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_told(chain: ToyChain) -> None:
    code, _, shown = chain.run("run", chain.recipe_file(), server="http://127.0.0.1:9/api")
    assert code == 2 and "error: Prefect server http://127.0.0.1:9/api: does not answer" in shown and "Traceback" not in shown
    assert chain.runs() == []


def wait_for_step(chain: ToyChain, process: "subprocess.Popen[str]", step: int) -> None:
    file = chain.folder / "encode.step"
    for _ in range(1200):
        if file.exists() and (file.read_text() or "0").isdecimal() and int(file.read_text() or 0) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("the stage did not come that far")


@pytest.mark.service
@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
@pytest.mark.parametrize("command", ["run", "stage"])
def test_a_stopped_command_resumes_from_a_checkpoint(  # noqa: PLR0917 - the parameters of two axes
    chain: ToyChain, prefect_server: str, number: signal.Signals, code: int, word: str, command: str
) -> None:
    stages(chain, "ingest", "measure", "select", "teacher")
    chain.runs()
    arguments = ["run", chain.recipe_file()] if command == "run" else ["stage", "encode", chain.recipe_file()]
    process = chain.command(*arguments, server=prefect_server, TOY_SECONDS="0.2")
    wait_for_step(chain, process, 5)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    assert f"{word}: what was finished is kept" in shown
    ended, _, shown = chain.run(*arguments, server=prefect_server)
    assert ended == 0, shown
    assert int((chain.folder / "encode.start").read_text()) >= 5
    assert chain.runs() == ["encode", "encode"]


@pytest.mark.service
@pytest.mark.slow
def test_with_no_server_the_embedded_one_serves_and_dies_with_the_run(chain: ToyChain) -> None:
    process = chain.command("run", chain.recipe_file(), TOY_SECONDS="0.3")
    wait_for_step(chain, process, 3)
    servers = _children(process.pid)
    assert len(servers) == 1
    process.kill()  # nothing is saved: the lease is taken over and the stage begun again
    process.communicate()
    for _ in range(100):
        if not Path(f"/proc/{servers[0]}").exists() or "Z" in Path(f"/proc/{servers[0]}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the embedded server outlived kill -9 of its run")
    code, output, shown = chain.run("run", chain.recipe_file())
    assert code == 0, shown
    assert chain.runs() == ["ingest", "measure", "select", "teacher", "encode", "encode"]
    assert "found" in output and "made" in output
    code, output, shown = chain.run("run", chain.recipe_file())
    assert (code, chain.runs()) == (0, []), shown


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found
