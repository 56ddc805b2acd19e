"""Toy methods and a workspace on a folder, for the tests of the loop."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from infra.store import ArtifactStore, StoreSettings
from schemas.manifest import Lineage
from schemas.training import OptimizerConfig, TrainingConfig
from stages.training import Draw, Method, Player, train, write_metrics
from stages.workspace import Workspace

IDENTITY = "ab" * 32
SIZE = 37
DATA = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(5))


def make_workspace(folder: Path, identity: str = IDENTITY) -> Workspace:
    store = ArtifactStore.open(str(folder / "store"), StoreSettings(cache_dir=folder / "cache"))
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return Workspace(store, identity, Lineage(stage="toy", node="toy", revision=1, config={}, inputs={}), scratch)


def read(indices: Sequence[int]) -> Tensor:
    return DATA[list(indices)]


class Regression(Method[Tensor, tuple[Tensor, Tensor]]):
    """One network learns to denoise."""

    def __init__(self, config: TrainingConfig, optimizer: OptimizerConfig | None = None, dropout: float = 0.1) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 6))
        optimizer = optimizer or OptimizerConfig(learning_rate=1e-2)
        self.players = {"student": Player.of(dict(self.network.named_parameters()), optimizer, config)}

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"student": self.network.state_dict()}

    def prepare(self, batch: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return batch + 0.1 * draw.normal("noise", batch.shape[1:]), batch

    def loss(self, player: str, prepared: tuple[Tensor, Tensor], draw: Draw) -> Mapping[str, Tensor]:  # noqa: ARG002
        noisy, clean = prepared
        output = self.network(noisy + 0.01 * draw.normal("more noise", noisy.shape[1:]))
        return {"loss": (output - clean).square().mean(), "output_std": output.std()}


class Duel(Method[Tensor, Tensor]):
    """A generator and a discriminator, with settings of their own; the discriminator has two turns a step."""

    def __init__(self, config: TrainingConfig, max_grad_norms: tuple[float | None, float | None] = (None, None)) -> None:
        torch.manual_seed(1)
        self.generator, self.discriminator = nn.Linear(6, 6), nn.Linear(6, 1)
        self.max_grad_norms = max_grad_norms
        self.frozen: list[tuple[str, bool, bool]] = []
        g, d = max_grad_norms
        self.players = {
            "generator": Player(
                dict(self.generator.named_parameters()),
                OptimizerConfig(learning_rate=1e-2),
                config.training_steps,
                max_grad_norm=g,
                ema_decay=0.9,
            ),
            "discriminator": Player(
                dict(self.discriminator.named_parameters()),
                OptimizerConfig(name="adamw", learning_rate=3e-2, betas=(0, 0.99)),
                2 * config.training_steps,
                lr_schedule="linear",
                max_grad_norm=d,
            ),
        }

    def turns(self, step: int) -> Sequence[str]:  # noqa: ARG002
        return ("generator", "discriminator", "discriminator")

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"generator": self.generator.state_dict(), "discriminator": self.discriminator.state_dict()}

    def prepare(self, batch: Tensor, draw: Draw) -> Tensor:  # noqa: ARG002
        return batch

    def loss(self, player: str, prepared: Tensor, draw: Draw) -> Mapping[str, Tensor]:
        self.frozen.append((player, self.generator.weight.requires_grad, self.discriminator.weight.requires_grad))
        fake = self.generator(draw.normal("latent", (6,)))
        softplus = nn.functional.softplus
        if player == "generator":
            return {"loss": softplus(-self.discriminator(fake)).mean()}
        return {"loss": (softplus(self.discriminator(fake)) + softplus(-self.discriminator(prepared))).mean()}


METHODS = {"regression": Regression, "duel": Duel}


def run(folder: Path, kind: str, config: TrainingConfig) -> tuple[bytes, bytes]:
    """Train, and return the bytes of the networks and of the metrics."""
    method = METHODS[kind](config)
    rows = train(method, read, SIZE, config, make_workspace(folder), seed=7)
    write_metrics(rows, folder / "metrics.parquet")
    tensors = [tensor for network in method.state().values() for tensor in network.values()]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors), (folder / "metrics.parquet").read_bytes()


if __name__ == "__main__":  # python -m tests.training.toys FOLDER KIND CONFIG: a process that a test may kill
    run(Path(sys.argv[1]), sys.argv[2], TrainingConfig.model_validate_json(sys.argv[3]))
