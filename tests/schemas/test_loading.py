"""A recipe file: what is read, and how every mistake is named."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.errors import BadInput
from schemas.lightning import LightningConfig, LinkConfig
from schemas.loading import load_recipe, parse_recipe, read_recipe
from schemas.recipe import Recipe
from stages.plan import nodes_of

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
name: small
ingest:
  table: images.parquet
teacher:
  source: teachers/tiny
lightning:
  chain: [8, 4]
  links:
    4: {training_steps: 5}
evaluate: {}
publish:
  name: small
"""
SHIPPED = sorted((ROOT / "recipes").glob("*.y*ml"))


def mistakes_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read_recipe(text, overrides)
    first, *rest = str(caught.value).splitlines()
    if "mistake" not in first:
        return [str(caught.value)]
    assert first.startswith(f"recipe: {len(rest)} mistake")
    return [line.strip() for line in rest]


def test_overrides_are_applied_and_typed() -> None:
    recipe = read_recipe(GOOD, ["lightning.links.4.training_steps=9", "lightning.chain=[16, 4]", "lcm.warmup_steps=0", "seed=7"])
    assert recipe.lightning is not None and recipe.lcm is not None
    assert recipe.lightning.link(4).training_steps == 9
    assert (recipe.lightning.chain, recipe.lcm.warmup_steps, recipe.seed) == ((16, 4), 0, 7)


def test_an_override_changes_one_of_two_aliased_places() -> None:
    text = GOOD.replace("lightning:", "lcm:\n  optimizer: &shared {learning_rate: 1e-4}\nlightning:\n  optimizer: *shared")
    recipe = read_recipe(text, ["lcm.optimizer.learning_rate=2e-4"])
    assert recipe.lcm is not None and recipe.lightning is not None
    assert (recipe.lcm.optimizer.learning_rate, recipe.lightning.optimizer.learning_rate) == (2e-4, 1e-4)


def test_all_mistakes_at_once_with_path_line_value_and_expectation() -> None:
    text = GOOD.replace("chain: [8, 4]", "chain: [8, 3]\n  warmup_steps: 20000\n  colour: red") + "seed: -1\nselect: {min_side_px: 512}\n"
    text = text.replace("teacher:\n  source: teachers/tiny\n", "")
    found = mistakes_of(text)
    assert any(line.startswith("seed (line 13): found -1; expected: input should be greater") for line in found)
    assert "lightning.colour (line 7): found 'red'; expected no such field here" in found
    assert any(line.startswith("lightning.chain.1 (line 5): found 3; the grid of 3 steps does not nest in that of 8") for line in found)
    assert any(line.startswith("lightning.links.4 (line 9): found 4; is no student of the chain") for line in found)
    assert any(line.startswith("lightning.warmup_steps (line 6): found 20000; the run would end inside its warm-up") for line in found)
    assert any(line.startswith("teacher: found 'neither'; expected exactly one of") for line in found)
    assert any(line.startswith("ingest.min_side_px") and "at most select.min_side_px = 512" in line for line in found)
    assert len(found) == 8, found  # the eighth: the link's five steps end inside the warm-up


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (("chain: [8, 4]", "chain: [8]"), "lightning.chain (line 7): found [8]; expected at least two step counts"),
        (("chain: [8, 4]", "chain: [4, 8]"), "lightning.chain.1 (line 7): found 8"),
        (("chain: [8, 4]", "chain: [2000, 4]"), "lightning.chain.0 (line 7): found 2000"),
        (
            ("{training_steps: 5}", "{network: lora, prediction: sample}"),
            "lightning.links.4.prediction (line 9): found 'sample'; a LoRA cannot",
        ),
        (
            ("{training_steps: 5}", "{batch_size: 3}\n  accumulation_steps: 2"),
            "lightning.links.4.batch_size (line 9): found 3; expected a multiple",
        ),
        (("{training_steps: 5}", "{}\n  world_size: 3"), "lightning.world_size (line 10): found 3; times lightning.accumulation_steps = 1"),
        (
            ("{training_steps: 5}", "{batch_size: 6}\n  world_size: 4"),
            "lightning.links.4.batch_size (line 9): found 6; expected a multiple of lightning.accumulation_steps = 1 times lightning.world_size = 4",
        ),
        (("table: images.parquet", "columns: {aesthetic: []}"), "select.min_aesthetic: found 5.5; a threshold needs a score"),
        (("table: images.parquet", "columns: {aesthetic: []}"), "ingest.table (line 2): missing; expected a value"),
        (("evaluate: {}\n", ""), "publish (line 10): found 'small'; the model card needs figures: expected a section evaluate"),
        (("name: small\ningest", "name: Größe\ningest"), "name (line 1): found 'Größe'"),
        (("evaluate: {}", "evaluate: {teacher_guidance_scale: .nan}"), "evaluate.teacher_guidance_scale (line 10): found nan"),
        (("evaluate: {}", "evaluate: {}\nevaluate: {}"), "line 11: the key 'evaluate' stands on line 10 already"),
        (("evaluate: {}", "evaluate: &a [*a]"), "line 10: the value contains itself"),
        (("evaluate: {}", "evaluate: 2001-99-99"), "a value cannot be read"),
        (("evaluate: {}", "evaluate: {"), "not YAML"),
    ],
)
def test_each_mistake_names_its_place(edit: tuple[str, str], expected: str) -> None:
    assert GOOD.count(edit[0]) == 1
    found = mistakes_of(GOOD.replace(*edit))
    assert any(expected in line for line in found), found


