"""From a recipe to the list of stage runs, each with its identity, before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from schemas.base import Model, digest
from schemas.errors import BadInput
from schemas.evaluation import PERCEPTUAL, EvaluateConfig
from schemas.extractors import EXTRACTOR_WEIGHTS
from schemas.finetune import finetune_run
from schemas.recipe import Recipe
from schemas.training import StudentTraining
from stages.registry import stage

Source = str | tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """One run of one stage."""

    name: str
    """Unique in the plan, such as `lightning-32-8`."""
    stage: str
    config: Model
    seed: int
    inputs: Mapping[str, Source] = field(default_factory=dict)
    """Nodes whose artifacts it reads, by the field of the stage's `Inputs`; a tuple for a field that is a mapping by node name."""
    outside: Mapping[str, str] = field(default_factory=dict)
    """Addresses of what lies outside the store (the URL table, the teacher's folder), by name; their content digests are part of the identity."""

    @property
    def section(self) -> str:
        """Name of its section in the recipe."""
        return stage(self.stage).section

    def upstream(self) -> tuple[str, ...]:
        """Names of the nodes it reads, in order."""
        return tuple(name for source in self.inputs.values() for name in ((source,) if isinstance(source, str) else source))


@dataclass(frozen=True)
class Plan:
    """The stage runs of a recipe, or those that one of them needs, in an order in which each comes after what it reads, with their identities."""

    recipe: Recipe
    nodes: tuple[Node, ...]
    identities: Mapping[str, str]
    """By node name."""
    input_digests: Mapping[str, Mapping[str, str]]
    """By node name: identity of each input artifact and content digest of each outside file."""

    def node(self, name: str) -> Node:
        """Return a node by its name, or by its stage's where that is unique. Raises `BadInput` with the names there are."""
        return find_node(self.nodes, name)


def find_node(nodes: Sequence[Node], name: str) -> Node:
    """Return a node by its name, or by its stage's where that is unique. Raises `BadInput` with the names there are."""
    matches = [node for node in nodes if node.name == name] or [node for node in nodes if node.stage == name]
    if len(matches) != 1:
        expected = ", ".join(node.name for node in matches or nodes)
        raise BadInput(f"stage {name!r}: {'names several runs' if matches else 'is not in this recipe'}; expected one of {expected}")
    return matches[0]


def nodes_of(recipe: Recipe) -> tuple[Node, ...]:
    """List the stage runs a recipe asks for, without looking at any outside file."""
    seed = recipe.seed
    nodes = [
        Node("ingest", "ingest", recipe.ingest, seed, outside={"table": recipe.ingest.table}),
        Node(
            "measure",
            "measure",
            recipe.measure,
            seed,
            {"images": "ingest"},
            _outside(aesthetic_predictor=recipe.measure.aesthetic_predictor),
        ),
        Node("select", "select", recipe.select, seed, inputs={"measurements": "measure"}),
    ]
    selected: dict[str, Source] = {"images": "ingest", "selection": "select"}
    if recipe.teacher is not None:
        teacher = "teacher"
        nodes.append(Node(teacher, "teacher", recipe.teacher, seed, outside={"source": recipe.teacher.address}))
    else:
        assert recipe.train_teacher is not None, "the recipe's own check"
        teacher = "train-teacher"
        nodes.append(Node(teacher, "train-teacher", recipe.train_teacher, seed, inputs=selected))
    nodes.append(Node("encode", "encode", recipe.encode, seed, inputs=selected | {"teacher": teacher}))

    if recipe.pairs is not None:
        nodes.append(Node("pairs", "pairs", recipe.pairs, seed, inputs={"teacher": teacher, "latents": "encode"}))

    nodes += [
        Node(finetune_run(name), "finetune", config, seed, inputs={"teacher": teacher, "latents": "encode"})
        for name, config in recipe.finetune.items()
    ]

    students: list[str] = []
    if recipe.lightning is not None:
        for run in recipe.lightning.runs():
            inputs: dict[str, Source] = {"teacher": teacher, "latents": recipe.lightning.latents}
            inputs |= {name: source for name, source in (("source", run.teacher), ("start", run.start)) if source is not None}
            nodes.append(Node(run.name, "lightning", run.config, seed, inputs, _watch_outside(run.config)))
            students += [run.name] if run.published else []
    if recipe.lcm is not None:
        inputs = {"teacher": teacher, "latents": recipe.lcm.latents}
        nodes.append(Node("lcm", "lcm", recipe.lcm, seed, inputs, _outside(start=recipe.lcm.start) | _watch_outside(recipe.lcm)))
        students.append("lcm")
    if recipe.dmd is not None:
        inputs = {"teacher": teacher, "latents": "encode"}
        inputs |= {"pairs": "pairs"} if recipe.dmd.reads_pairs else {}
        regression = recipe.dmd.regression
        places = {} if regression is None else {"regression.vgg": regression.vgg, "regression.decoder": regression.decoder}
        outside = _outside(start=recipe.dmd.start, **places) | _watch_outside(recipe.dmd)
        nodes.append(Node("dmd", "dmd", recipe.dmd, seed, inputs, outside))
        students.append("dmd")
    if recipe.evaluate is not None:
        read = dict.fromkeys(run for entry in recipe.evaluate.transfer for run in entry.finetuned().values())
        inputs = selected | {"teacher": teacher, "latents": "encode", "students": tuple(students), "finetuned": tuple(read)}
        if recipe.evaluate.reference is not None:
            own = _outside(reference=recipe.evaluate.reference, extractor_weights=recipe.evaluate.extractor_weights)
            nodes.append(Node("reference", "reference", recipe.evaluate.reference_config(), seed, outside=own))
            inputs["reference"] = "reference"
        nodes.append(Node("evaluate", "evaluate", recipe.evaluate, seed, inputs, _evaluate_outside(recipe.evaluate)))
    if recipe.publish is not None:
        styles = tuple(finetune_run(name) for name, config in recipe.finetune.items() if config.network == "lora")
        inputs = {"teacher": teacher, "students": tuple(students), "styles": styles, "evaluation": "evaluate"}
        nodes.append(Node("publish", "publish", recipe.publish, seed, inputs))
    return tuple(nodes)


