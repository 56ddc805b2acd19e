"""What is tried again within a run, and what is not."""

import inspect

import botocore.exceptions
import httpx
import pytest

from infra.store import ArtifactStore, StoreSettings
from schemas.errors import BadInput, RunFailed, Transient
from tests.services import ObjectStore


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1/api")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


PASSING = (
    Transient("the store is gone"),
    httpx.ConnectError("refused"),
    answer(503),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
)


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_what_may_pass_is_waited_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.patience import tried_again

    monkeypatch.setattr("flows.patience.DELAYS_SECONDS", (0.01, 0.02))
    left = [error, error]

    def body(recipe: str, store: str | None = None) -> str:
        if left:
            raise left.pop()
        return f"{recipe} on {store}"

    assert tried_again(body)("tiny", store="s3://bucket") == "tiny on s3://bucket"
    assert list(inspect.signature(tried_again(body)).parameters) == ["recipe", "store"], "the form has its fields"
    left.extend([error] * 3)
    with pytest.raises(type(error)):
        tried_again(body)("tiny")
    assert not left


@pytest.mark.service
def test_a_store_that_is_gone_when_a_run_begins_is_waited_for(seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.patience import tried_again

    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flows.patience.DELAYS_SECONDS", (0.01, 0.02))
    endpoints = ["http://127.0.0.1:9", seaweedfs.endpoint]

    def body() -> str:
        return ArtifactStore.open(f"s3://{seaweedfs.bucket}/begun", StoreSettings(endpoint_url=endpoints.pop(0), retries=1)).address

    assert tried_again(body)() == f"s3://{seaweedfs.bucket}/begun"
    assert not endpoints


@pytest.mark.parametrize("error", [BadInput("wrong"), RunFailed("NaN"), ZeroDivisionError(), answer(404), FileNotFoundError("no such key")])
def test_mistakes_are_not(error: Exception) -> None:
    from flows.patience import tried_again

    tries = []

    def body() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        tried_again(body)()
    assert len(tries) == 1


def test_what_a_task_has_tried_is_not_tried_by_its_flow() -> None:
    from flows.patience import tried_again, tried_by_task

    tries = []

    @tried_by_task()
    def stage() -> None:
        tries.append(1)
        raise Transient("the worker was lost")

    with pytest.raises(Transient):
        tried_again(stage)()
    assert len(tries) == 1
