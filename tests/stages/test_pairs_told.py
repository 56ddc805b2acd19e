"""What the command line tells of pairs: `distill verify --recompute`, and the cost in `distill plan`."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flows.cli import main
from schemas.manifest import Manifest, Pairs
from schemas.pairs import PairsConfig
from stages.encoded_size import EncodedSize
from stages.pairs.recompute import drawn_with, recompute, spread
from stages.pairs_cost import PairsCost, pairs_cost
from stages.plan import make_plan, nodes_of
from tests import tiny_pipelines
from tests.stages.test_pairs import CONFIG, Place, make_place
from tests.workspaces import make_workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("told"), "sd15")


@pytest.fixture(scope="module")
def made(place: Place) -> Manifest[Pairs]:
    return place.run("made")


def distill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def tampered(place: Place, made: Manifest[Pairs], tensor: str, pair: int, change: float) -> Manifest[Pairs]:
    """The artifact with one number changed, its manifest in order."""
    workspace = make_workspace(place.folder, place.store, identity=f"other {tensor}")
    shard, row = divmod(pair, made.content.shard_pairs)
    with workspace.folder("tampered") as folder:
        shutil.copytree(workspace.fetch(made), folder, dirs_exist_ok=True)
        path = folder / f"pairs-{shard:05d}.safetensors"
        tensors = load_file(path)
        tensors[tensor][row, 0, 0, 0] += change
        path.unlink()
        save_file(tensors, path)
        return workspace.publish(folder, made.content)


@pytest.mark.usefixtures("restored_process")
class TestVerify:
    def verify(self, place: Place, manifest: Manifest[Any], *more: str) -> int:
        return distill("verify", manifest.identity, "--store", f"file://{place.folder / 'store'}", *more)

    def test_pairs_drawn_again_have_equal_bits(self, place: Place, made: Manifest[Pairs], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.verify(place, made, "--recompute", "3") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "5 files are as the manifest says" in said and "3 of 17 pairs drawn again: equal bits" in said

    def test_one_that_differs_is_named(self, place: Place, made: Manifest[Pairs], capsys: pytest.CaptureFixture[str]) -> None:
        other = tampered(place, made, "outputs", 11, 0.5)
        assert self.verify(place, other) == 0, "its bytes are those of its manifest"
        assert self.verify(place, other, "--recompute", "17") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert f"pairs {other.identity[:12]}: pair 11 differs when it is drawn again: its output by 0.0" in said
        noise = tampered(place, made, "noise", 15, 1e-3)
        assert self.verify(place, noise, "--recompute", "17") == 1
        assert "pair 15 differs when it is drawn again: its noise is not that of seed 7" in " ".join(capsys.readouterr().err.split())
        assert self.verify(place, noise, "--recompute", "17", "--remove") == 0
        assert place.store.find(noise.identity) is None

    def test_what_is_no_pairs_is_refused(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.verify(place, place.latents, "--recompute", "1") == 2
        assert "is of the kind latents; expected pairs" in " ".join(capsys.readouterr().err.split())


def test_small_changes_of_what_was_asked_are_found(place: Place, made: Manifest[Pairs]) -> None:
    for change in ({"guidance_scale": 3.05}, {"steps": 5}, {"sampler": "pndm"}):
        other = made.model_copy(update={"content": made.content.model_copy(update=change)})
        with pytest.raises(Exception, match="pair 0 differs when it is drawn again: its output by"):
            recompute(other, place.store, 1)


@given(st.integers(1, 60), st.integers(1, 40))
def test_pairs_are_spread_over_all(count: int, pairs: int) -> None:
    found = spread(count, pairs)
    assert len(set(found)) == len(found) == min(count, pairs)
    assert found[0] == 0 and (count == 1 or found[-1] == pairs - 1)
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_batches_are_counted_from_the_beginning_of_each_shard(pairs: int, shard_pairs: int, batch_size: int) -> None:
    content = Pairs(
        pairs=pairs, shards=-(-pairs // shard_pairs), latent_shape=(1, 1, 1), teacher="0" * 64, latents="0" * 64, sampler="ddim", steps=1,
        guidance_scale=1, seed=0, batch_size=batch_size, shard_pairs=shard_pairs,
    )  # fmt: skip
    for pair in range(pairs):
        batch = drawn_with(content, pair)
        assert pair in batch and 0 < len(batch) <= batch_size and batch.stop <= pairs
        assert {other // shard_pairs for other in batch} == {pair // shard_pairs}
        assert all(drawn_with(content, other) == batch for other in batch)
        assert batch.start % shard_pairs % batch_size == 0


@pytest.mark.usefixtures("restored_process")
class TestPlan:
    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Path:
        (tmp_path / "table.csv").write_text("url,caption\n")
        sections = {
            "name": "told",
            "ingest": {"table": str(tmp_path / "table.csv")},
            "teacher": {"source": str(tiny_pipelines.save("sdxl", tmp_path / "teacher"))},
            "pairs": {"count": 1000, "sampler": "heun", "steps": 10, "batch_size": 2},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
        return tmp_path / "recipe.yaml"

    def test_passes_bytes_and_hours_by_a_pass_that_is_timed(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def told(*more: str) -> dict[str, Any]:
            capsys.readouterr()
            assert distill("plan", str(recipe), "--store", str(recipe.parent / "store"), "--json", *more) == 0
            found: dict[str, Any] = json.loads(capsys.readouterr().out)["pairs"]
            return found

        found = told()
        assert (found["pairs"], found["network_passes"], found["hours"]) == (1000, 1000 * 19 * 2, None)
        assert found["bytes"] == pytest.approx(1000 * 2 * 4 * 8 * 8 * 4, rel=0.05)
        timed = told("--device", "cpu")
        assert 1e-4 < timed["hours"] < 10 and timed["hours_by"].startswith("a call for 2 pairs takes")
        assert told("--set", "pairs.guidance_scale=1")["network_passes"] == 1000 * 19
        assert told("--set", "pairs=null") is None
        assert distill("plan", str(recipe), "--store", str(recipe.parent / "store"), "--device", "cuda:99") == 2

    def test_shards_that_a_killed_run_has_kept_tell_the_hours(self, place: Place) -> None:
        recipe = _recipe()
        plan = make_plan(recipe, lambda _: "0" * 64)
        for number, seconds in enumerate((30.0, 60.0)):
            (place.folder / "empty").mkdir(exist_ok=True)
            place.store.save_part(plan.identities["pairs"], f"pairs-{number:05d}", place.folder / "empty", {"pairs": 5, "seconds": seconds})
        cost = pairs_cost(plan, lambda _: None, place.store, EncodedSize(1000, 500), None)
        assert cost is not None and cost.hours == pytest.approx(17 * 9 / 3600) and cost.bytes == 17 * 2000
        assert cost.source == "by 10 pairs that are drawn"

    def test_in_words(self) -> None:
        config = PairsConfig()
        cost = PairsCost(config, 2 * 4 * 128 * 128 * 4, 2.0, "a call for 16 pairs takes 0.6 s on cuda")
        assert cost.sentence() == (
            "pairs: 500,000 by pndm in 50 steps, guided by 3: 51,000,000 passes of the network, 262 GB, "
            "278 hours for one process (a call for 16 pairs takes 0.6 s on cuda)"
        )
        unknown = PairsCost(config.model_copy(update={"guidance_scale": 1.0}), None, None, "hours known with --device, which times a pass")
        assert unknown.sentence() == (
            "pairs: 500,000 by pndm in 50 steps, unguided: 25,500,000 passes of the network, "
            "bytes known once the teacher's configuration files are here, hours known with --device, which times a pass"
        )


def _recipe() -> Any:
    from schemas.loading import parse_recipe

    data = {"name": "x", "ingest": {"table": "t"}, "teacher": {"source": "t"}, "pairs": CONFIG.model_dump(mode="json")}
    recipe = parse_recipe(data)
    assert "pairs" in {node.name for node in nodes_of(recipe)}
    return recipe
