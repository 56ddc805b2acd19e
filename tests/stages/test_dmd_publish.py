"""Students of distribution matching, evaluated and published: the card's code draws what was measured, at a timestep of their own too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.lightning import trailing_timesteps
from stages.diffusion.sampling import image_generator
from stages.sample import read_description, sample
from tests.cards import run_snippet
from tests.stages.test_publish import PROMPTS, PUBLISH, SEED, Published


class Matched(Published):
    """A student of one step at timestep 399, and one of four."""

    def make_students(self) -> dict[str, Any]:
        facts = {"stage": "dmd", "sampler": "lcm-trailing"}
        return {
            "dmd": self.chain.unet(1, timesteps={1: (399,)}, method="dmd", **facts),
            "dmd-4": self.chain.unet(4, timesteps={4: trailing_timesteps(4)}, method="dmd2", **facts),
        }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Matched:
    return Matched(tmp_path_factory.mktemp("matched"), "sdxl")


@pytest.mark.parametrize(
    ("heading", "model", "steps", "timesteps"), [("dmd-1step", "dmd", 1, [399]), ("dmd-4step", "dmd-4", 4, [999, 749, 499, 249])]
)
def test_the_cards_code_draws_what_was_measured_bit_for_bit(
    *, published: Matched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str, model: str, steps: int, timesteps: list[int]
) -> None:
    names = run_snippet(published.folder, PUBLISH.name, heading, tmp_path, monkeypatch)
    pipeline = names["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=1.0, generator=[image_generator(SEED, 0), image_generator(SEED, 1)]
    ).images
    measured = published.measured(model, steps)
    assert [int(timestep) for timestep in pipeline.scheduler.timesteps] == timesteps
    assert np.array_equal(np.stack([np.asarray(picture) for picture in drawn]), measured)
    assert measured[0].std() > 0
    ours = sample(published.folder, names["prompt"], steps=steps, seed=0)
    assert np.array_equal(np.asarray(ours), np.asarray(names["image"]))


def test_they_are_rows_of_the_table_and_variants_of_the_model(published: Matched) -> None:
    assert {"dmd@1", "dmd-4@4"} <= set(published.evaluation.content.scores)
    variants = read_description(published.folder).variants
    assert {name: (variant.method, variant.sampler, variant.scheduler) for name, variant in variants.items()} == {
        "dmd-1step": ("dmd", "lcm-trailing", "LCMScheduler"),
        "dmd-4step": ("dmd2", "lcm-trailing", "LCMScheduler"),
    }
