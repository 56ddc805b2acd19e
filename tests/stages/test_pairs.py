"""`pairs` with tiny random teachers: parity with diffusers' pipelines, the reader, processes that die, what is refused."""

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.errors import BadInput, RunFailed
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.loading import parse_recipe
from schemas.manifest import Latents, Manifest, Pairs, Teacher
from schemas.pairs import PairsConfig
from schemas.share import Share
from stages import lcm, lightning
from stages.diffusion.sampling import image_generator
from stages.pairs import Inputs, PairSet, preflight, run, run_share
from stages.pairs import stage as stage_module
from stages.pairs.draw import Drawer, pair_noise
from stages.plan import nodes_of
from stages.training.latent_batches import reader
from tests import tiny_pipelines
from tests.stages.killed import Job, parts_of, run_until_it_dies
from tests.stages.killed import run as run_job
from tests.stages.pictures import hashes
from tests.training.artifacts import CAPTIONS, make_latents, make_teacher
from tests.workspaces import make_workspace, open_store

CONFIG = PairsConfig(count=17, sampler="ddim", steps=4, guidance_scale=3.0, batch_size=3, shard_pairs=5)
SAMPLERS: dict[str, Any] = {
    "ddim": lambda config: diffusers.DDIMScheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    ),
    "pndm": lambda config: diffusers.PNDMScheduler.from_config(
        config, timestep_spacing="trailing", skip_prk_steps=True, set_alpha_to_one=True
    ),
    "heun": lambda config: diffusers.HeunDiscreteScheduler.from_config(config, timestep_spacing="trailing"),
    "dpmpp": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    ),
}
"""As a person would make them of a pipeline's own scheduler."""


@dataclass(frozen=True)
class Place:
    """A teacher and an encoded set on a store."""

    folder: Path
    kind: tiny_pipelines.Kind
    teacher: Manifest[Teacher]
    latents: Manifest[Latents]

    @property
    def store(self) -> ArtifactStore:
        return open_store(self.folder)

    def run(self, identity: str = "", config: PairsConfig = CONFIG, *, seed: int = 7, **changes: Any) -> Manifest[Pairs]:
        config = config.model_copy(update=changes)
        workspace = make_workspace(self.folder, self.store, identity=identity or f"{config!r} {seed}", seed=seed)
        return run(config, Inputs(teacher=self.teacher, latents=self.latents), workspace)

    def open(self, manifest: Manifest[Pairs]) -> PairSet:
        return PairSet.open(manifest, make_workspace(self.folder, self.store))

    def job(self, identity: str, **changes: Any) -> Job:
        config = CONFIG.model_copy(update=changes).model_dump(mode="json")
        inputs = {"teacher": self.teacher.identity, "latents": self.latents.identity}
        return Job(stage="pairs", config=config, inputs=inputs, folder=str(self.folder), identity=identity, seed=7)


def make_place(folder: Path, kind: tiny_pipelines.Kind) -> Place:
    teacher = make_teacher(folder, kind)
    return Place(folder, kind, teacher, make_latents(folder, teacher))


@pytest.fixture(scope="module", params=tiny_pipelines.KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("pairs"), "sdxl")


@pytest.fixture(scope="module")
def made(place: Place) -> Manifest[Pairs]:
    return place.run("made")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, by the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_outputs_are_those_of_diffusers_own_pipeline(each: Place, sampler: str, guidance_scale: float) -> None:
    pairs = each.open(each.run(sampler=sampler, steps=5, count=4, guidance_scale=guidance_scale))
    noise, outputs, _ = pairs.pairs(range(4))
    pipeline = tiny_pipelines.build(each.kind)
    pipeline.scheduler = SAMPLERS[sampler](pipeline.scheduler.config)
    captions = pairs.captions.to_pylist()
    assert captions == list(CAPTIONS[:4])
    drawn = pipeline(captions, latents=noise, num_inference_steps=5, guidance_scale=guidance_scale, output_type="latent").images
    torch.testing.assert_close(outputs, drawn, rtol=1e-4, atol=1e-4)
    assert relative(outputs, drawn) < 1e-4 and drawn.std() > 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_a_pair_can_be_drawn_again_alone(place: Place, made: Manifest[Pairs]) -> None:
    pairs = place.open(made)
    noise, outputs, conditioning = pairs.pairs([13])
    drawer = Drawer(place.store.fetch(place.teacher), made.content, "cpu")
    again, alone = drawer.draw([13], conditioning.with_time_ids(None), pairs.unconditional(1))
    assert torch.equal(again, noise) and torch.equal(noise, pair_noise(7, [13], made.content.latent_shape))
    torch.testing.assert_close(alone, outputs, rtol=1e-4, atol=1e-5)


