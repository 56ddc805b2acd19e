"""SDXL-Lightning's whole chain from pictures to a published model: what is in it, that its card's code draws what was measured, a phase alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.manifest import Manifest
from stages.diffusion.sampling import image_generator
from stages.pictures import decode_rgb
from stages.sample import sample
from stages.shards import read_samples
from tests.cards import run_snippet, snippets
from tests.e2e.conftest import Nano
from tests.e2e.nano import ADVERSARIAL_NODES, Place

pytestmark = [pytest.mark.slow, pytest.mark.service]

UNETS, LORAS = (8, 4, 2, 1), (8, 4, 2)
LORA_ALONE = "lightning-4-2-lora"
"""A phase in the middle of the chain."""
RUN_FLOW = "import sys; from flows.single import SINGLE_STAGES as flows; flows['lightning'](sys.argv[1], run=sys.argv[2])"
"""What Prefect runs for the deployment of the stage."""


def test_published_are_the_loras_and_unets_that_sdxl_lightning_released(adversarial: Place) -> None:
    manifests = adversarial.manifests()
    assert set(manifests) == set(ADVERSARIAL_NODES)
    folder = adversarial.store.fetch(manifests["publish"])
    description = json.loads((folder / "distillery.json").read_text())
    variants = {name: (v["kind"], v["method"], v["steps"], v["prediction_type"], v["node"]) for name, v in description["variants"].items()}
    link = {8: "16-8", 4: "8-4", 2: "4-2", 1: "2-1"}
    expected = {
        f"lightning-{n}step": ("unet", "lightning", [n], "sample" if n == 1 else "epsilon", f"lightning-{link[n]}-unet") for n in UNETS
    }
    expected |= {f"lightning-{n}step-lora": ("lora", "lightning", [n], "epsilon", f"lightning-{link[n]}-lora") for n in LORAS}
    expected["lightning-16step"] = ("unet", "lightning-mse", [16], "epsilon", "lightning-32-16-unet")
    expected["lcm-lora"] = ("lora", "lcm", [4, 2], "epsilon", "lcm")
    assert variants == expected
    card = (folder / "README.md").read_text()
    assert set(snippets(card)) == {*expected, "The teacher's pipeline"}
    assert "| `lightning-16step` | UNet | lightning-mse | 16 |" in card and "| `lightning-8step-lora` | LoRA | lightning | 8 |" in card


def test_the_report_tells_the_students_of_a_step_count_apart(adversarial: Place) -> None:
    report = json.loads((adversarial.store.fetch(adversarial.manifests()["evaluate"]) / "report.json").read_text())
    found = [(row["family"], row["steps"]) for row in report["rows"] if row["model"] != "teacher"]
    expected = [("lightning", n) for n in UNETS] + [("lightning-lora", n) for n in LORAS] + [("lightning-mse", 16)]
    assert found == [("lcm-lora", 4), ("lcm-lora", 2), *expected]


def test_the_cards_code_and_sample_draw_what_was_measured(adversarial: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, of every variant: the card's pipeline on the noise of the evaluation, and a sample on the card's."""
    manifests = adversarial.manifests()
    published, measured = (adversarial.store.fetch(manifests[name]) for name in ("publish", "evaluate"))
    for name, variant in json.loads((published / "distillery.json").read_text())["variants"].items():
        names = run_snippet(published, "nano-lightning", name, tmp_path, monkeypatch)
        steps = variant["steps"][0]
        kept = list(read_samples(measured / "samples" / f"{variant['node']}-at-{steps}" / "shard-00000.tar"))[:4]  # a batch
        drawn = names["pipeline"](
            [stored.caption for stored in kept],
            num_inference_steps=steps,
            guidance_scale=1,
            generator=[image_generator(stored.row["seed"], stored.row["index"]) for stored in kept],
        ).images
        assert np.array_equal(pixels(drawn), pixels([decode_rgb(stored.image)[0] for stored in kept])), name
        assert np.array_equal(pixels([sample(published, names["prompt"], steps=steps, variant=name)]), pixels([names["image"]])), name


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    """Pictures (B, H, W, 3)."""
    return np.stack([np.asarray(picture) for picture in pictures])


def test_a_phase_alone_is_made_again_and_nothing_else(nano: Nano, adversarial: Place, tmp_path: Path) -> None:
    place, before = nano.copied(adversarial, tmp_path), adversarial.manifests()
    place.store.remove(before[LORA_ALONE].identity)
    assert unfinished(place) == {LORA_ALONE}
    assert place.run("stage", LORA_ALONE, str(place.recipe)).started == [LORA_ALONE]
    assert_only_made_again(place.manifests(), before, LORA_ALONE)

    place.store.remove(before[LORA_ALONE].identity)
    assert "lightning 4→2 lora" in place.run(str(place.recipe), LORA_ALONE, program=RUN_FLOW).told
    assert_only_made_again(place.manifests(), before, LORA_ALONE)
    assert unfinished(place) == set()


def unfinished(place: Place) -> set[str]:
    """Names of the runs that `distill plan` says would run."""
    rows = json.loads(place.run("plan", str(place.recipe), "--json").output.read_text())["stages"]
    return {row["name"] for row in rows if not row["done"]}


def assert_only_made_again(after: dict[str, Manifest], before: dict[str, Manifest], name: str) -> None:
    """One artifact was made again with the same bytes; all others are the very ones that were there."""
    assert after[name].lineage.finished_at != before[name].lineage.finished_at
    assert (after[name].identity, after[name].files_digest) == (before[name].identity, before[name].files_digest)
    assert {**after, name: None} == {**before, name: None}