def _evaluate_outside(config: EvaluateConfig) -> dict[str, str]:
    places = _outside(
        prompts=config.prompts,
        extractor_weights=config.extractor_weights,
        clip_model=config.clip_model if "clip_score" in config.metrics else None,
        perceptual_vgg=config.perceptual.vgg if PERCEPTUAL & set(config.metrics) else None,
    )
    for entry in config.transfer:
        places |= entry.outside()
    return places | {also.outside_name: also.path for also in config.also}


def _watch_outside(config: StudentTraining) -> dict[str, str]:
    return {} if config.watch is None else _outside(**{f"watch.{EXTRACTOR_WEIGHTS}": config.watch.extractor_weights})


def _outside(**addresses: str | None) -> dict[str, str]:
    return {name: address for name, address in addresses.items() if address is not None}


def make_plan(
    recipe: Recipe, outside_digest: Callable[[str], str], given: Mapping[str, str] | None = None, target: Node | None = None
) -> Plan:
    """Give every stage run its identity; with a `target`, only that one and those it follows from, so that nothing else need be readable here.

    `given` names artifacts by identity that take the place of what the named runs would make. `outside_digest` returns the content digest of an
    outside address (`infra.outside.content_digest`). An identity is the digest of (stage name, stage revision, the configuration's identity
    fields, seed, digests of the inputs): equal identity, equal artifact. Raises `BadInput` that names everything outside that cannot be read.
    """
    nodes = nodes_of(recipe) if target is None else _followed(nodes_of(recipe), target, given or {})
    outside = _outside_digests([node for node in nodes if node.name not in (given or {})], outside_digest)
    identities: dict[str, str] = {}
    inputs: dict[str, dict[str, str]] = {}
    for node in nodes:
        if node.name in (given or {}):
            identities[node.name], inputs[node.name] = (given or {})[node.name], {}
            continue
        digests = dict(outside[node.name])
        for name, source in node.inputs.items():
            if isinstance(source, str):
                digests[name] = identities[source]
            else:
                digests |= {f"{name}.{upstream}": identities[upstream] for upstream in source}
        inputs[node.name] = digests
        identities[node.name] = identity_of(node, digests)
    return Plan(recipe, nodes, identities, inputs)


def _followed(nodes: Sequence[Node], target: Node, given: Mapping[str, str]) -> tuple[Node, ...]:
    """Return `target` and the nodes that it reads, directly or through others, up to given ones."""
    wanted = {target.name}
    for node in reversed(nodes):  # each comes after what it reads
        if node.name in wanted and node.name not in given:
            wanted.update(node.upstream())
    return tuple(node for node in nodes if node.name in wanted)


def _outside_digests(nodes: Sequence[Node], outside_digest: Callable[[str], str]) -> dict[str, dict[str, str]]:
    digests: dict[str, dict[str, str]] = {node.name: {} for node in nodes}
    wrong: list[str] = []
    for node in nodes:
        for name, address in node.outside.items():
            try:
                digests[node.name][name] = outside_digest(address)
            except BadInput as error:
                wrong.append(f"{node.section}.{name}: {error}")
    if wrong:
        raise BadInput("\n".join(wrong))
    return digests


def identity_of(node: Node, input_digests: Mapping[str, str]) -> str:
    """Digest of all that may change the result of a stage run."""
    return digest(
        {
            "stage": node.stage,
            "revision": stage(node.stage).revision,
            "config": node.config.identity_fields(),
            "seed": node.seed,
            "inputs": dict(input_digests),
        }
    )
