"""The real stages' own look at what they will read, before anything runs: each mistake in the recipe's inputs is told at once."""

import json
from pathlib import Path

import pytest

from flows.preparation import prepare
from schemas.errors import BadInput
from schemas.loading import parse_recipe

GOOD_TABLE = "url,caption,width,height,aesthetic\nhttp://a/1.png,one,2000,2000,6.5\n"


def wrong(folder: Path, **sections: object) -> str:
    """Prepare a recipe on the real stages and return what it is refused for."""
    data = {"name": "wrong", "ingest": {"table": str(folder / "table.csv")}, "teacher": {"source": str(folder / "teacher")}} | sections
    with pytest.raises(BadInput) as caught:
        prepare(parse_recipe(data), f"file://{folder / 'store'}")
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "table.csv").write_text(GOOD_TABLE)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]})
    )
    return tmp_path


def test_an_unsupported_teacher_is_refused_by_name(folder: Path) -> None:
    assert "FluxPipeline" in wrong(folder)


def test_a_folder_that_is_no_pipeline(folder: Path) -> None:
    (folder / "teacher" / "model_index.json").rename(folder / "teacher" / "readme.txt")
    assert "model_index.json" in wrong(folder)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("address,caption\nhttp://a/1.png,one\n", "url"),
        ("url\nhttp://a/1.png\n", "caption"),
        ("", "table.csv"),
        ("url,caption\n", "has no rows"),
    ],
)
def test_a_table_without_the_columns_or_rows(folder: Path, table: str, expected: str) -> None:
    (folder / "table.csv").write_text(table)
    shown = wrong(folder)
    assert expected in shown and "FluxPipeline" in shown  # everything wrong at once


def test_an_empty_prompts_file_and_a_wrong_table_together(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n\n")
    (folder / "table.csv").write_bytes(b"\xff\xfe\x00\x01")
    shown = wrong(folder, evaluate={"prompts": str(folder / "prompts.txt"), "extractor": "efficientnet-lite0"})
    assert "holds no prompt" in shown and "table.csv" in shown


def test_a_package_that_is_missing_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("stages.ingest")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow.csv", None)  # as where it is not installed
    with pytest.raises(BadInput, match=r"package pyarrow.* is not installed here; expected the extras"):
        from stages.registry import stage

        stage("ingest").load_preflight()