def test_noise_is_not_that_of_an_evaluation() -> None:
    ours = pair_noise(3, [0, 1], (4, 8, 8))
    theirs = torch.randn(4, 8, 8, generator=image_generator(3, 0))
    assert not torch.equal(ours[0], theirs) and not torch.equal(ours[0], ours[1])


def test_the_artifact_says_what_it_holds(place: Place, made: Manifest[Pairs]) -> None:
    folder = place.store.fetch(made)
    index = pq.read_table(folder / "index.parquet").to_pylist()
    assert [row["pair"] for row in index] == list(range(17))
    assert [row["sample"] for row in index] == [*range(13), *range(4)], "captions are gone through again"
    assert [row["caption"] for row in index] == [*CAPTIONS, *CAPTIONS[:4]]
    assert [(row["shard"], row["row"]) for row in index[4:6]] == [("pairs-00000.safetensors", 4), ("pairs-00001.safetensors", 0)]
    assert {entry.path for entry in made.files} == {"index.parquet", *(f"pairs-{number:05d}.safetensors" for number in range(4))}
    shard = load_file(folder / "pairs-00003.safetensors")
    assert set(shard) == {"noise", "outputs"}
    assert all(tensor.shape == (2, 4, 8, 8) and tensor.dtype == torch.float32 for tensor in shard.values())
    content = made.content
    assert (content.pairs, content.shards, content.batch_size, content.seed) == (17, 4, 3, 7)
    assert content.time_ids == (16, 16, 0, 0, 16, 16)


def test_the_reader_gives_any_pairs_in_any_order(place: Place, made: Manifest[Pairs]) -> None:
    pairs = place.open(made)
    wanted = [16, 0, 5, 5, 3]
    noise, outputs, conditioning = pairs.pairs(wanted)
    for at, pair in enumerate(wanted):
        one = pairs.pairs([pair])
        assert torch.equal(noise[at], one[0][0]) and torch.equal(outputs[at], one[1][0])
        assert torch.equal(conditioning.prompt_embeds[at], one[2].prompt_embeds[0])
    assert torch.equal(conditioning.prompt_embeds[0], pairs.pairs([3])[2].prompt_embeds[0]), "the same caption"
    assert len(pairs) == 17 and pairs.latent_shape == (4, 8, 8)
    batch = reader(pairs)(wanted)
    assert torch.equal(batch.latents, outputs) and batch.conditioning.time_ids is not None
    assert batch.conditioning.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 5
    nothing = pairs.unconditional(2, conditioning.time_ids[:2] if conditioning.time_ids is not None else None)
    assert not nothing.prompt_embeds.any() and nothing.batch == 2
    assert torch.equal(pickle.loads(pickle.dumps(pairs)).pairs(wanted)[1], outputs)
    with pytest.raises(IndexError, match="pair 17: expected 0 to 16"):
        pairs.pairs([17])


@pytest.mark.slow
def test_killed_and_gone_on_with_by_two_processes_it_makes_the_bytes_of_one(place: Place, made: Manifest[Pairs]) -> None:
    job = place.job("killed")
    run_until_it_dies(job.model_copy(update={"die_after_parts": 2}))
    assert parts_of(job) == ["pairs-00000", "pairs-00001"]
    finished = run_job(job.model_copy(update={"config": job.config | {"processes": 2}}))
    assert hashes(finished) == hashes(made) and finished.content == made.content


