"""What of a training each of several processes holds but a part of: moments alone (ZeRO, arXiv 1910.02054), or networks and all (FSDP2).

A sharded parameter is a `DTensor`. Whatever leaves the processes is made whole first, so checkpoints and artifacts do not tell how many there were.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from schemas.training import TrainingConfig
from stages.diffusion.lora_merged import keep_no_sums
from stages.ranks import Parallel

N = TypeVar("N", bound=nn.Module)

UNITS = frozenset({"BasicTransformerBlock", "ResnetBlock2D"})
"""Classes of diffusers whose weights are gathered together, when they run, and dropped after. What is outside of them, a fiftieth of SDXL's UNet, is
gathered for a whole pass."""


def shares_out(config: TrainingConfig, parallel: Parallel) -> bool:
    """Whether each process keeps the optimiser's moments of some parameters only."""
    return config.sharding == "optimizer" and parallel.world_size > 1


def shard(network: N, config: TrainingConfig, parallel: Parallel) -> N:
    """Divide a network over the processes where `config.sharding` is `full`; returns it. One process holds it whole, whatever the configuration.

    From then on it must be called as a whole, since that is when its weights are gathered: its `forward`, not a part of it. Weights are float32
    where they rest and where they are gathered, so that autocast finds what it would find in one process. They lose the channels-last layout, which
    FSDP2 does not know.
    """
    if config.sharding != "full" or parallel.world_size == 1:
        return network
    keep_no_sums(network)
    _HOLLOW[network] = _hollow(network)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (parallel.world_size,))
    for module in network.modules():
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # It warns of outputs that are views, and of writing into them, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # The root too is divided again after each forward pass: one without gradients would leave it whole, and blind to the next update.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return network


def reduce_gradients(now: bool) -> None:
    """Say whether backward passes of sharded networks, from here on, add up gradients over the processes or keep them whole where they are.

    Of the parts of a batch only the last one's do: the sum goes over the wire once. Until then each process holds its own gradients of all that is
    trained. Weights are divided again after every pass all the same, since whole ones would lie beside whole gradients.
    """
    for network in list(_HOLLOW):
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(now)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds but a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: its part, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process: all must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, or the part of it that lies here, from the whole values, which every process has."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def whole_network(network: N, parallel: Parallel) -> N:
    """Return a network of the class it had before it was sharded, its weights whole and on the CPU: for files. All processes must ask together.

    One that is not sharded is returned itself. Only the first of several processes gets the weights.
    """
    hollow = _HOLLOW.get(network)
    if hollow is None:
        return network
    filled = copy.deepcopy(hollow)
    weights = {}
    for name, tensor in network.state_dict().items():
        gathered = whole(tensor)
        if parallel.leads:
            weights[name] = gathered.cpu()
    if parallel.leads:
        filled.load_state_dict(weights, assign=True)
    return filled  # type: ignore[no-any-return]


def gathered(tensors: Mapping[str, Tensor], parallel: Parallel, device: str) -> Iterator[tuple[str, Tensor]]:
    """Yield, by name, every tensor that any process holds, or holds a part of, whole and in every process. All must ask together."""
    held: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(parallel.world_size)]
    distributed.all_gather_object(held, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    for name in sorted(set().union(*held)):
        holders = [rank for rank, names in enumerate(held) if name in names]
        if len(holders) == parallel.world_size:
            yield name, whole(tensors[name])
            continue
        shape, dtype = held[holders[0]][name]
        tensor = tensors[name].contiguous() if parallel.rank == holders[0] else torch.empty(shape, dtype=dtype, device=device)
        distributed.broadcast(tensor, holders[0])
        yield name, tensor


_HOLLOW: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
"""By sharded network a copy of it from before, on the meta device: sharding changes a network's class, and forbids copies."""


def _hollow(network: N) -> N:
    """A copy without weights."""
    without: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in network.buffers()}
    without |= {id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad) for parameter in network.parameters()}
    return copy.deepcopy(network, without)
