"""Secrets are planted in the environment, and nothing that is written holds one: artifacts, checkpoints, logs, messages, forms, job templates."""

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.preparation import prepare
from infra.store.s3 import S3Storage
from schemas.errors import BadInput, RunFailed
from stages.runner import execute
from tests.flows.conftest import ToyChain
from tests.services import ObjectStore

PLANTED = {
    "HF_TOKEN": "hf_plantedTokenOfAHub",
    "PREFECT_API_KEY": "pnu_plantedKeyOfPrefect",
    "PREFECT_API_AUTH_STRING": "planteduser:plantedpassword",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://user:planteddatabase@127.0.0.1/prefect",
}


def traces(secrets: list[str], place: str, content: bytes) -> Iterator[str]:
    """Yield where a secret stands in what was written, as it is or in base64 (as headers and Kubernetes have them)."""
    for secret in secrets:
        for form in (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")):
            if form in content:
                yield f"{place}: {secret}"


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    yield from ((str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture
def secrets(seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those in the environment: planted ones, and the store's, which are in use."""
    for name, value in {**PLANTED, **seaweedfs.environment}.items():
        monkeypatch.setenv(name, value)
    parts = [
        part for value in PLANTED.values() for part in ([value.split("@")[0].rpartition(":")[2]] if "://" in value else value.split(":"))
    ]
    return [*PLANTED.values(), *parts, seaweedfs.access_key, seaweedfs.secret_key]


@pytest.mark.service
def test_a_chain_on_object_storage_writes_no_secret(
    chain: ToyChain, seaweedfs: ObjectStore, secrets: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that fails leaves a checkpoint and says why, one that goes on finishes: all that both leave is looked through."""
    caplog.set_level(logging.INFO)
    address = f"s3://{seaweedfs.bucket}/secrets"
    prepared = prepare(chain.recipe(), address)
    *before, encode = prepared.plan.nodes
    for node in before:
        execute(prepared.plan, node, prepared.surroundings)
    chain.fail("encode", "RunFailed")
    with pytest.raises(RunFailed) as failed:
        execute(prepared.plan, encode, prepared.surroundings)
    execute(prepared.plan, encode, prepared.surroundings)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plantedwrongsecret")
    with pytest.raises(BadInput, match="refused the credentials") as refused:
        prepare(chain.recipe(), address)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)

    storage = S3Storage(seaweedfs.bucket, "secrets", prepared.surroundings.store._settings)
    objects = {info.key: storage.read(info.key) for info in storage.objects("")}
    assert sum(key.endswith("manifest.json") for key in objects) == len(prepared.plan.nodes), "all of the store is looked through"
    files = dict(written(chain.folder))
    assert any(name.startswith("cache/") for name in files), "and so is the read cache"
    said = {"log": caplog.text, "failure": str(failed.value), "refusal": str(refused.value), "store": repr(prepared.surroundings)}
    everything = {**objects, **files, **{name: text.encode() for name, text in said.items()}}
    searched = [*secrets, "plantedwrongsecret"]
    assert [trace for place, content in everything.items() for trace in traces(searched, place, content)] == []
    assert list(traces(searched, "found", json.dumps(seaweedfs.environment).encode())), "what is there is found"


def test_forms_and_templates_hold_no_secret(secrets: list[str]) -> None:
    """What `distill deploy` sends to a server that many can read: job templates, and the parameters' schemas and defaults."""
    from flows.deployments import make_deployment
    from flows.pools import Pool
    from flows.single import SINGLE_STAGES

    sent = {text: json.dumps(Pool.parse(text).definition()) for text in ("a=process:cuda", "a=docker:cuda", "a=kubernetes:cuda")}
    deployment = make_deployment(SINGLE_STAGES["teacher"], "cpu", "cpu")
    sent["deployment"], sent["form"] = deployment.model_dump_json(), deployment._parameter_openapi_schema.model_dump_json()
    assert "distill-teacher" in sent["deployment"] and "minimum" in sent["form"]
    assert [trace for place, text in sent.items() for trace in traces(secrets, place, text.encode())] == []
