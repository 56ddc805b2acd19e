"""What the sources must not do, and names that must not lead out of a store."""

import ast
import posixpath
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.store import ArtifactStore
from infra.store.transfer import object_key
from schemas.base import digest
from schemas.errors import BadInput
from schemas.manifest import FileEntry
from tests.test_imports import MAY_IMPORT, ROOT, imported

PREFIX = f"artifacts/{digest('an artifact')}"
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
WITHOUT_WEIGHTS = ("scheduler", "Scheduler", "Processor", "Tokenizer", "Config")
"""What the names of classes end in, or of the variables that hold them, which load configurations and vocabularies alone."""

pieces = st.one_of(st.sampled_from(["..", ".", "", "a", "~", "C:", "%2e%2e", "..\\..", "unet", "\0", "..."]), st.text(max_size=4))
names = st.one_of(
    st.text(max_size=20), st.lists(pieces, max_size=6).map("/".join), st.lists(pieces, max_size=4).map(lambda p: "/" + "/".join(p))
)


def wrongs(source: str) -> Iterator[str]:
    """Yield what is unsafe in a module: code of others that is run, pickles that are read, a shell."""
    tree = ast.parse(source)
    yield from (f"line {line}: imports {name}" for line, name in imported(tree) if name in PICKLES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value for word in node.keywords if word.arg}

        def says(argument: str, value: object, given: dict[str, ast.expr] = given) -> bool:
            return argument in given and isinstance(given[argument], ast.Constant) and given[argument].value is value  # type: ignore[attr-defined]

        if "trust_remote_code" in given and not says("trust_remote_code", False):  # left out, some loaders ask at the terminal
            yield f"line {node.lineno}: trust_remote_code"
        if (
            name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load")
            or says("shell", True)
            or says("allow_pickle", True)
        ):
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and not says("weights_only", True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        loads_weights = name.endswith(".from_pretrained") and not name.removesuffix(".from_pretrained").rstrip(")").endswith(
            WITHOUT_WEIGHTS
        )
        if loads_weights and not says("use_safetensors", True):
            yield f"line {node.lineno}: {name} without use_safetensors=True"


@pytest.mark.parametrize("room", [*MAY_IMPORT, "docker"])
def test_nothing_is_run_or_unpickled_that_came_from_elsewhere(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): wrong for path in files if (wrong := list(wrongs(path.read_text(encoding="utf-8"))))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, use_safetensors=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, use_safetensors=True, trust_remote_code=config.trusted)",
        "UNet.from_pretrained(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x)",
    ],
)
def test_what_is_unsafe_is_found(source: str) -> None:
    assert list(wrongs(source))


@given(name=names)
def test_a_files_name_cannot_leave_the_artifact(name: str) -> None:
    """Whatever a manifest says: neither its object on the store nor its file in a folder is outside of theirs."""
    try:
        entry = FileEntry(path=name, size=0, sha256="0" * 64)
    except ValidationError:
        return
    key = object_key(PREFIX, entry)
    assert posixpath.normpath(key) == key and key.startswith(f"{PREFIX}/files/")
    folder = Path("/folder/of/an/artifact")
    place = folder / entry.path
    assert Path(posixpath.normpath(place.as_posix())) == place and place.is_relative_to(folder) and place != folder


@pytest.mark.parametrize("path", ["../manifest.json", "a/../../x", "/etc/passwd", "", ".", "..", "a//b", "a/", "./a", "..\\x", "a\0b"])
def test_a_name_that_leads_out_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(path=path, size=0, sha256="0" * 64)


@settings(max_examples=50)
@given(name=names)
def test_no_other_name_reaches_a_file_beside_the_store(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Identities, references, recipes' names and names of parts: of each, what is not one is refused, and nothing is read or written."""
    folder = tmp_path_factory.getbasetemp() / "beside"
    store = ArtifactStore.open(f"file://{folder / 'store'}")
    secret = folder / "secret"
    secret.write_text(digest("an artifact"))
    source = tmp_path_factory.getbasetemp() / "part"
    source.mkdir(exist_ok=True)
    before = {path for path in folder.rglob("*") if ".tmp" not in path.parts}
    for ask in (
        lambda: store.find(name),
        lambda: store.resolve(name),
        lambda: store.latest(name, "encode"),
        lambda: store.latest("../..", name),
        lambda: store.remove(name),
        lambda: store.save_part(digest("an artifact"), f"../{name}", source),
        lambda: store.parts(name),
    ):
        with pytest.raises(BadInput):
            ask()
    assert {path for path in folder.rglob("*") if ".tmp" not in path.parts} == before
    assert secret.read_text() == digest("an artifact")
