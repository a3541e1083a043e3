"""What the selection exchanges between devices, and what a sharded step takes.

    python benchmarks/sharded.py                    # 1, 2, 4, 8 virtual CPU devices
    python benchmarks/sharded.py --quick            # 1 and 8, a tiny tree
    python benchmarks/sharded.py --seven-billion    # compiled for 256 devices, not run

Collectives are read from the compiled program, with their bytes on one device. Virtual
devices share the cores of one machine, so the times show no scaling: they show that the
cost beside `optax.sgd` stays the same when leaves are split, because nothing is
gathered. Prints tables, writes JSON and a figure.
"""

import argparse
import math
import re
from collections import defaultdict
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import optax
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib import pyplot as plt
from tqdm import tqdm

COUNTS = (1, 2, 4, 8)
POD = (32, 8)  # FSDP x tensor
SMALL = {"layers": 2, "width": 512, "hidden": 1408, "vocabulary": 4096}
TINY = {"layers": 1, "width": 64, "hidden": 128, "vocabulary": 256}
SLICE_LAYERS = 8  # of the slice that concatenate + top_k is compiled for
NOTE = (
    "Virtual devices share the cores of this machine: the times do not show scaling, "
    "only that nothing is gathered."
)

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
OPERATIONS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


# --- reading a compiled program


def array_sizes(text: str) -> list[tuple[int, int]]:
    """Entries and bytes of every array type in a piece of HLO."""
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text):
        if dtype in WIDTHS:
            count = math.prod(int(d) for d in dims.split(",") if d)
            sizes.append((count, count * WIDTHS[dtype]))
    return sizes


def computations(text: str) -> dict[str, list[re.Match]]:
    """Instructions of every computation of a module, by name."""
    found: dict[str, list[re.Match]] = {}
    current = None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = found.setdefault(head[1], [])
        elif current is not None and (instruction := INSTRUCTION.match(line)):
            current.append(instruction)
    return found


def called_by(instruction: re.Match) -> list[str]:
    """Names of the computations that an instruction calls."""
    names = CALLED.findall(instruction[4])
    for branches in BRANCHES.findall(instruction[4]):
        names += re.findall(r"[\w.\-]+", branches)
    return names


def inside_loops(modules: dict[str, list[re.Match]]) -> set[str]:
    """Names of the computations that run once per pass of some loop."""
    loops = [i for body in modules.values() for i in body if i[3] == "while"]
    waiting = [name for loop in loops for name in called_by(loop)]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in modules and name not in reached:
            reached.add(name)
            waiting += [n for i in modules[name] for n in called_by(i)]
    return reached


def collectives(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Count the collectives of a compiled program and their bytes on one device.

    Returns:
        Under "pass" (inside a loop) and "once" (outside), by operation: `count`,
        `sent` and `received` bytes, and `largest`, the entries of the largest array.
    """
    modules = computations(text)
    loops = inside_loops(modules)
    empty = {"count": 0, "sent": 0, "received": 0, "largest": 0}
    found = {"pass": defaultdict(empty.copy), "once": defaultdict(empty.copy)}
    for name, body in modules.items():
        types = {i[1]: i[2] for i in body}
        for instruction in body:
            kind = re.fullmatch(f"({OPERATIONS})(-start)?", instruction[3])
            if kind:
                entry = found["pass" if name in loops else "once"][kind[1]]
                add(entry, instruction, types)
    return {where: dict(entries) for where, entries in found.items()}


def add(entry: dict[str, int], instruction: re.Match, types: dict[str, str]) -> None:
    """Add one collective to an entry."""
    names = re.findall(r"%?([\w.\-]+)", instruction[4].split(")")[0])
    sent = [s for name in names if name in types for s in array_sizes(types[name])]
    received = array_sizes(instruction[2])
    entry["count"] += 1
    entry["sent"] += sum(nbytes for _, nbytes in sent)
    entry["received"] += sum(nbytes for _, nbytes in received)
    entry["largest"] = max(entry["largest"], *(n for n, _ in sent + received), 0)


def describe(entries: dict[str, dict[str, int]]) -> str:
    """Format one side of `collectives`: 1 all-reduce, 64 B."""
    return (
        "; ".join(
            f"{entry['count']} {name}, {common.size(entry['received'])}"
            for name, entry in entries.items()
        )
        or "none"
    )


# --- putting trees on meshes


def make_mesh(layout: str, axis_type: AxisType, shape: tuple[int, int]):
    """Make a mesh of the first devices: (fsdp, tensor), or all of them fsdp."""
    count = math.prod(shape)
    shape = (count, 1) if layout == "FSDP" else shape
    return jax.make_mesh(
        shape,
        ("fsdp", "tensor"),
        axis_types=(axis_type,) * 2,
        devices=jax.devices()[:count],
    )


def split(mesh, params):
    """Split matrices over both axes; second kernels of a pair the other way round."""

    def sharding(path, leaf):
        if leaf.ndim < 2:
            return NamedSharding(mesh, P())
        second = path[-1].key in ("embedding", "attention_out", "down")
        return NamedSharding(
            mesh, P("tensor", "fsdp") if second else P("fsdp", "tensor")
        )

    return jax.tree_util.tree_map_with_path(sharding, params)


def split_state(tx, mesh, params, shardings):
    """Shardings of an optimizer state: those of the parameters, scalars replicated."""
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def typed(shapes, shardings):
    """Attach shardings to shapes."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        shardings,
    )


