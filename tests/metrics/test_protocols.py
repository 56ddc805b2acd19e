"""Protocols of `evaluate`: what a name stands for, what the recipe's own words change, and what is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.outside import content_digest
from schemas.evaluation import EvaluateConfig
from schemas.loading import parse_recipe
from schemas.protocols import PROTOCOLS
from stages.plan import make_plan
from tests.tiny_pipelines import tiny_clip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_is_a_valid_evaluation(name: str) -> None:
    config = EvaluateConfig.model_validate({"protocol": name})
    spelt_out = EvaluateConfig.model_validate(dict(PROTOCOLS[name]))  # type: ignore[index]
    assert config.model_copy(update={"protocol": None}) == spelt_out != EvaluateConfig()
    assert EvaluateConfig.model_validate(config.model_dump()) == config, "what is written down reads back as the same"


def test_published_settings() -> None:
    lightning, dmd, dmd2 = (
        EvaluateConfig.model_validate({"protocol": name}) for name in ("lightning-coco10k", "dmd-coco30k", "dmd2-coco10k")
    )
    assert (lightning.prompt_count, lightning.resize_px, lightning.patch_px) == (10_000, None, 299)
    assert (dmd.prompt_count, dmd.resize_px) == (30_000, 256)
    assert (dmd2.prompt_count, dmd2.resize_px, dmd2.patch_px, dmd2.clip_prefix) == (10_000, 512, 299, "A photo depicts ")
    assert {config.extractor for config in (lightning, dmd, dmd2)} == {"inception"}


def test_what_the_recipe_names_stands() -> None:
    config = EvaluateConfig.model_validate({"protocol": "dmd2-coco10k", "prompt_count": 50, "resize_px": None})
    assert (config.prompt_count, config.resize_px, config.clip_prefix) == (50, None, "A photo depicts ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["kid"]}, "expected fid among them"),
        ({"metrics": ["fid", "kid", "fid"]}, "expected each of them once"),
        ({"metrics": ["fid", "clip_score"]}, "expected a folder, address or hub id of a CLIP model"),
        ({"metrics": ["fid", "diversity"]}, "metrics has diversity: expected at least 2"),
        ({"protocol": "coco"}, "lightning-coco10k"),
        ({"protocol": ["tiny"]}, "lightning-coco10k"),
    ],
)
def test_mistakes_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate(given)


def test_the_clip_models_content_is_identity_and_its_place_is_not(tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text("url,caption\nu,c\n")
    one, two = tiny_clip(tmp_path / "one"), tiny_clip(tmp_path / "two")

    def identity(clip: Path | None, **more: object) -> str:
        clipped = {} if clip is None else {"metrics": ["fid", "clip_score"], "clip_model": str(clip)}
        data = {
            "name": "r", "ingest": {"table": str(tmp_path / "urls.csv")}, "teacher": {"source": str(tmp_path / "urls.csv")},
            "evaluate": clipped | more,
        }  # fmt: skip
        return make_plan(parse_recipe(data), content_digest).identities["evaluate"]

    assert identity(one) == identity(two) != identity(None)
    (two / "config.json").write_text("{}")
    assert identity(one) != identity(two)
    assert identity(None, resamples=200) != identity(None)
