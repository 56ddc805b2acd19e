"""Progress on the page of a run whose server is gone."""

import logging
import time

import pytest

from infra.progress import NullProgress


@pytest.mark.filterwarnings("ignore:Artifact creation outside:FutureWarning")
def test_a_server_that_is_gone_slows_no_stage(caplog: pytest.LogCaptureFixture) -> None:
    """Each try to reach it takes seconds; between them the stage works."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.progress import PrefectProgress

    progress = PrefectProgress("encode", NullProgress(), seconds=0.0)
    caplog.set_level(logging.WARNING)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 1}):
        progress.update(0, 100, "samples")
        begun = time.monotonic()
        for done in range(1, 100):
            progress.update(done, 100, "samples")
        assert time.monotonic() - begun < 0.5
        progress.update(100, 100, "samples")
    assert len([line for line in caplog.messages if "progress could not be reported" in line]) == 2  # the first and the last
