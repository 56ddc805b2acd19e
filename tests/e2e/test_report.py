"""The report that a chain leaves beside its evaluation, as it can be opened."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import WINDOWS, Tab, assert_fits_and_is_quiet, browser, needs_browser
from tests.e2e.nano import NODES, Place

pytestmark = [pytest.mark.slow, pytest.mark.service]


@pytest.fixture(scope="module")
def report(undisturbed: Place) -> Path:
    address = undisturbed.store.report_address(undisturbed.manifests()["evaluate"])
    assert address is not None
    return Path(address.removeprefix("file://"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_a_chain_leaves_the_whole_report(undisturbed: Place, report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert len(page) < 10e6
    for node, manifest in undisturbed.manifests().items():
        assert f'id="a-{manifest.identity[:12]}"' in page, node
    assert len(undisturbed.manifests()) == len(NODES)
    assert "distill run nano.yaml" in page and "seed: 3" in page, "the command, and the recipe"
    assert f"report: {report}" in next(undisturbed.folder.glob("*.out")).read_text().replace("\n", ""), "where the command says it is"


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_it_fits_and_is_quiet(tab: Tab, report: Path, width: int, scheme: str) -> None:
    assert_fits_and_is_quiet(tab, report, width, scheme)
