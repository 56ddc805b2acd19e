"""Kill a training stage with SIGKILL in the middle and run it again."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from schemas.manifest import Manifest
from tests.training.artifacts import workspace


def killed_and_resumed(folder: Path, stage: str, config: Any, inputs: Any, after: str) -> Manifest[Any]:
    """Run `stages.<stage>` in a process that is killed as soon as the part `after` exists, then to its end here. `folder` holds the store."""
    job = {"folder": str(folder), "stage": stage, "config": config.model_dump(mode="json"), "inputs": inputs.model_dump(mode="json")}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "tests.training.killing", json.dumps(job)], env=environment)
    deadline = time.monotonic() + 120
    parts = folder / "store" / "parts"
    while time.monotonic() < deadline and process.poll() is None and not list(parts.glob(f"*/{after}/part.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert list(parts.glob(f"*/{after}/part.json"))
    surroundings = workspace(folder, config=config)
    assert surroundings.store.find(surroundings.identity) is None
    manifest: Manifest[Any] = import_module(f"stages.{stage}").run(config, inputs, surroundings)
    return manifest


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    module = import_module(f"stages.{job['stage']}")
    settings = {"lightning": "schemas.lightning:LinkConfig", "lcm": "schemas.lcm:LcmConfig", "dmd": "schemas.dmd:DmdConfig"}[
        job["stage"]
    ].split(":")
    config = getattr(import_module(settings[0]), settings[1]).model_validate(job["config"])
    module.run(config, module.Inputs.model_validate(job["inputs"]), workspace(Path(job["folder"]), config=config))
