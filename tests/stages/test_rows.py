"""The rows of the evaluation's table: students of one step count are told apart, by method, network or run."""

from schemas.base import digest
from schemas.evaluation import EvaluateConfig
from schemas.lightning import LightningConfig, LinkConfig, trailing_timesteps
from schemas.manifest import Lineage, Manifest, StudentLoRA, StudentManifest, StudentUNet, Teacher
from stages.evaluate.rows import rows_of
from stages.publish.variants import variant_names

TEACHER = Teacher(
    architecture="StableDiffusionXLPipeline", prediction_type="epsilon", resolution=64, weights_digest=digest("teacher"), parameters={}
)


def students(section: dict[str, object]) -> dict[str, StudentManifest]:
    """The published students of a chain, as the stage describes them."""
    return {run.name: described(run.name, run.config) for run in LightningConfig.model_validate(section).runs() if run.published}


def described(node: str, config: LinkConfig) -> StudentManifest:
    facts = {
        "method": "lightning-mse" if config.adversarial is None else "lightning",
        "steps": (config.steps,),
        "timesteps": {config.steps: trailing_timesteps(config.steps)},
        "sampler": "trailing",
        "prediction_type": "epsilon",
        "guidance_scale": 1.0,
        "teacher": digest("teacher"),
        "training_steps": 1,
    }
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha}
    content = StudentLoRA.model_validate(facts | lora) if config.network == "lora" else StudentUNet.model_validate(facts)
    lineage = Lineage(stage="lightning", node=node, revision=1, config={}, inputs={})
    return Manifest(identity=digest(node), content=content, files=(), lineage=lineage)


def families(section: dict[str, object]) -> list[tuple[str, int]]:
    rows = rows_of(EvaluateConfig(teacher_steps=(32,)), TEACHER, students(section))
    return [(row.family, row.steps) for row in rows[1:]]


def test_lora_and_unet_of_a_step_count_are_families_of_their_own() -> None:
    expected = [("lightning", 4), ("lightning", 2), ("lightning", 1), ("lightning-lora", 4), ("lightning-lora", 2), ("lightning-mse", 8)]
    assert families({"chain": [16, 8, 4, 2, 1], "adversarial": {}}) == expected
    assert families({"chain": [16, 8, 4]}) == [("lightning-mse", 8), ("lightning-mse", 4)]
    assert families({"chain": [16, 8], "network": "lora"}) == [("lightning-mse-lora", 8)]


def test_phases_of_one_network_are_told_apart_by_their_names() -> None:
    phases = {name: {"objective": name, "network": "lora"} for name in ("conditional", "unconditional")}
    section: dict[str, object] = {"chain": [16, 8, 4, 2], "adversarial": {"phases": phases}}
    runs = [(f"lightning-{link}-{name}", int(link[-1])) for link in ("4-2", "8-4") for name in phases]
    assert families(section) == [*runs, ("lightning-mse", 8)]
    assert variant_names(students(section)) == {
        "lightning-16-8-unet": "lightning-8step",
        **{
            f"lightning-{link}-{name}": f"lightning-{link[-1]}step-lora-lightning-{link}-{name}"
            for link in ("8-4", "4-2")
            for name in phases
        },
    }