def compile_only(tx, mesh, shapes):
    """Compile a step for shapes alone; return what the program says of itself."""
    shardings = split(mesh, shapes)
    split_up = split_state(tx, mesh, shapes, shardings)
    params = typed(shapes, shardings)
    state = typed(jax.eval_shape(tx.init, shapes), split_up)
    compiled, seconds = common.compile_step(
        tx, params, state, params, (shardings, split_up)
    )
    return {**program(compiled), "compile_s": seconds}


def program(compiled):
    """Collectives and memory of a compiled step, on one device."""
    memory = compiled.memory_analysis()
    return {
        "collectives": collectives(compiled.as_text()),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


# --- 1 to 8 devices


def measure(layout, axis_type, count, run, steps):
    """Time sgd and gsm on a mesh of `count` devices, and read the program of gsm."""
    shape = (max(count // 2, 1), min(count, 2))
    mesh = make_mesh(layout, axis_type, shape)
    shardings = split(mesh, run.params)
    params = jax.device_put(run.params, shardings)
    names = ("optax.sgd", "gsm")
    steppers = [
        common.Stepper(
            name,
            tx,
            params,
            params,
            shardings=(shardings, split_state(tx, mesh, params, shardings)),
        )
        for name, tx in zip(names, (common.sgd(), common.gsm()), strict=True)
    ]
    seconds = common.interleave(
        steppers,
        lambda step: jax.device_put(run.gradients(step, None), shardings),
        steps,
        f"{layout}, {axis_type.name}, {count}",
    )
    return {
        "layout": layout,
        "axes": axis_type.name,
        "devices": count,
        "contenders": common.timings(seconds, names[0]),
        "gsm": program(steppers[1].step),
    }


def measure_peer(layout, count, shapes):
    """Compile concatenate + top_k for a mesh; it is not run."""
    shape = (max(count // 2, 1), min(count, 2))
    mesh = make_mesh(layout, AxisType.Auto, shape)
    tx = common.concatenating_gsm(common.top_k)
    return {
        "layout": layout,
        "devices": count,
        **compile_only(tx, mesh, shapes),
    }


def show(records, peers):
    """Print the tables of the run on few devices."""
    head = ["layout", "axes", "devices", "sgd ms", "gsm ms", "ratio", "q1 - q3"]
    head += ["per pass", "outside the loop", "temporary"]
    rows = []
    for record in records:
        sgd, gsm = (record["contenders"][name] for name in ("optax.sgd", "gsm"))
        found = record["gsm"]["collectives"]
        rows.append(
            [
                *map(str, (record["layout"], record["axes"], record["devices"])),
                common.spread(sgd["ms"])[0],
                common.spread(gsm["ms"])[0],
                *common.spread(gsm["ratio"]),
                describe(found["pass"]),
                describe(found["once"]),
                common.size(record["gsm"]["temporary_bytes"]),
            ]
        )
    print(f"\ngsm\n{common.table(head, rows, words=2)}\n{NOTE}")
    head = ["layout", "devices", "collectives", "temporary"]
    rows = [
        [
            peer["layout"],
            str(peer["devices"]),
            describe(peer["collectives"]["once"]),
            common.size(peer["temporary_bytes"]),
        ]
        for peer in peers
    ]
    print(f"\nconcatenate + top_k, compiled only\n{common.table(head, rows)}")


def received(found):
    """Bytes that one run through every collective brings to a device."""
    return sum(e["received"] for side in found.values() for e in side.values())


def draw(records, peers):
    """Ratios to the left, bytes received to the right, by number of devices."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    markers = iter(("o-", "s--", "^-.", "v:"))
    for label, cases in grouped(records, ("layout", "axes")):
        counts = [case["devices"] for case in cases]
        style = {"fmt": next(markers), "color": "black", "mfc": "0.8", "label": label}
        ratios = [case["contenders"]["gsm"]["ratio"] for case in cases]
        middle = [r["median"] for r in ratios]
        low = [r["median"] - r["q1"] for r in ratios]
        high = [r["q3"] - r["median"] for r in ratios]
        left.errorbar(counts, middle, yerr=[low, high], capsize=2, **style)
        traffic = [received(case["gsm"]["collectives"]) for case in cases]
        right.errorbar(counts, traffic, **style)
    for label, cases in grouped(peers, ("layout",)):
        traffic = [received(case["collectives"]) for case in cases]
        marker = "x" if label == "FSDP" else "+"
        name = f"concatenate + top_k, {label}"
        counts = [case["devices"] for case in cases]
        right.plot(counts, traffic, marker, color="0.4", ms=8, label=name)
    finish(left, right)
    return figure


def grouped(records, keys):
    """Group records by the values of some keys, in their order."""
    groups = defaultdict(list)
    for record in records:
        groups[", ".join(record[key] for key in keys)].append(record)
    return groups.items()


def finish(left, right):
    """Label the axes."""
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(COUNTS, list(map(str, COUNTS)))
        axis.set_xlabel("virtual devices on one machine")
    left.set_ylim(bottom=0)
    left.set_title("gsm step / optax.sgd step", fontsize=10)
    right.set_yscale("symlog", linthresh=10)
    right.set_ylim(0, 10 * right.get_ylim()[1])
    right.set_title("bytes received by collectives", fontsize=10)
    legend = {"loc": "outside lower center", "ncols": 3, "fontsize": 8}
    right.figure.legend(*right.get_legend_handles_labels(), **legend)


def few_devices(args):
    """Measure on 1 to 8 devices."""
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    shapes = trees.transformer(**(TINY if args.quick else SMALL))
    steps, counts = (3, (1, 8)) if args.quick else (args.steps, COUNTS)
    run = trees.made_up(shapes, jnp.dtype("float32"), steps, common.SEED)
    print(f"{trees.entries(shapes):,} entries, {len(jax.tree.leaves(shapes))} leaves")
    records = [
        measure(layout, axis_type, count, run, steps)
        for layout in ("FSDP", "FSDP x tensor")
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for count in counts
    ]
    peers = [
        measure_peer(layout, count, shapes)
        for layout in ("FSDP", "FSDP x tensor")
        for count in counts
    ]
    show(records, peers)
    record = {"steps": steps, "note": NOTE, "gsm": records, "concatenate": peers}
    common.save_json(args.output, "sharded", record)
    common.save_figure(args.output, "sharded", draw(records, peers))


# --- 256 devices, compiled only


def seven_billion(args):
    """Compile the step of a transformer for a pod, and that of the obvious way."""
    jax.config.update("jax_num_cpu_devices", math.prod(POD))
    layers, slice_layers = (2, 1) if args.quick else (32, SLICE_LAYERS)
    naive = common.concatenating_gsm(common.top_k)
    cases = [
        ("optax.sgd", common.sgd(), AxisType.Explicit, layers),
        ("gsm", common.gsm(), AxisType.Explicit, layers),
        ("gsm", common.gsm(), AxisType.Explicit, slice_layers),
        ("concatenate + top_k", naive, AxisType.Auto, slice_layers),
        ("concatenate + top_k", naive, AxisType.Auto, 32),
    ]
    records = [pod_case(*case) for case in tqdm(cases, desc="compiling", disable=None)]
    head = ["", "layers", "entries", "compile s", "per pass", "outside the loop"]
    head += ["temporary", "arguments"]
    print(f"\nper device, {POD[0]} x {POD[1]} devices, compiled and not run")
    print(common.table(head, map(pod_row, records)))
    for record in records:
        if "error" in record:
            print(f"refused: {record['name']}: {record['error']}")
    common.save_json(args.output, "seven_billion", {"mesh": POD, "cases": records})


def pod_case(name, tx, axis_type, layers):
    """Compile one case; JAX may refuse it."""
    shapes = trees.transformer(layers)
    record = {"name": name, "layers": layers, "entries": trees.entries(shapes)}
    mesh = make_mesh("FSDP x tensor", axis_type, POD)
    try:
        return record | compile_only(tx, mesh, shapes)
    except (ValueError, OverflowError) as error:
        return record | {"error": str(error).splitlines()[0]}


def pod_row(record):
    """Cells of one case."""
    start = [record["name"], str(record["layers"]), f"{record['entries'] / 1e9:.2f} G"]
    if "error" in record:
        return [*start, "refused", "", "", "", ""]
    return [
        *start,
        f"{record['compile_s']:.1f}",
        describe(record["collectives"]["pass"]),
        describe(record["collectives"]["once"]),
        common.size(record["temporary_bytes"]),
        common.size(record["argument_bytes"]),
    ]


def main():
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=20, help="timed rounds (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="tiny tree, few rounds")
    parser.add_argument(
        "--seven-billion", action="store_true", help="compile for 256 devices instead"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be positive")
    (seven_billion if args.seven_billion else few_devices)(args)


if __name__ == "__main__":
    main()
