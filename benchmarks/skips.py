"""How fast consistency distillation converges with a long and a short skip: `python -m benchmarks.skips [--steps 400]`.

The teacher is the exact score of a mixture of Gaussians, so that the ODE's endpoint is known; students are small networks, trained by the project's
own method and loop on the same data and noise, with skips of k = 20 and k = 1 timesteps (LCM, arXiv 2310.04378, 4.3). Printed at intervals of the
training is the squared error, in one call from pure noise, to where the solver's moves lead, by the variance of the endpoints. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from tests.stages.consistent import convergence
from tests.training.toys import make_workspace

SKIPS: Final = (20, 1)


def curves(steps: int, every: int) -> dict[int, dict[int, float]]:
    """By skip, then by training step, the error."""
    with tempfile.TemporaryDirectory(prefix="skips-") as place:
        return {
            skip: convergence(1000 // skip, make_workspace(Path(place) / str(skip)), training_steps=steps, every=every) for skip in SKIPS
        }


def main() -> None:
    """Print the table, and the curves as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--every", type=int, default=50, help="steps between two figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = curves(given.steps, given.every)
    sys.stdout.write("training steps" + "".join(f"{f'k = {skip}':>10}" for skip in found) + "\n")
    for step in found[SKIPS[0]]:
        sys.stdout.write(f"{step:14}" + "".join(f"{curve[step]:10.4f}" for curve in found.values()) + "\n")
    sys.stdout.write(
        json.dumps({f"k={skip}": {step: round(value, 5) for step, value in curve.items()} for skip, curve in found.items()}) + "\n"
    )


if __name__ == "__main__":
    main()