ADVERSARIAL = GOOD.replace("chain: [8, 4]", "chain: [64, 16, 4, 1]").replace("{training_steps: 5}", "{}")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{renoise_weights: [1, 1]}", "renoise_weights (line 10): found [1.0, 1.0]; expected 4, one for each of renoise_timesteps"),
        ("{renoise_timesteps: [10, 249]}", "late_renoise_weights (line 10): found [5, 1, 1, 1]; expected 2"),
        ("{phases: {}}", "phases (line 10): found {}; expected at least one phase"),
        (
            "{start_timesteps: [250, 999]}",
            "start_timesteps (line 10): found [250]; the student of 1 steps learns from one of 4: expected entries of the trailing grid of 4 steps",
        ),
        ("{teachers: {1: 64}}", "teachers.1 (line 10): found 64; expected a step count of [16, 4, 1] to learn from one above it"),
        (
            "{first_phases: {a: {objective: conditional, network: unet}}}",
            "first_phases.a.objective (line 10): found 'conditional'; the first link absorbs the guidance",
        ),
        (
            "{one_step_phases: {a: {objective: unconditional, network: lora}}}",
            "one_step_phases.a.network (line 10): found 'lora'; a LoRA cannot carry the switch of 1 steps to x0-prediction",
        ),
        (
            "{phases: {a: {objective: conditional, network: lora, training_steps: 3}}}\n  warmup_steps: 3",
            "phases.a.training_steps (line 10): found 3; the phase would end inside its warm-up",
        ),
        ("{conversion_steps: 3}\n  warmup_steps: 3", "conversion_steps (line 10): found 3; the conversion would end inside its warm-up"),
        (
            "{first_phases: {a: {objective: mse, network: lora, start: link}}}",
            "first_phases.a.start (line 10): found 'link'; a LoRA goes on from the chain's newest",
        ),
        ("{}\n  network: lora", "lightning.network (line 11): found 'lora'; the phases of lightning.adversarial say what is trained"),
    ],
)
def test_each_mistake_of_an_adversarial_chain_names_its_place(section: str, expected: str) -> None:
    read_recipe(ADVERSARIAL.replace("    4: {}", "    4: {}\n  adversarial: {}"))
    found = mistakes_of(ADVERSARIAL.replace("    4: {}", f"    4: {{}}\n  adversarial: {section}"))
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ("dmd: {}\n", "dmd.regression (line 13): found None; regression and warm_up read the teacher's pairs: expected a section pairs"),
        ("dmd: {guidance_scale: 8}\npairs: {}\n", "dmd.guidance_scale (line 13): found 8.0; pairs and real score are guided alike"),
        (
            "dmd: {regression: null, batch_size: 9, accumulation_steps: 2}\n",
            "dmd.accumulation_steps (line 13): found 2; expected a divisor",
        ),
        (
            "dmd: {regression: {distance: l2, size_px: 224}}\npairs: {}\n",
            "dmd.regression.size_px (line 13): found 224; distance l2 has no use",
        ),
    ],
)
def test_each_mistake_of_a_matching_names_its_place(sections: str, expected: str) -> None:
    found = mistakes_of(GOOD + sections)
    assert any(expected in line for line in found), found


