"""What Prefect is told of each flow, its settings, and the traps that are avoided by construction."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from flows import environment
from schemas.errors import BadInput
from schemas.recipe import Recipe
from stages.registry import STAGES
from tests.flows.conftest import ROOT, ToyChain


def flows() -> list[Any]:
    from flows.chain import distill_chain
    from flows.single import SINGLE_STAGES
    from flows.smoke import distill_smoke

    return [distill_chain, distill_smoke, *SINGLE_STAGES.values()]


def test_there_is_a_flow_for_the_chain_for_smoke_and_for_every_stage() -> None:
    assert [flow.name for flow in flows()] == ["distill-chain", "distill-smoke", *(f"distill-{name}" for name in STAGES)]


def test_every_form_is_typed_and_every_field_of_it_described() -> None:
    for flow in flows():
        form = flow.parameters.model_dump()
        assert {"$ref": "#/definitions/Recipe"} in form["properties"]["recipe"]["anyOf"]
        for name, field in form["properties"].items():
            assert len(field["description"]) > 20, (flow.name, name)
        assert {"title": "file or YAML", "type": "string"} in form["properties"]["recipe"]["anyOf"]
        assert all(field["title"] == name for name, field in form["definitions"]["Recipe"]["properties"].items()), "sections have no names"
        assert flow.description and "Args:" not in flow.description, "the fields' sentences are the form's"
        chain = form["definitions"]["LightningConfig"]["properties"]["guidance_scale"]
        assert chain["minimum"] == 1 and "Imagen" in chain["description"] and chain["default"] == 6.0
        assert '"oneOf"' not in json.dumps(form)  # a discriminated union is a raw JSON box in the form
        assert '"format": "path"' not in json.dumps(form)  # a Path mangles s3://
        assert '"uniqueItems"' not in json.dumps(form)  # a set is ordered otherwise in every process


def test_a_wrong_form_is_refused_at_once() -> None:
    from prefect.exceptions import ParameterTypeError

    for flow in flows():
        with pytest.raises(ParameterTypeError, match="colour"):
            flow.validate_parameters({"recipe": {"name": "x", "ingest": {"table": "t"}, "colour": 1}})


def test_a_recipe_is_taken_as_fields_as_a_file_and_as_its_text(chain: ToyChain) -> None:
    from flows.preparation import as_recipe
    from flows.run_names import _recipe_name

    path = chain.recipe_file()
    text = Path(path).read_text()
    for given in (chain.recipe(), path, text, json.dumps(chain.data())):
        assert as_recipe(given) == chain.recipe()
        assert _recipe_name({"recipe": given}) == "toy"
    with pytest.raises(BadInput, match=r"seed \(line 1\): found 'many'"):
        as_recipe(f"seed: many\n{text}")
    assert _recipe_name({"recipe": f"seed: many\n{text}"}) == "recipe"


@pytest.mark.service
def test_a_single_stage_flow_shares_results_with_the_chain(chain: ToyChain, prefect_server: str) -> None:
    from flows.chain import distill_chain
    from flows.single import SINGLE_STAGES
    from schemas.manifest import Manifest

    single = SINGLE_STAGES
    for name in ("ingest", "measure", "select", "teacher"):
        single[name](chain.recipe(), chain.address)
    manifest = Manifest.model_validate(single["encode"](json.loads(chain.recipe().model_dump_json()), chain.address))
    assert chain.runs() == ["ingest", "measure", "select", "teacher", "encode"]
    assert distill_chain(chain.recipe_file(), chain.address)["encode"] == manifest.identity
    assert chain.runs() == []
    other = single["select"](chain.recipe(select={"min_sharpness": 0.7}), chain.address)
    given = Manifest.model_validate(single["encode"](chain.recipe(), chain.address, inputs={"selection": other["identity"]}))
    assert given.lineage.inputs["selection"] == other["identity"] and given.identity != manifest.identity


def test_settings_are_made_before_prefect_and_never_against_the_users(tmp_path: Path) -> None:
    def told(**given: str) -> dict[str, Any]:
        code = (
            "import json, sys, flows; assert 'prefect' not in sys.modules\n"
            "from prefect.settings import get_current_settings as s\n"
            "s = s(); print(json.dumps([s.server.ephemeral.startup_timeout_seconds, s.server.ephemeral.enabled,"
            " s.server.analytics_enabled, sorted(s.logging.extra_loggers), s.logging.to_api.when_missing_flow, s.api.url]))"
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DO_NOT"))}
        clean |= {"PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | given
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, text=True, capture_output=True, check=True)
        names = ("timeout", "ephemeral", "analytics", "loggers", "missing", "url")
        return dict(zip(names, json.loads(done.stdout), strict=True))

    assert told() == {
        "timeout": 180, "ephemeral": True, "analytics": False, "loggers": ["flows", "infra", "stages"], "missing": "ignore", "url": None,
    }  # fmt: skip
    profile = {
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "mine",
    }
    lines = "\n".join(f'{name} = "{value}"' for name, value in profile.items())
    (tmp_path / "profiles.toml").write_text(f'active = "work"\n[profiles.work]\n{lines}\n')
    (tmp_path / "prefect.toml").write_text("[server.ephemeral]\nstartup_timeout_seconds = 77\n")
    mine = told(PREFECT_SERVER_ANALYTICS_ENABLED="true")
    assert mine == {
        "timeout": 77, "ephemeral": False, "analytics": True, "loggers": ["mine"], "missing": "ignore", "url": "http://127.0.0.1:1/api",
    }  # fmt: skip


def test_a_configured_server_is_found_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not environment.server_is_configured()
    for name, text in {
        "prefect.toml": '[api]\nurl = "http://x/api"',
        ".env": "PREFECT_API_URL=http://x/api",
        "profiles.toml": "broken [",
    }.items():
        (tmp_path / name).write_text(text)
        assert environment.server_is_configured() == (name != "profiles.toml"), name
        (tmp_path / name).unlink()
    monkeypatch.setenv("PREFECT_API_URL", "http://x/api")
    assert environment.server_is_configured()


def test_identities_do_not_depend_on_the_process(chain: ToyChain) -> None:
    file = chain.recipe_file()
    planned = [chain.run("plan", file, "--json", PYTHONHASHSEED=seed)[1] for seed in ("1", "2")]
    assert planned[0] == planned[1] and json.loads(planned[0])["stages"]
    assert Recipe.model_validate(chain.data()) == chain.recipe()


def test_stages_are_called_directly() -> None:
    """Submitted tasks run in a thread, where SIGTERM does not arrive; background tasks lose their work with their worker."""
    refused = {"submit", "map", "delay", "apply_async", "serve", "submit_to_work_pool"}
    for path in sorted((ROOT / "flows").rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in refused], path


def test_versions_that_break_prefect_are_shut_out() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {requirement.name: requirement for requirement in map(Requirement, project["project"]["dependencies"])}
    for name, broken in {"fastapi": "0.155.0", "sqlalchemy": "2.1.0", "prefect": "4.0.0"}.items():
        assert Version(broken) not in declared[name].specifier
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, requirement in declared.items():
        assert Version(pinned[name]) in requirement.specifier, name
    assert "dataclasses" not in pinned and any("dataclasses" in item for item in project["tool"]["uv"]["override-dependencies"])
    assert not [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "@" in line or "://" in line]


def test_a_process_that_prefect_starts_can_import_every_flow() -> None:
    from prefect.flows import load_flow_from_entrypoint

    for flow in flows():
        assert load_flow_from_entrypoint(f"{flow.__module__}.{flow.__name__}") is flow
