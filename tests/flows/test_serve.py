"""A run that is started as the UI starts one: through the deployment that `distill serve` registers."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from infra.store import ArtifactStore
from tests.flows.conftest import ROOT, ToyChain, wait_until


def wait_while_it_runs(process: Any, done: Callable[[], Any], what: str) -> Any:
    def look() -> Any:
        if process.poll() is not None:
            pytest.fail(f"distill serve ended: {process.communicate()}")
        return done()

    return wait_until(look, what)


@pytest.mark.service
@pytest.mark.slow
def test_a_run_started_through_the_server_makes_its_artifact(chain: ToyChain, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    client: Any = get_client(sync_client=True)
    process = chain.command("serve", server=prefect_server)

    def deployment() -> Any:
        try:
            return client.read_deployment_by_name("distill-teacher/here")
        except ObjectNotFound:
            return None

    def final(run: Any) -> Any:
        state = client.read_flow_run(run.id).state
        return state if state is not None and state.is_final() else None

    try:
        found = wait_while_it_runs(process, deployment, "registration")
        assert "minimum" in str(found.parameter_openapi_schema), "the form in the UI has no bounds"
        recipe = chain.data(teacher={"source": str(ROOT / "recipes" / "tiny_teacher")})
        with pytest.raises(PrefectHTTPStatusError, match=r"422|409"):
            client.create_flow_run_from_deployment(found.id, parameters={"recipe": recipe | {"seed": "many"}, "store": chain.address})
        run = client.create_flow_run_from_deployment(found.id, parameters={"recipe": recipe, "store": chain.address})
        state = wait_while_it_runs(process, lambda: final(run), "the run's end")
        completed = state.is_completed()
    finally:
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)

    assert completed, "\n".join(output)
    assert [manifest.kind for manifest in ArtifactStore.open(chain.address).manifests()] == ["teacher"]