def test_what_is_kept_is_not_drawn_again(place: Place, made: Manifest[Pairs], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = Drawer.draw

    def dying(self: Drawer, pairs: Any, *rest: Any) -> Any:
        drawn.extend(pairs)
        if 10 in pairs and len(drawn) == 13:
            raise KeyboardInterrupt
        return draw(self, pairs, *rest)

    monkeypatch.setattr(Drawer, "draw", dying)
    with pytest.raises(KeyboardInterrupt):
        place.run("interrupted")
    assert hashes(place.run("interrupted")) == hashes(made)
    assert drawn == [*range(13), *range(10, 17)]


def test_shares_make_the_bytes_of_one_run(place: Place, made: Manifest[Pairs]) -> None:
    inputs = Inputs(teacher=place.teacher, latents=place.latents)
    for share, kept in ((Share(3, 3), [2]), (Share(1, 3), [0, 2, 3])):
        run_share(CONFIG, inputs, make_workspace(place.folder, place.store, identity="shared", seed=7), share)
        parts = place.store.parts(digest("shared"))
        assert [part.name for part in parts] == [f"pairs-{number:05d}" for number in kept]
    finished = place.run("shared")
    assert hashes(finished) == hashes(made) and finished.content == made.content


def test_workers_draw_with_one_batch_size() -> None:
    assert PairsConfig(batch_size=3, workers=2).identity_fields() == PairsConfig(batch_size=3).identity_fields()
    with pytest.raises(ValidationError, match=r"batch_size\n.*fits each of the 2 workers"):
        PairsConfig(workers=2)


def test_text_that_is_made_on_the_fly_is_made_when_it_is_drawn(place: Place, made: Manifest[Pairs], tmp_path: Path) -> None:
    source = place.store.fetch(place.latents)
    kept = {name: tensor for name, tensor in load_file(source / "latents-00000.safetensors").items() if name in ("latents", "time_ids")}
    save_file(kept, tmp_path / "latents-00000.safetensors")
    shutil.copyfile(source / "unconditional.safetensors", tmp_path / "unconditional.safetensors")
    index = pq.read_table(source / "index.parquet")
    none = {"text_shard": pa.nulls(len(CAPTIONS), pa.string()), "text_row": pa.nulls(len(CAPTIONS), pa.int64())}
    for name, column in none.items():
        index = index.set_column(index.column_names.index(name), name, column)
    pq.write_table(index, tmp_path / "index.parquet")
    content = place.latents.content.model_copy(update={"text": "on_the_fly"})
    latents = make_workspace(place.folder, place.store, identity="on the fly").publish(tmp_path, content)
    pairs = place.open(replace(place, latents=latents).run("of text on the fly"))
    (noise, outputs, text), expected = pairs.pairs(range(17)), place.open(made).pairs(range(17))
    assert torch.equal(noise, expected[0])
    torch.testing.assert_close(outputs, expected[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(text.prompt_embeds, expected[2].prompt_embeds, rtol=1e-4, atol=1e-5)


def test_processes_are_no_part_of_the_identity_and_the_batch_is() -> None:
    assert CONFIG.model_copy(update={"processes": 8}).identity_fields() == CONFIG.identity_fields()
    assert CONFIG.model_copy(update={"batch_size": None}).identity_fields() != CONFIG.identity_fields()


def test_bfloat16_is_near_float32_and_is_stored_in_float32(place: Place, made: Manifest[Pairs]) -> None:
    wide = place.open(made).pairs(range(17))[1]
    low = place.open(place.run(precision="bfloat16")).pairs(range(17))[1]
    assert low.dtype == torch.float32
    assert 0 < float((low - wide).std() / wide.std()) < 0.05


class TestBatchOfADevice:
    def test_what_fits_is_found_once_and_kept(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        fits = 4
        draw = stage_module.loaded_drawer

        def small(work: Any) -> Drawer:
            drawer = draw(work)
            denoiser = drawer.denoiser

            class Small:
                schedule, prediction = denoiser.schedule, denoiser.prediction

                def __call__(self, x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
                    sizes.append(len(x_t) // 2)
                    if len(x_t) > 2 * fits:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
                    return denoiser(x_t, *rest)

            drawer.denoiser = Small()
            return drawer

        monkeypatch.setattr(stage_module, "loaded_drawer", small)
        monkeypatch.setattr("stages.pairs.shard.Drawer.__init__", _on_cpu(Drawer.__init__))
        config = CONFIG.model_copy(update={"batch_size": None, "shard_pairs": 16})
        workspace = make_workspace(place.folder, place.store, identity="trial", seed=7, device="meta")  # any device but the CPU is tried
        found = run(config, Inputs(teacher=place.teacher, latents=place.latents), workspace)
        assert sizes == [16, 8, 4] and found.content.batch_size == 4
        assert {part.name: part.note for part in workspace.parts()}["batch-size"] == {"pairs": 4}
        expected = place.run("by four", batch_size=4, shard_pairs=16)
        assert hashes(found) == hashes(expected)

    def test_a_run_that_goes_on_on_a_cpu_keeps_the_batch_of_the_gpu(self, place: Place) -> None:
        workspace = make_workspace(place.folder, place.store, identity="gone on with", seed=7)
        (place.folder / "empty").mkdir(exist_ok=True)
        workspace.save_part("batch-size", place.folder / "empty", {"pairs": 2})
        found = place.run("gone on with", batch_size=None, count=5)
        assert found.content.batch_size == 2
        assert place.run("cpu", batch_size=None, count=5).content.batch_size == 16

    def test_where_one_pair_does_not_fit_it_says_what_helps(self, place: Place, made: Manifest[Pairs]) -> None:
        drawer = Drawer(place.store.fetch(place.teacher), made.content, "cpu")
        drawer.denoiser = _Failing(drawer.denoiser)
        pairs = place.open(made)
        with pytest.raises(RunFailed, match=r"one pair does not fit the memory of cpu: expected pairs\.precision bfloat16"):
            drawer.fitting(8, pairs.unconditional(1))
        texts = pairs.pairs(range(6))[2].with_time_ids(None)
        with pytest.raises(RunFailed, match=r"6 together do not fit the memory of cpu any more; expected pairs\.batch_size of at most 3"):
            drawer.draw(range(6), texts, pairs.unconditional(1))


class _Failing:
    """A network that memory never suffices for."""

    def __init__(self, denoiser: Any) -> None:
        self.schedule, self.prediction = denoiser.schedule, denoiser.prediction

    def __call__(self, *_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _on_cpu(init: Any) -> Any:
    return lambda self, teacher, content, _device: init(self, teacher, content, "cpu")


class TestRefused:
    def test_an_output_that_is_not_finite_is_named(self, place: Place, made: Manifest[Pairs]) -> None:
        drawer = Drawer(place.store.fetch(place.teacher), made.content, "cpu")
        pairs = place.open(made)
        texts = pairs.pairs([3, 4])[2].with_time_ids(None)
        texts.prompt_embeds[1] = torch.nan
        with pytest.raises(RunFailed, match="the output of pair 4 is not finite"):
            drawer.draw([3, 4], texts, pairs.unconditional(1))

    def test_latents_of_another_teacher(self, place: Place) -> None:
        other = place.latents.model_copy(update={"content": place.latents.content.model_copy(update={"teacher": "f" * 64})})
        with pytest.raises(BadInput, match="latents: made with the teacher ffffffffffff"):
            run(CONFIG, Inputs(teacher=place.teacher, latents=other), make_workspace(place.folder, place.store, identity="other"))

    def test_a_set_whose_text_is_gone_names_what_is_missing(self, place: Place, made: Manifest[Pairs]) -> None:
        gone = made.model_copy(update={"content": made.content.model_copy(update={"latents": "e" * 64})})
        with pytest.raises(BadInput, match=r"the encoded set eeeeeeeeeeee, whose text they were drawn with, is not on"):
            place.open(gone)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"steps": 30}, r"pairs\.steps: found 30; the sampler would leave its own grid: expected a divisor of 1000, such as 25 or 40"),
            ({"guidance_scale": 0.5}, r"pairs\.guidance_scale: found 0\.5; expected: input should be greater than or equal to 1"),
            ({"sampler": "euler"}, r"pairs\.sampler: found 'euler'; expected: input should be 'ddim', 'pndm', 'heun' or 'dpmpp'"),
            ({"count": 0}, r"pairs\.count: found 0"),
        ],
    )
    def test_a_wrong_section_is_named(self, section: dict[str, Any], message: str) -> None:
        with pytest.raises(BadInput, match=message):
            parse_recipe({"name": "x", "ingest": {"table": "t"}, "teacher": {"source": "t"}, "pairs": section})

    def test_a_sampler_that_cannot_take_the_teacher_is_found_before_anything_runs(self, tmp_path: Path) -> None:
        pipeline = tiny_pipelines.build("sd2-v")
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        pipeline.save_pretrained(tmp_path / "teacher")
        recipe = parse_recipe({"name": "x", "ingest": {"table": "t"}, "teacher": {"source": str(tmp_path / "teacher")}, "pairs": {}})
        assert recipe.pairs is not None
        with pytest.raises(BadInput, match="sampler 'pndm': knows no rescale_betas_zero_snr"):
            preflight(recipe.pairs, {}, recipe)
        preflight(recipe.pairs.model_copy(update={"sampler": "dpmpp"}), {}, recipe)


def test_it_stands_after_encode_and_changes_no_other_run() -> None:
    data: dict[str, Any] = {"name": "x", "ingest": {"table": "t"}, "teacher": {"source": "t"}, "lcm": {}}
    without, with_pairs = nodes_of(parse_recipe(data)), nodes_of(parse_recipe(data | {"pairs": {}}))
    assert [node for node in with_pairs if node.stage != "pairs"] == list(without)
    (node,) = (node for node in with_pairs if node.stage == "pairs")
    assert node.inputs == {"teacher": "teacher", "latents": "encode"}


@given(st.sampled_from(["ddim", "pndm", "heun", "dpmpp"]), st.sampled_from([n for n in range(1, 1001) if 1000 % n == 0]))
def test_the_recipe_knows_how_often_the_network_is_called(sampler: Any, steps: int) -> None:
    config = PairsConfig(sampler=sampler, steps=steps)
    scheduler = SAMPLERS[sampler]({"num_train_timesteps": 1000})
    scheduler.set_timesteps(steps)
    assert config.network_calls == len(scheduler.timesteps)
    assert config.passes == 2 * config.network_calls and config.model_copy(update={"guidance_scale": 1}).passes == config.network_calls


class TestTrainingOnThem:
    SETTINGS: Final[Mapping[str, Any]] = {"training_steps": 2, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}

    def loss(self, place: Place, latents: Manifest[Any], method: str) -> list[float]:
        workspace = make_workspace(place.folder, place.store, identity=f"{method} on {latents.kind}")
        if method == "lightning":
            link = LinkConfig.model_validate(dict(self.SETTINGS) | {"teacher_steps": 8, "steps": 4, "guidance_scale": 6.0})
            student = lightning.run(link, lightning.Inputs(teacher=place.teacher, latents=latents), workspace)
        else:
            config = LcmConfig.model_validate(dict(self.SETTINGS) | {"lora_rank": 4, "lora_alpha": 4, "steps": [4], "warmup_steps": 0})
            student = lcm.run(config, lcm.Inputs(teacher=place.teacher, latents=latents), workspace)
        found: list[float] = pq.read_table(place.store.fetch(student) / "metrics.parquet")["student.loss"].to_pylist()
        return found

    @pytest.mark.parametrize("method", ["lightning", "lcm"])
    def test_a_student_learns_from_what_the_teacher_drew(self, place: Place, made: Manifest[Pairs], method: str) -> None:
        assert self.loss(place, made, method) != self.loss(place, place.latents, method)

    def test_the_recipe_says_so_and_nothing_else_changes(self) -> None:
        data: dict[str, Any] = {"name": "x", "ingest": {"table": "t"}, "teacher": {"source": "t"}, "pairs": {}}
        students: dict[str, Any] = {"lightning": {"chain": [8, 4]}, "lcm": {}}
        plain = {node.name: node for node in nodes_of(parse_recipe(data | students))}
        drawn = {
            node.name: node for node in nodes_of(parse_recipe(data | {name: s | {"latents": "pairs"} for name, s in students.items()}))
        }
        assert {name for name in plain if plain[name].inputs != drawn[name].inputs} == {"lightning-8-4", "lcm"}
        for name, node in plain.items():
            assert node.config.identity_fields() == drawn[name].config.identity_fields()
            assert "latents" not in node.config.identity_fields()
            assert drawn[name].inputs == node.inputs | ({"latents": "pairs"} if name in ("lightning-8-4", "lcm") else {})
        for name, section in students.items():
            with pytest.raises(BadInput, match=rf"{name}\.latents: found 'pairs'; no stage draws them: expected a section pairs"):
                parse_recipe({key: value for key, value in data.items() if key != "pairs"} | {name: section | {"latents": "pairs"}})
