"""`distill compare --paired`: intervals of differences between two evaluations whose rows share prompts and noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, PerceptualConfig
from stages.compare import Evaluated, compare, read_report
from stages.compare.page import apart_text, render_comparison
from stages.compare.paired import paired_intervals
from stages.evaluate import Inputs, run
from stages.evaluate.metrics.bootstrap import Estimate, Resampling, draws, interval
from tests.distilled import Chain
from tests.workspaces import make_workspace, open_store

CONFIG = EvaluateConfig(
    prompt_count=6, teacher_steps=(2,), extractor="efficientnet-lite0", grid_prompts=1, batch_size=3, resamples=300,
    metrics=("fid", "lpips"), perceptual=PerceptualConfig(distance="lpips-efficientnet-lite0", size_px=64),
)  # fmt: skip


def evaluated(chain: Chain, folder: Path, label: str, student: Any) -> Evaluated:
    workspace = make_workspace(folder, chain.store, identity=label)
    lineage = workspace.lineage.model_copy(update={"config": CONFIG.model_dump(mode="json")})
    manifest = run(CONFIG, Inputs.model_validate(chain.inputs(one=student)), replace(workspace, lineage=lineage))
    return replace(read_report(chain.store.fetch(manifest, ["report.json"]), label), manifest=manifest)


def test_differences_are_drawn_prompt_by_prompt(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    chain = Chain(open_store(tmp_path))
    first = evaluated(chain, tmp_path, "a", chain.unet(2))
    other = evaluated(chain, tmp_path, "b", chain.unet(2, change=0.02, best_step=1))
    found = paired_intervals(first, other, chain.store)
    teacher, one = ("teacher", 2), ("lightning-mse", 2)
    assert {(row, metric) for row in (teacher, one) for metric in ("fid_teacher", "fid_real", "lpips_teacher")} == found.keys()
    assert all(found[teacher, metric] == (0, 0) for metric in ("fid_teacher", "fid_real", "lpips_teacher")), "the same pictures"

    def numbers(of: Evaluated) -> Any:
        assert of.manifest is not None
        path = "numbers/lpips_teacher-one-at-2.safetensors"
        return load_file(chain.store.fetch(of.manifest, [path]) / path)["numbers"].astype(float)

    apart = Estimate.of_mean(numbers(other) - numbers(first))
    prompts = [str(image % 5) for image in range(6)]  # of five captions the first comes twice
    expected = interval(draws(apart, Resampling.of_prompts(prompts, 300, first.report["samples"]["seed"])), 0.95)
    assert found[one, "lpips_teacher"] == pytest.approx(expected, abs=1e-6)

    comparison = compare([first, other], [found])
    lines = {(line.family, line.metric): line for line in comparison.lines}
    for metric in ("fid_teacher", "fid_real"):
        line = lines["lightning-mse", metric]
        low, high = found[one, metric]
        difference = line.difference(1)
        assert difference is not None and low <= difference <= high and low < high
        assert apart_text(line, 1) in render_comparison(comparison)
    assert apart_text(lines["teacher", "fid_real"], 1) == "±0.00 to ±0.00"

    assert other.manifest is not None
    rows = {name: key for name, key in other.manifest.content.rows.items() if not name.startswith("reference")}
    content = other.manifest.content.model_copy(update={"rows": rows})
    elsewhere = replace(other, manifest=other.manifest.model_copy(update={"content": content}))
    with pytest.raises(BadInput, match="--paired: a and b do not share prompts, noise"):
        paired_intervals(first, elsewhere, chain.store)
    with pytest.raises(BadInput, match="--paired: b is a file; expected artifacts"):
        paired_intervals(first, replace(other, manifest=None), chain.store)
