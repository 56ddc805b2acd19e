"""What each metric can see: `python -m benchmarks.sensitivity [--images 96] [--folder DIR]`.

The committed tiny teacher in 32, 8, 4, 2 and 1 steps, the same prompts and noise in all: fewer steps are worse, by construction. Real images are
the demo's drawings of the same captions; the teacher's other samples are those of 32 steps from other noise. Each metric is computed by the code
of the stage `evaluate`, with its interval. Diversity is of two pictures a prompt, the row's and one from the noise of the other samples; CLIP
scores are not among them, for no CLIP weights can be had without a network. A pair of neighbouring step counts is `found` where the interval of
their difference, taken resample by resample as rows share prompts and noise, lies on the expected side of zero; `inverted` where it lies on the
other; else `open`.

`--folder` keeps the pictures and features, so that a second call goes on. The last line is JSON: `rows` (steps, scores, intervals) and `pairs`
(metric, steps, difference, interval, verdict).
"""

import argparse
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from infra.demo.emoji import captions, render, variant
from schemas.evaluation import EvaluateConfig
from schemas.lightning import trailing_timesteps
from stages.diffusion.pipeline import TeacherPipeline
from stages.evaluate.feature_network import features_of
from stages.evaluate.features import extractor_spec
from stages.evaluate.metrics.bootstrap import interval
from stages.evaluate.metrics.catalogue import METRICS, View
from stages.evaluate.metrics.perceptual import diversity, paired
from stages.evaluate.metrics.sets import FeatureSet
from stages.evaluate.prompts import assign
from stages.evaluate.rows import TEACHER, Row
from stages.evaluate.samples import Pixels, Sampler
from stages.evaluate.scoring import Score, Scoring
from stages.evaluate.singles import load_distance
from stages.evaluate.views import centre_patch
from stages.training.randomness import derive_seed

logger = logging.getLogger(__name__)
STEPS = (32, 8, 4, 2, 1)
GUIDANCE_SCALE = 6.0  # as in recipes/tiny.yaml
TEACHER_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "tiny_teacher"