def test_matching_reads_pairs_where_it_has_a_use_for_them() -> None:
    def inputs(sections: str) -> tuple[dict[str, object], dict[str, str]]:
        nodes = {node.name: node for node in nodes_of(read_recipe(GOOD + sections))}
        assert "dmd" in nodes["evaluate"].inputs["students"] and "dmd" in nodes["publish"].inputs["students"]
        return dict(nodes["dmd"].inputs), dict(nodes["dmd"].outside)

    alone = {"teacher": "teacher", "latents": "encode"}
    assert inputs("dmd: {regression: null}\n") == (alone, {})
    assert inputs("dmd: {regression: {vgg: a.pth, decoder: tiny}}\npairs: {}\n") == (
        alone | {"pairs": "pairs"},
        {"regression.vgg": "a.pth", "regression.decoder": "tiny"},
    )
    assert inputs("dmd: {regression: null, timestep: 399, warm_up: {}}\npairs: {guidance_scale: 3}\n")[0] == alone | {"pairs": "pairs"}


def test_phases_alone_say_what_is_trained() -> None:
    text = ADVERSARIAL.replace("    4: {}", "    4: {network: unet, learning_rate: 1.0e-3}\n  adversarial: {}")
    found = mistakes_of(text)
    assert any("lightning.links.4.network (line 9): found 'unet'; the phases" in line for line in found), found
    assert any("lightning.links.4.learning_rate (line 9): found 0.001; adversarial phases have the rates" in line for line in found), found


def test_a_teacher_is_not_trained_in_pieces() -> None:
    (line,) = mistakes_of((ROOT / "recipes" / "tiny-teacher.yaml").read_text(), "train_teacher.training.sharding=full")
    assert "train_teacher.training.sharding (--set): found 'full'; a teacher trained here is small" in line


def test_the_papers_start_timesteps_lie_on_the_grids_of_its_teachers() -> None:
    chain = LightningConfig.model_validate({"adversarial": {}})
    few = {run.config.steps: run.config for run in chain.runs() if run.config.start_timesteps}
    assert {steps: config.teacher_steps for steps, config in few.items()} == {2: 8, 1: 4}
    for config in few.values():
        assert LinkConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="expected entries of the trailing grid of 4 steps, the teacher's"):
        LinkConfig.model_validate(config.model_dump() | {"start_timesteps": (124,)})


def test_unets_go_on_from_the_link_before_where_the_recipe_keeps_them_apart_from_loras() -> None:
    def starts(start: str) -> dict[str, str | None]:
        phases = {"lora": {"objective": "mse", "network": "lora"}, "unet": {"objective": "mse", "network": "unet", "start": start}}
        plan = {"first_phases": phases, "phases": phases, "one_step_phases": phases}
        chain = LightningConfig.model_validate({"chain": [32, 8, 4], "adversarial": plan})
        return {run.name: run.start for run in chain.runs()}

    loras = {"lightning-32-8-lora": None, "lightning-8-4-lora": "lightning-32-8-lora"}
    assert starts("phase") == loras | {"lightning-32-8-unet": "lightning-32-8-lora", "lightning-8-4-unet": "lightning-8-4-lora"}
    assert starts("link") == loras | {"lightning-32-8-unet": None, "lightning-8-4-unet": "lightning-32-8-unet"}


def test_pools_are_named_by_section_and_travel_as_json_without_changing_any_identity() -> None:
    from stages.plan import make_plan

    (line,) = mistakes_of(GOOD, "pools={lightnin: gpu}")
    assert line.startswith(
        "pools.lightnin (--set): found 'gpu'; is no stage's section: expected one of ingest, measure, select, encode, teacher"
    )
    assert mistakes_of(GOOD, "pools.lightning=s3://x")[0].startswith(
        "pools.lightning (--set): found 's3://x'; expected: string should match"
    )
    for path in SHIPPED:
        recipe = load_recipe(path)
        sections = [name for name in ("encode", "lightning", "train_teacher") if getattr(recipe, name) is not None]
        pooled = load_recipe(path, [f"pools.{name}=gpu" for name in sections])
        travelled = Recipe.model_validate(json.loads(json.dumps(pooled.model_dump(mode="json"))))
        assert travelled == pooled and travelled.pools == dict.fromkeys(sections, "gpu")
        assert make_plan(travelled, str).identities == make_plan(recipe, str).identities


