"""What is tried again within a run, and what is not."""

import inspect

import botocore.exceptions
import httpx
import pytest

from schemas.errors import BadInput, RunFailed, Transient


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
