"""Artifacts and chains in words: rows for a terminal, markdown for a run's page in Prefect."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from infra.store import ArtifactStore
from schemas.manifest import Cost, Evaluation, Manifest


def manifest_rows(manifest: Manifest) -> dict[str, str]:
    """Say what an artifact is, what is in it and what it took, by name."""
    lineage = manifest.lineage
    return {
        "artifact": manifest.identity,
        "kind": manifest.kind,
        "stage": f"{lineage.node} (revision {lineage.revision})",
        **{name: _shown(value) for name, value in manifest.content.model_dump(mode="json").items() if name != "kind"},
        "inputs": ", ".join(f"{name} {identity[:12]}" for name, identity in lineage.inputs.items()) or "none",
        "files": f"{len(manifest.files)} ({size(manifest.bytes)})",
        **cost_rows(lineage.cost),
        "device": lineage.device,
        "source revision": lineage.source_revision,
    }


def cost_rows(cost: Cost) -> dict[str, str]:
    """Say what an artifact took, by name."""
    attempts = "" if cost.attempts == 1 else f" in {cost.attempts} attempts"
    device = "" if cost.peak_device_bytes is None else f", {size(cost.peak_device_bytes)} of a device"
    return {
        "time": f"{cost.wall_seconds:.1f} s{attempts}",
        "GPU hours": f"{cost.gpu_hours:.3g}",
        "peak memory": size(cost.peak_memory_bytes) + device,
        "over the store": f"{size(cost.bytes_read)} read, {size(cost.bytes_written)} written",
    }


def manifest_page(manifest: Manifest, store: ArtifactStore) -> str:
    """One artifact, with the command that shows all of it."""
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in manifest_rows(manifest).items()]
    table = "\n".join(["| | |", "|---|---|", *lines])
    return f"## {manifest.lineage.node}\n\n{table}\n\nOn `{store.address}`: `distill show {manifest.identity[:12]}`\n"


def chain_page(name: str, manifests: Mapping[str, Manifest], made: Iterable[str], store: ArtifactStore) -> str:
    """The whole chain, a line a stage run, and where the report is."""
    made = set(made)
    lines = [
        "| stage | | artifact | size | time when made | GPU hours | read | written | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for node, manifest in manifests.items():
        state, cost = "made" if node in made else "found", manifest.lineage.cost
        took = (
            f"{cost.wall_seconds:.1f} s",
            f"{cost.gpu_hours:.3g}",
            *map(size, (cost.bytes_read, cost.bytes_written, cost.peak_memory_bytes)),
        )
        lines.append(f"| {node} | {state} | `{manifest.identity[:12]}` {manifest.kind} | {size(manifest.bytes)} | {' | '.join(took)} |")
    reports = [manifest for manifest in manifests.values() if isinstance(manifest.content, Evaluation)]
    report = "".join(
        f"\n\nReport: `report.html` of artifact `{manifest.identity}`; `distill show {manifest.identity[:12]} --file report.html` brings it here."
        for manifest in reports
    )
    return f"## {name}\n\nStore: `{store.address}`\n\n" + "\n".join(lines) + report + "\n"


def failure_page(recipe: str, node: str, store: ArtifactStore, reason: str) -> str:
    """Why a stage run failed, and how to go on."""
    return (
        f"## {node} failed\n\n{_quoted(reason)}\n\n"
        "What is finished is kept. To go on, once the reason is mended: *Retry* on this run, or with the file of the recipe "
        f"{recipe} the chain, from where it failed, or this stage alone:\n\n"
        f"```sh\ndistill run RECIPE --store {store.address}\ndistill stage {node} RECIPE --store {store.address}\n```\n"
    )


def _quoted(text: str) -> str:
    """Plain text as a quotation, which is folded to the page's width as a block of code is not."""
    return "\n>\n".join("> " + re.sub(r"[\\`*_<>\[\]#|~]", r"\\\g<0>", line) for line in text.splitlines())


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _shown(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 400 else text[:397] + "..."