def test_the_papers_optimisers_are_the_defaults() -> None:
    """SDXL-Lightning 3.6; the conversion, which is a squared error, as the links with one."""
    for run in LightningConfig.model_validate({"adversarial": {}}).runs():
        config = run.config
        mse = config.steps == 32
        rate = 1e-5 if mse else 1e-6 if config.network == "lora" else 5e-7
        assert (config.optimizer.learning_rate, config.optimizer.betas) == (rate, (0.9, 0.999) if mse else (0.0, 0.99))
        assert (config.adversarial is None) == mse
        assert config.adversarial is None or config.adversarial.optimizer == config.optimizer
        if config.steps == 1:
            assert config.conversion_optimizer is not None
            assert (config.conversion_optimizer.learning_rate, config.conversion_optimizer.betas) == (1e-5, (0.9, 0.999))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lightning", "expected section.field=value"),
        ("lightning..chain=3", "expected section.field=value"),
        ("name.first=3", "name is 'small', expected a section"),
        ("lightning.chain=[", "--set lightning.chain=[: not YAML"),
        ("lightning.batch_size=0", "lightning.batch_size (--set): found 0"),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: str) -> None:
    assert any(expected in line for line in mistakes_of(GOOD, override))


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml", Path("a\0b")):
        with pytest.raises(BadInput, match="cannot be read"):
            load_recipe(path)


def test_a_bomb_of_aliases_is_refused_quickly() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64))
    assert any("more than 100,000 values" in line for line in mistakes_of(bomb))
    assert any("nested too deeply" in line for line in mistakes_of("[" * 5000))


_keys = st.sampled_from([*Recipe.model_fields, "chain", "links", "optimizer", "training", "columns", "min_side_px"]) | st.text(max_size=6)
_leaves = (
    st.none() | st.booleans() | st.integers() | st.integers(min_value=2**200, max_value=2**20000) | st.floats() | st.text(max_size=12)
    | st.dates() | st.binary(max_size=8)
)  # fmt: skip
_junk = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys | st.integers() | st.booleans(), inner, max_size=6),
    max_leaves=25,
)


def _only_bad_input(text: str, *overrides: str) -> None:
    try:
        recipe = read_recipe(text, overrides)
    except BadInput as error:
        assert str(error)
    else:
        assert recipe.name


@settings(max_examples=150)
@given(st.dictionaries(_keys, _junk, max_size=8), st.lists(st.text(max_size=20), max_size=2))
def test_any_junk_is_bad_input_and_no_other_error(data: dict[str, object], overrides: list[str]) -> None:
    try:
        text = yaml.dump(data, allow_unicode=True)
    except ValueError:  # an integer too long to write in decimal
        return _only_parse(data)
    _only_bad_input(text, *overrides)
    return None


def _only_parse(data: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        parse_recipe(data)


@settings(max_examples=150)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text(alphabet="{}[]:,&*a1-?|>!<%@` \n\"'#.~=", max_size=60))
def test_any_text_is_bad_input_and_no_other_error(text: str) -> None:
    _only_bad_input(text)
    _only_bad_input(GOOD + text)
    _only_bad_input(GOOD, text)


def test_a_default_that_follows_from_another_field_is_no_obstacle_to_naming_mistakes() -> None:
    (line,) = mistakes_of(GOOD, "lcm.batch_size=-1")
    assert "lcm.batch_size" in line


def test_every_field_of_a_good_recipe_may_be_replaced_by_junk() -> None:
    data = yaml.safe_load(GOOD)
    for section, value in data.items():
        for junk in (None, [], {}, "x", -1, [[]], {"x": 1}, 10**5000):
            _replaced(data | {section: junk})
            if isinstance(value, dict):
                for field in value:
                    _replaced(data | {section: value | {field: junk}})


def _replaced(data: dict[str, object]) -> None:
    try:
        parse_recipe(data)
    except BadInput as error:
        assert "mistake" in str(error)


def test_the_json_schema_knows_what_pydantic_knows() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = json.loads(json.dumps(yaml.safe_load(GOOD)))
    assert list(validator.iter_errors(good)) == []
    assert list(validator.iter_errors(good | {"colour": 1}))
    assert list(validator.iter_errors(good | {"seed": -1}))
    described = [name for name, field in schema["$defs"]["IngestConfig"]["properties"].items() if "description" in field]
    assert "table" in described and "min_side_px" in described


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_whole_and_fit_the_schema(path: Path) -> None:
    recipe = load_recipe(path)
    written = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))
    jsonschema.Draft202012Validator(Recipe.model_json_schema()).validate(written)
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