def kept(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array in a file, made where it is not there."""
    if not path.exists():
        made = np.ascontiguousarray(make())  # the file has the bytes as they lie
        save_file({"array": made}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        logger.info("made %s", path.name)
    return load_file(path)["array"]


def sampled(sampler: Sampler, steps: int) -> NDArray[np.uint8]:
    """(N, H, W, 3): the teacher's pictures of all prompts."""
    pipeline = sampler.pipeline
    row = Row(TEACHER, TEACHER, steps, trailing_timesteps(steps), "trailing", pipeline.facts.prediction_type, GUIDANCE_SCALE)
    denoiser = pipeline.denoiser()
    firsts = range(0, len(sampler.prompts.images), sampler.batch_size)
    return np.concatenate([sampler.batch(row, denoiser, first) for first in firsts])


def drawn(emoji: list[Any], side: int, seed: int) -> NDArray[np.uint8]:
    """(N, H, W, 3): the demo's drawings."""
    pictures = (Image.open(io.BytesIO(render(one, side, variant(seed, number)))) for number, one in enumerate(emoji))
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def scores(config: EvaluateConfig, images: int, seed: int, folder: Path) -> dict[int, dict[str, Score]]:
    """By step count every metric of the recipe."""
    emoji = captions(seed, images)
    prompts = assign([one.caption for one in emoji], images, 1, "captions")
    pipeline = TeacherPipeline.load(TEACHER_FOLDER)

    def sampler(noise: int) -> Sampler:
        return Sampler(pipeline, prompts, seed=noise, batch_size=config.batch_size, tick=lambda _images: None)

    rows, other = sampler(seed), sampler(derive_seed(seed, "reference"))
    pictures = {"real": kept(folder / "real.safetensors", lambda: drawn(emoji, pipeline.resolution, derive_seed(seed, "real")))}
    pictures["teacher"] = kept(folder / "reference.safetensors", lambda: sampled(other, STEPS[0]))
    pictures |= {str(steps): kept(folder / f"teacher-{steps}.safetensors", lambda steps=steps: sampled(rows, steps)) for steps in STEPS}
    again = {STEPS[0]: pictures["teacher"]}
    again |= {steps: kept(folder / f"again-{steps}.safetensors", lambda steps=steps: sampled(other, steps)) for steps in STEPS[1:]}
    extractor = extractor_spec(config.extractor).build("cpu")

    def features(name: str) -> dict[View, FeatureSet]:
        shown: Mapping[View, Callable[[Pixels], Pixels]] = {
            "whole": lambda picture: picture,
            "patch": lambda picture: centre_patch(picture, config.patch_px),
        }
        return {
            view: FeatureSet(
                kept(folder / f"{view}-{name}.safetensors", lambda of=of: features_of(map(of, pictures[name]), extractor, "cpu"))
            )
            for view, of in shown.items()
        }

    scoring = Scoring(config, prompts.images, {name: features(name) for name in ("teacher", "real")}, seed)
    distance = load_distance(config.perceptual, None, "cpu")

    def lpips(steps: int) -> NDArray[np.float32]:
        def make() -> NDArray[np.float32]:
            return paired(pictures[str(steps)], pictures[str(STEPS[0])], distance, "cpu")

        return kept(folder / f"lpips-{steps}.safetensors", make)

    def diverse(steps: int) -> NDArray[np.float32]:
        def make() -> NDArray[np.float32]:
            side_by_side = (picture for pair in zip(pictures[str(steps)], again[steps], strict=True) for picture in pair)
            return diversity(side_by_side, 2, distance, "cpu")[::2]  # a prompt's two pictures have one number

        return kept(folder / f"diversity-{steps}.safetensors", make)

    return {steps: scoring.score(features(str(steps)), {"lpips_teacher": lpips(steps), "diversity": diverse(steps)}) for steps in STEPS}


def compared(found: Mapping[int, Mapping[str, Score]], confidence: float) -> list[dict[str, Any]]:
    """Neighbouring step counts, metric by metric."""
    pairs = []
    for metric in found[STEPS[0]]:
        sign = -1 if METRICS[metric].higher_is_better else 1
        for more, fewer in pairwise(STEPS):
            one, two = found[more][metric], found[fewer][metric]
            low, high = interval(two.draws - one.draws, confidence)
            worse, better = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
            verdict = "found" if worse else "inverted" if better else "open"
            pairs.append(
                {
                    "metric": metric, "steps": [more, fewer], "difference": round(two.value - one.value, 6),
                    "interval": [round(low, 6), round(high, 6)], "verdict": verdict,
                }
            )  # fmt: skip
    return pairs


def table(found: Mapping[int, Mapping[str, Score]], pairs: list[dict[str, Any]]) -> str:
    """Markdown for people: a line a metric."""
    lines = [f"| metric | {' | '.join(map(str, STEPS))} | found |", "|---" * (len(STEPS) + 2) + "|"]
    for metric in found[STEPS[0]]:
        cells = [f"{score.value:.4g} ({score.low:.4g} to {score.high:.4g})" for score in (found[steps][metric] for steps in STEPS)]
        verdicts = [pair["verdict"] for pair in pairs if pair["metric"] == metric]
        told = ", ".join(f"{more} > {fewer} {verdict}" for (more, fewer), verdict in zip(pairwise(STEPS), verdicts, strict=True))
        lines.append(f"| {metric} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and everything as the last line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps what was made")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = EvaluateConfig.model_validate({"protocol": "tiny", "prompt_count": given.images, "batch_size": 32})
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = scores(config, given.images, given.seed, folder)
    pairs = compared(found, config.confidence)
    rows = [
        {
            "steps": steps,
            "scores": {name: score.value for name, score in of.items()},
            "intervals": {name: [score.low, score.high] for name, score in of.items()},
        }
        for steps, of in found.items()
    ]
    sys.stdout.write(table(found, pairs) + "\n" + json.dumps({"images": given.images, "rows": rows, "pairs": pairs}) + "\n")


if __name__ == "__main__":
    main()
