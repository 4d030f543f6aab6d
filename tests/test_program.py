"""Read programs whose collectives are known, and literal HLO lines; print reports.

The GPU lines are shortened from what XLA printed for H100s (jax 0.10.2 and 0.11.2, compiled without
a GPU).
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn_spmd.analysis import hlo, program

BOTH = ("data", "model")
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
# Bytes of one device's f32[8,32], the operand of every explicit collective below.
X = 8 * 32 * 4
TINY = {"data": 4, "model": 2}


def make_mesh(shape):
    # conftest.py simulates 8 devices. With fewer, these tests would prove nothing.
    assert len(jax.devices()) == 8
    return jax.make_mesh(shape, BOTH, axis_types=(AxisType.Auto,) * 2)


def compile_on(mesh, function, *shapes):
    """Compile `function` of f32 blocks, one per device; results stay there."""
    blocks = PartitionSpec(BOTH)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=blocks, out_specs=blocks, check_vma=False)
    return (
        jax.jit(mapped)
        .lower(*[jax.ShapeDtypeStruct((8 * s[0], *s[1:]), jnp.float32) for s in shapes])
        .compile()
    )


def parse(text, mesh_shape=TINY):
    return hlo.Module(text, mesh_shape).collectives()


def one(text, mesh_shape=TINY):
    (collective,) = parse(text, mesh_shape)
    return collective


# ---- Explicit collectives, compiled here.


@pytest.mark.parametrize("named", [("data",), ("model",), BOTH], ids="+".join)
@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_each_explicit_collective_is_read_exactly(shape, named):
    mesh = make_mesh(shape)
    axes = tuple(axis for axis in named if mesh.shape[axis] > 1)
    g = int(np.prod([mesh.shape[axis] for axis in axes]))
    ring = [(i, (i + 1) % g) for i in range(g)]

    def every_one(x):
        return (
            lax.psum(x, named),
            lax.all_gather(x, named, tiled=True),
            lax.psum_scatter(x, named, tiled=True),
            lax.all_to_all(x, named, 0, 1, tiled=True),
            lax.ppermute(x, named, ring),
        )

    found = parse(compile_on(mesh, every_one, (8, 32)).as_text(), dict(mesh.shape))
    # Operation -> bytes, ring bytes.
    expected = {
        "all-reduce": (X, 2 * (g - 1) * X // g),
        "all-gather": (g * X, (g - 1) * X),
        "reduce-scatter": (X, (g - 1) * X // g),
        "all-to-all": (X, (g - 1) * X // g),
        "collective-permute": (X, X),
    }
    if g == 1:
        # Groups of one device move nothing.
        assert found == []
        return
    assert len(found) == len(expected)
    assert {c.operation: (c.bytes, c.ring_bytes) for c in found} == expected
    assert {(c.axes, c.group_size) for c in found} == {(axes, g)}


def test_a_combined_all_reduce_is_one_instruction_with_the_bytes_of_both():
    mesh = make_mesh((4, 2))
    collective = one(
        compile_on(mesh, lambda x, y: lax.psum((x, y), "data"), (8, 32), (8,)).as_text()
    )
    assert (collective.operation, collective.axes) == ("all-reduce", ("data",))
    assert sorted(collective.shapes) == ["f32[8,32]", "f32[8]"]
    assert collective.bytes == X + 32
    assert collective.ring_bytes == (X + 32) * 3 // 2


def test_a_scan_body_counts_once():
    def seven_sums(x):
        return lax.scan(lambda carry, _: (lax.psum(carry, "model") * 0.5, None), x, length=7)[0]

    text = compile_on(make_mesh((2, 4)), seven_sums, (8, 32)).as_text()
    assert " while(" in text
    collective = one(text, {"data": 2, "model": 4})
    assert (collective.operation, collective.axes, collective.bytes) == (
        "all-reduce",
        ("model",),
        X,
    )


@pytest.fixture(scope="module")
def step():
    """Compile a train step on 4x2: two dense layers without biases, batch 64.

    The first kernel, 32x64, has its columns split over `model`; the second, 64x24, its rows.
    """
    mesh = make_mesh((4, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

    def loss(weights, x):
        return jnp.square(jnp.tanh(x @ weights["columns"]) @ weights["rows"]).mean()

    def train_step(weights, state, x):
        value, gradients = jax.value_and_grad(loss)(weights, x)
        with jax.named_scope("update"):
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, value

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    weights = {"columns": abstract((32, 64), None, "model"), "rows": abstract((64, 24), "model")}
    shardings = jax.tree.map(lambda w: w.sharding, weights)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None, None))
    return mesh, jitted.lower(
        weights, optimizer.init(weights), abstract((64, 32), "data")
    ).compile()


# Bytes of one device's halves of the two kernels.
WEIGHTS = 32 * 32 * 4 + 32 * 24 * 4


def test_phases_of_a_real_train_step(step):
    mesh, compiled = step
    rows = hlo.summarise(parse(compiled.as_text(), dict(mesh.shape)))
    common = dict(operation="all-reduce", count=1)
    assert rows == [
        # Both weights' gradients, and with them, merged by XLA, the loss.
        common
        | dict(
            axes=["data"], phase="backward", bytes=WEIGHTS + 4, ring_bytes=(WEIGHTS + 4) * 3 // 2
        ),
        common | dict(axes=["model"], phase="forward", bytes=16 * 24 * 4, ring_bytes=16 * 24 * 4),
        # The norms of the two gradients.
        common | dict(axes=["model"], phase="update", bytes=8, ring_bytes=8),
    ]


def test_report_is_json_with_totals_memory_and_compiler(step):
    mesh, compiled = step
    report = program.report(compiled, mesh)
    assert json.loads(json.dumps(report)) == report
    assert report["compiler"]["platform"] == "cpu"
    assert report["mesh"] == TINY
    totals = {
        "count": 3,
        "bytes": WEIGHTS + 12 + 16 * 24 * 4,
        "ring_bytes": (WEIGHTS + 4) * 3 // 2 + 8 + 16 * 24 * 4,
    }
    assert report["totals"] == totals
    quarter_of_the_batch = 16 * 32 * 4
    assert report["memory"]["argument_bytes"] == WEIGHTS + quarter_of_the_batch
    # The weights are donated.
    assert report["memory"]["alias_bytes"] == WEIGHTS
    # The CPU's peak would leave temporaries out.
    assert report["memory"]["peak_bytes"] is None


def test_memory_is_none_where_the_backend_or_the_version_does_not_say():
    silent = program.memory(types.SimpleNamespace(memory_analysis=lambda: None))
    assert set(silent) == {
        f"{k}_bytes" for k in ("argument", "output", "temporary", "alias", "generated_code", "peak")
    }
    assert set(silent.values()) == {None}
    stats = types.SimpleNamespace(argument_size_in_bytes=12, temp_size_in_bytes=0)
    old = program.memory(types.SimpleNamespace(memory_analysis=lambda: stats))
    assert (old["argument_bytes"], old["temporary_bytes"], old["peak_bytes"]) == (12, 0, None)


def test_bytes_per_device():
    mesh = make_mesh((4, 2))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data", "model"), ()))
    tree = {
        "split": jax.ShapeDtypeStruct((16, 10), jnp.bfloat16, sharding=split),
        "whole": [jax.device_put(np.zeros((3, 5), np.float32), whole)],
        "scalar": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        "key": jax.device_put(jax.random.key(0), whole),
    }
    # 4x5 of 2 bytes, 3x5 of 4 bytes, one int32, two uint32.
    assert program.bytes_per_device(tree) == 40 + 60 + 4 + 8
    assert program.bytes_per_device({}) == 0
    with pytest.raises(ValueError, match=r"\['w'\]"):
        program.bytes_per_device({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


@pytest.mark.parametrize(("steps", "each", "part"), [(1, 3, 12), (3, 1, 4), (4, 3, 12)])
def test_what_a_loop_runs_several_times_counts_so_often(steps, each, part):
    """Except in an outermost loop over the steps of a chunk, which counts once."""
    mesh = make_mesh((4, 2))

    # 3 steps of 4 parts each.
    def step(x, _):
        return lax.psum(
            lax.scan(lambda x, _: (lax.psum(x, "model"), None), x, length=4)[0], "data"
        ), None

    compiled = compile_on(mesh, lambda x: lax.psum(lax.scan(step, x, length=3)[0], BOTH), (8, 32))
    found = hlo.Module(compiled.as_text(), dict(mesh.shape)).collectives(steps)
    assert {c.axes: c.count for c in found} == {("data",): each, ("model",): part, BOTH: 1}
    assert sum(row["bytes"] for row in hlo.summarise(found)) == (each + part + 1) * X


def test_a_loop_that_does_not_say_how_often_it_runs():
    mesh = make_mesh((4, 2))
    text = compile_on(
        mesh,
        lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: lax.psum(x, "model"), x),
        (8, 32),
    ).as_text()
    with pytest.raises(ValueError, match="does not say how often it runs"):
        parse(text)


# ---- Literal lines. PAIRS and HOP are groups of two along `model` on 4x2.

PAIRS = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true"
HOP = "channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"


@pytest.mark.parametrize(
    ("line", "operation", "shapes", "size"),
    [
        # jax 0.10: an all-reduce's start has the shape of its result, or of its results.
        (
            f"%s = f32[6,4]{{1,0}} all-reduce-start(%a), {PAIRS}, to_apply=%add",
            "all-reduce",
            ["f32[6,4]"],
            96,
        ),
        (
            f"%s = (f32[6]{{0}}, bf16[]) all-reduce-start(%a, %b), {PAIRS}",
            "all-reduce",
            ["f32[6]", "bf16[]"],
            26,
        ),
        # jax 0.11: it holds its operands too, as every start that XLA wraps.
        (
            f"%s = ((f32[6]{{0}}), f32[6]{{0}}) all-reduce-start(%a), {PAIRS}, to_apply=%add, "
            "output_to_operand_aliasing={{1}: (0, {})}",
            "all-reduce",
            ["f32[6]"],
            24,
        ),
        (
            "%s = ((f32[6]{0}, f32[2]{0}), (f32[6]{0}, f32[2]{0})) all-reduce-start(%a, %b), "
            f"{PAIRS}",
            "all-reduce",
            ["f32[6]", "f32[2]"],
            32,
        ),
        (
            f"%s = (f32[4,6]{{1,0}}, f32[8,6]{{1,0}}) all-gather-start(%a), {PAIRS}",
            "all-gather",
            ["f32[8,6]"],
            192,
        ),
        (
            "%s = ((f32[4]{0}, u8[2]{0}), (f32[8]{0}, u8[4]{0})) all-gather-start(%a, %b), "
            f"{PAIRS}",
            "all-gather",
            ["f32[8]", "u8[4]"],
            36,
        ),
        (
            "ROOT %s = ((f32[8,6]{1,0}), f32[4,6]{1,0}) reduce-scatter-start(%a), "
            f"{PAIRS}, dimensions={{0}}",
            "reduce-scatter",
            ["f32[4,6]"],
            192,
        ),
        (
            "%s = ((f32[8]{0}, f32[2]{0}), (f32[4]{0}, f32[1]{0})) reduce-scatter-start(%a, %b), "
            f"{PAIRS}",
            "reduce-scatter",
            ["f32[4]", "f32[1]"],
            40,
        ),
        (
            f"%s = ((f32[8]{{0}}), f32[8]{{0}}, s32[], u32[]) all-to-all-start(%a), {PAIRS}",
            "all-to-all",
            ["f32[8]"],
            32,
        ),
        (
            "%s = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%a), " + HOP,
            "collective-permute",
            ["bf16[8]"],
            16,
        ),
        (
            "%s = ((f32[8]{0}, s32[]), (f32[8]{0}, s32[])) collective-permute-start(%a, %b), "
            + HOP,
            "collective-permute",
            ["f32[8]", "s32[]"],
            36,
        ),
        (
            "%s = ((f32[8]{0}, f32[8]{0}, s64[2]{0}, s64[2]{0}, s64[2]{0}, /*index=5*/s64[2]{0}), "
            f"f32[8]{{0}}) ragged-all-to-all-start(%a, %b, %c, %d, %e, /*index=5*/%f), {PAIRS}",
            "ragged-all-to-all",
            ["f32[8]"],
            32,
        ),
        # The synchronous forms, with layouts of tiles and memory spaces.
        (
            f"%s = f32[8,128]{{1,0:T(8,128)S(1)}} collective-broadcast(%a), {PAIRS}",
            "collective-broadcast",
            ["f32[8,128]"],
            4096,
        ),
        (
            "%s = (pred[2]{0:T(128)}, c64[], f8e4m3fn[4]{0}, s16[1,1]{1,0}, f64[3]{0}, "
            "/*index=5*/u32[0]{0}) "
            f"all-reduce(%a, %b, %c, %d, %e, /*index=5*/%f), {PAIRS}",
            "all-reduce",
            ["pred[2]", "c64[]", "f8e4m3fn[4]", "s16[1,1]", "f64[3]", "u32[0]"],
            2 + 8 + 4 + 2 + 24,
        ),
    ],
)
def test_payload_of_literal_lines(line, operation, shapes, size):
    collective = one("  " + line)
    assert (collective.operation, list(collective.shapes), collective.bytes) == (
        operation,
        shapes,
        size,
    )
    assert (collective.axes, collective.group_size) == (("model",), 2)
    assert collective.ring_bytes == (
        size // 2
        if operation in ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all")
        else size
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", ("data",)),
        ("{{5,1,3,7},{6,4,2,0}}", ("data",)),
        ("{{6,7},{0,1},{4,5},{2,3}}", ("model",)),
        ("{{0,1,2,3,4,5,6,7}}", BOTH),
        ("{}", BOTH),
        ("[4,2]<=[8]", ("model",)),
        ("[1,8]<=[8]", BOTH),
        ("[2,4]<=[4,2]T(1,0)", ("data",)),
        ("[4,2]<=[2,2,2]T(1,0,2)", ("model",)),
        ("mesh['data'=4,'model'=2] {'model'}", ("model",)),
        ("mesh['data'=4,'model'=2] {'data'}", ("data",)),
        ("mesh['data'=4,'model'=2] {'data','model'}", BOTH),
        ("mesh['axis_0'=8] {'axis_0'}", BOTH),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", BOTH),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("model",)),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(2)2}", ("data",)),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("model",)),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}", ("data",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",)),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", None),
        ("[8,1]<=[8]", None),
        # XLA split an axis.
        ("{{0,2},{4,6},{1,3},{5,7}}", ("data (2 of 4)",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("data (2 of 4)",)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}", ("data+model (4 of 8)",)),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("data+model (2 of 8)",)),
        ("mesh['data'=4,'model'=2] {}", None),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_1'}", None),
    ],
)
@pytest.mark.parametrize(
    "rest", ["", ', use_global_device_ids=true, to_apply=%add, metadata={op_name="a/[2]" id=3}']
)
def test_groups_become_mesh_axes(groups, axes, rest):
    found = parse(f"  ROOT %r.1 = f32[8]{{0}} all-reduce(%a), replica_groups={groups}{rest}")
    assert [c.axes for c in found] == ([axes] if axes else [])


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", ("data",)),
        ("{{0,1},{2,3}}", ("model",)),
        ("{{0,3}}", BOTH),
        ("{{0,1},{1,3}}", BOTH),
        ("{{0,0},{1,1}}", None),
        ("{}", None),
    ],
)
def test_pairs_become_mesh_axes(pairs, axes):
    found = parse(
        f"  %p = f32[8]{{0}} collective-permute(%a), channel_id=1, source_target_pairs={pairs}"
    )
    assert [c.axes for c in found] == ([axes] if axes else [])


def test_an_asynchronous_collective_counts_once():
    sugared = f"""
  %all-gather-start = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%a), {PAIRS}
  %all-gather-done = f32[8]{{0}} all-gather-done(%all-gather-start), \
metadata={{op_name="jit(f)/jvp()/dot"}}
  %get-tuple-element = f32[8]{{0}} get-tuple-element(%all-gather-done), index=0"""
    wrapped = f"""
%wrapped (p: f32[8]) -> f32[4] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{{0}} reduce-scatter(%p), {PAIRS}, dimensions={{0}}, to_apply=%add
}}
ENTRY %main (a: f32[8]) -> f32[4] {{
  %start = ((f32[8]{{0}}), f32[4]{{0}}, s32[]) async-start(%a), calls=%wrapped
  %update = ((f32[8]{{0}}), f32[4]{{0}}, s32[]) async-update(%start)
  %done = f32[4]{{0}} async-done(%update)"""
    assert [c.name for c in parse(sugared)] == ["all-gather-start"]
    assert [c.name for c in parse(wrapped)] == ["reduce-scatter.1"]


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(step)/jvp(conv)/jit(relu)/max", "forward"),
        ("jit(many)/while/body/closed_call/jvp()/dot_general", "forward"),
        ("jit(step)/transpose(jvp(conv))/dot_general", "backward"),
        ("jit(step)/(transpose(jvp())/dot_general:jvp()/reduce_sum)", "backward"),
        ("jit(step)/update/reduce_sum", "update"),
        ("jit(step)/(jvp()/reduce_sum:update/reduce_sum)", "update"),
        ("jit(update)/jvp()/dot_general", "forward"),
        ("jit(step)/transpose", ""),
        ("jit(step)/last_update/mul", ""),
        ("jit(eval)/shard_map/psum", ""),
    ],
)
def test_phase_of_an_op_name(op_name, phase):
    metadata = f'metadata={{op_name="{op_name}" stack_frame_id=4}}'
    line = f"  %r = f32[8]{{0}} all-reduce(%a), {PAIRS}, {metadata}"
    assert one(line).phase == phase


def test_phase_of_a_merged_collective_without_a_name_is_that_of_its_operands():
    text = """
  %dot.8 = f32[4]{0} fusion(%x), kind=kCustom, \
metadata={op_name="jit(one)/transpose(jvp())/transpose" stack_frame_id=1}
  %loss = f32[] fusion(%x), kind=kInput, metadata={op_name="jit(one)/jvp()/reduce_sum"}
  %bitcast.1 = f32[1]{0} bitcast(%loss), control-predecessors={%dot.8}, \
metadata={scheduling_name="bitcast.1"}
  %join = f32[5]{0} fusion(%dot.8, %bitcast.1), kind=kLoop, calls=%dot.9, \
metadata={scheduling_name="join"}
  %r = f32[5]{0} all-reduce-start(OPERAND), replica_groups={}, to_apply=%add, \
metadata={scheduling_name="r"}"""
    assert one(text.replace("OPERAND", "%join")).phase == "backward"
    assert one(text.replace("OPERAND", "%bitcast.1")).phase == "forward"
    assert one(text.replace("OPERAND", "%elsewhere")).phase == ""


def test_lines_that_only_mention_a_collective_are_passed_over():
    text = """HloModule all-reduce, frontend_attributes={note="all-gather(x)"}
FunctionNames
1 "all-gather-start(x)"
%all-reduce-scatter-computation (a: f32[]) -> f32[] {
  %broadcast.1 = f32[8,2]{1,0} broadcast(%all-gather), dimensions={0}, \
metadata={op_name="collective-permute(x)"}
  %fusion = f32[8]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-to-all-computation
  %call-start = ((f32[8]{0}), f32[8]{0}) call-start(%a), to_apply=%f
  %ragged = f32[8,2]{1,0} ragged-dot(%a, %b, %c)
  %send = (f32[8]{0}, u32[], token[]) send(%a, %t), channel_id=3, is_host_transfer=true
}"""
    assert parse(text) == []


GOOD = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"%r = f32[8] all-frobnicate(%a), {GOOD}", "unknown collective 'all-frobnicate'"),
        (f"%r = f32[8] collective-shuffle-start(%a), {GOOD}", "unknown collective"),
        ("%r = (f32[8], u32[], token[]) send(%a, %t), channel_id=3", "unknown collective 'send'"),
        (f"%r := f32[8] all-reduce(%a), {GOOD}", "neither a header nor an instruction"),
        (f"f32[8] reduce-scatter-start(%a), {GOOD}", "neither a header nor an instruction"),
        (f"%r = f7[8] all-reduce(%a), {GOOD}", "unknown element type 'f7'"),
        (f"%r = s4[8]{{0:E(4)}} all-reduce(%a), {GOOD}", "unknown element type 's4'"),
        (f"%r = f32[<=8] all-reduce(%a), {GOOD}", "unknown shape"),
        (f"%r = (f32[8], f32[<=8]) all-reduce(%a, %b), {GOOD}", "unknown shape"),
        (f"%r = (f32[8], token[]) all-reduce(%a, %b), {GOOD}", "unknown element type 'token'"),
        (f"%r = () all-reduce(), {GOOD}", "unknown shape"),
        (f"%r = f32[8] all-gather-start(%a), {GOOD}", "unknown shape"),
        (f"%r = (f32[8], f32[16], f32[9]) all-gather-start(%a), {GOOD}", "unknown shape"),
        (f"%r = (f32[8], f32[16], opaque) all-gather-start(%a), {GOOD}", "unknown shape"),
        (
            f"%r = ((f32[8]), (f32[16], (f32[8], f32[9]))) all-gather-start(%a), {GOOD}",
            "unknown shape",
        ),
        ("%r = f32[8] all-reduce(%a), to_apply=%add", "unknown or missing replica_groups"),
        (
            '%r = f32[8] all-reduce(%a), metadata={op_name="replica_groups={}, x"}',
            "unknown or missing replica_groups",
        ),
        (
            "%r = f32[8] all-reduce(%a), replica_groups=@mesh<data=4,model=2> {model}",
            "unknown or missing",
        ),
        (
            "%r = f32[8] all-reduce(%a), replica_groups=mesh['data'=4,'model'=2]",
            "unknown or missing replica_groups",
        ),
        ("%r = f32[8] all-reduce(%a), replica_groups=mesh['data'=8] {'x'}", "not in"),
        ("%r = f32[8] all-reduce(%a), replica_groups=mesh['data'=8] {'data':(3)2}", "no such part"),
        (
            "%r = f32[8] all-reduce(%a), replica_groups=[2,4]<=[4,2]T(1,0)X",
            "unknown or missing replica_groups",
        ),
        ("%r = f32[8] all-reduce(%a), replica_groups=[3,2]<=[8]", "reshape"),
        ("%r = f32[8] all-reduce(%a), replica_groups={{},{}}", "unknown or missing replica_groups"),
        (
            "%r = f32[8] all-reduce(%a), replica_groups={{0,1},{2,4,6},{3,5,7}}",
            "replica_groups of several sizes: [2, 3]",
        ),
        ("%r = f32[8] all-reduce(%a), replica_groups={{0,1},{2,3}}", "each device"),
        ("%r = f32[8] all-reduce(%a), replica_groups=[8,2]<=[16]", "each device"),
        (
            "%r = f32[8] all-reduce(%a), channel_id=1, replica_groups={{0}}",
            "of replicas, not devices",
        ),
        (f"%r = f32[8] collective-permute(%a), {GOOD}", "source_target_pairs"),
        (
            "%r = f32[8] collective-permute(%a), source_target_pairs=[4,2]<=[8]",
            "source_target_pairs",
        ),
        ("%r = f32[8] collective-permute(%a), source_target_pairs={{0,8}}", "out of bounds"),
    ],
)
def test_an_unknown_form_raises_naming_the_line(line, reason):
    with pytest.raises(ValueError, match="in the HLO line: ") as error:
        parse(f"  %a = f32[8] parameter(0)\n  {line}\n")
    assert reason in str(error.value)
    assert line in str(error.value)


def test_groups_along_different_axes_are_those_of_no_axis_though_their_sizes_agree():
    line = "%r = f32[8] all-reduce(%a), replica_groups={{0,1},{2,3},{4,6},{5,7}}"
    assert one(line, {"a": 2, "b": 2, "c": 2}).axes == ("b+c (2 of 4)",)


def test_bytes_of_groups_that_are_no_whole_axes():
    """Each of the 2 devices sends half, though 4 lie along the axis."""
    groups = "replica_groups={{0,2},{4,6},{1,3},{5,7}}"
    gather = one(f"%r = f32[8] all-gather(%a), {groups}")
    assert (gather.group_size, gather.bytes, gather.ring_bytes) == (2, 32, 16)
    scatter = one(f"%r = f32[8] reduce-scatter(%a), {groups}")
    assert (scatter.group_size, scatter.bytes, scatter.ring_bytes) == (2, 64, 32)


def test_summary_rows_are_grouped_and_the_heaviest_come_first():
    text = f"""
  %r.1 = f32[8]{{0}} all-reduce(%a), {PAIRS}, metadata={{op_name="jit(f)/jvp()/x"}}
  %r.2 = f32[8]{{0}} all-reduce(%a), {PAIRS}, metadata={{op_name="jit(f)/jvp()/y"}}
  %r.3 = f32[8]{{0}} all-reduce(%a), {PAIRS}, metadata={{op_name="jit(f)/transpose(jvp())/x"}}
  %g.1 = f32[800]{{0}} all-gather(%a), {PAIRS}, metadata={{op_name="jit(f)/jvp()/x"}}
  %g.2 = f32[8]{{0}} all-gather(%a), replica_groups={{}}, metadata={{op_name="jit(f)/jvp()/x"}}"""
    rows = [tuple(row.values()) for row in hlo.summarise(parse(text))]
    assert rows == [
        ("all-gather", ["model"], "forward", 1, 3200, 1600),
        ("all-reduce", ["model"], "forward", 2, 64, 64),
        ("all-reduce", ["model"], "backward", 1, 32, 32),
        ("all-gather", ["data", "model"], "forward", 1, 32, 28),
    ]
    assert hlo.summarise([]) == []


# ---- The printed report.


def a_report(**changes) -> dict:
    """Return a small report of a run, as training/setup.py makes it."""
    kernel = dict(
        name="fc3.kernel",
        shape=[4096, 10],
        logical_axes=["fc3_in", "fc3_out"],
        mesh_axes=[["data", "model"], None],
        bytes_per_device=20_480,
        note="fc3_out=10 does not divide by model=4: replicated",
    )
    moved = dict(kind="gather", axes=["model"], compiled_bytes=2_000_000, closed_form_bytes=10**6)
    collective = dict(
        operation="all-gather",
        axes=["model"],
        phase="forward",
        count=2,
        bytes=2_000_000,
        ring_bytes=1_500_000,
    )
    report = dict(
        mesh=dict(data=2, model=4),
        compiler=dict(platform="cpu", device_kind="cpu", jaxlib="0.10.2"),
        devices=8,
        parallelism="model",
        model="alexnet",
        dtype="float32",
        batch_size=64,
        dataset="digits",
        fallback="cifar10",
        data_resident="yes",
        image_bytes_per_device=2_000_000,
        streamed_bytes_per_device=0,
        param_count=1_234_567,
        compile_seconds=1.23,
        placement=[kernel],
        activations=[kernel | dict(name="fc3 input", note="")],
        bytes_per_device=dict(parameters=3_000_000, optimizer=4_000_000),
        memory=dict(
            argument_bytes=9_000_000,
            output_bytes=7_000_000,
            alias_bytes=7_000_000,
            temporary_bytes=600_000,
            peak_bytes=None,
        ),
        collectives=[collective],
        overlap=program.UNKNOWN["overlap"],
        communication=[moved],
        closed_form=[dict(operation="reduce-scatter")],
        closed_form_ring_bytes=750_000,
        totals=dict(count=2, bytes=2_000_000, ring_bytes=1_500_000),
        closed_form_not_covered=None,
    )
    return report | changes


def test_the_printed_report():
    text = program.as_text(a_report(programs_from_cache=2))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    summary = [
        "mesh data=2 x model=4, 8 x cpu",
        "parallelism model, global batch 64, data digits (fallback for cifar10), "
        "a copy on every device",
        "model alexnet, 1,234,567 parameters, float32",
        "compiled for cpu (jaxlib 0.10.2) in 1.2 s, 2 programs from the cache",
        "memory per device: 9.6 MB (parameters 3.0, optimizer state 4.0, images 2.0, "
        "temporary 0.6)",
        "sent per device and step: 1.5 MB by 2 collectives (0.8 in theory)",
    ]
    note = "NOTE: fc3.kernel: fc3_out=10 does not divide by model=4: replicated"
    assert lines == [
        *summary,
        "",
        "Where each parameter lives between steps, MB per device",
        "name shape logical axes mesh axes MB",
        "fc3.kernel 4096x10 fc3_in, fc3_out data+model, - 0.020",
        "total 0.020",
        note,
        "",
        "Where each activation lives, MB per device",
        "name shape logical axes mesh axes MB",
        "fc3 input 4096x10 fc3_in, fc3_out data+model, - 0.020",
        "total 0.020",
        "",
        "Memory per device",
        "what MB",
        "parameters 3.000",
        "optimizer state 4.000",
        "images 2.000",
        "temporary 0.600",
        "total 9.600",
        "XLA's account of the program, MB: argument 9.0, output 7.0, alias 7.0, temporary 0.6",
        "",
        "Collectives per step, MB per device, summed over the count",
        "operation over mesh axes phase count payload sent in a ring",
        "all-gather model forward 2 2.000 1.500",
        "total 2 2.000 1.500",
        "",
        "What the schedule can hide is not known: there is no report on the program",
        "",
        "Payload per device and step, MB: compiled, and in theory (Gholami et al. 2018)",
        "kind over mesh axes compiled in theory",
        "gather model 2.000 1.000",
        "all, sent in rings 1.500 0.750",
        "XLA for CPUs has no reduce-scatter. It makes an all-reduce of the same payload, which "
        "sends twice",
        "as much.",
    ]
    started = program.as_summary(a_report(programs_from_cache=2))
    assert [" ".join(line.split()) for line in started.splitlines()] == [*summary, note]
    assert max(map(len, text.splitlines())) <= 100
    for changes in (
        dict(compiler=dict(platform="cuda", device_kind="H100", jaxlib="0.10.2")),
        dict(closed_form=[dict(operation="all-gather")]),
    ):
        assert "twice" not in program.as_text(a_report(**changes))


def test_the_printed_report_says_whether_a_step_fits():
    for memory, expected in (
        (None, "temporary 0.6)"),
        (9.6e6, "temporary 0.6), fits in its 0.0 GB"),
        (9e9, "temporary 0.6), fits in its 9.0 GB"),
        (9.5e6, "temporary 0.6), does NOT fit in its 0.0 GB"),
    ):
        text = program.as_summary(a_report(device_memory_bytes=memory))
        assert f"{expected}\nsent per device" in text.replace("\n    ", " ")
    # Of streamed images, a device holds a chunk and the next one.
    streamed = a_report(streamed_bytes_per_device=100_000, image_bytes_per_device=0)
    assert program.held_by_device(streamed)["images"] == 2 * 2_000_000


def test_a_wide_report_is_folded():
    rows = [
        dict(
            name="conv12 output",
            shape=[4096, 224, 224, 256],
            logical_axes=["conv_batch", "image_height", None, "conv_out"],
            mesh_axes=[["data", "model"], None, None, None],
            bytes_per_device=8 * 10**9,
            note="",
        )
    ]
    terms = dict.fromkeys(("computing", "update", "communication", "exposed"), 123.4)
    predicted = dict(predicted_milliseconds=246.8, card="h100", terms=terms, estimated=True)
    lines = program.as_text(a_report(activations=rows, prediction=predicted)).splitlines()
    assert max(map(len, lines)) <= 100
    at = lines.index("Where each activation lives, MB per device")
    assert lines[at + 2].endswith("8000.000")
    assert lines[at + 3].split()[0] == "conv_out"  # under the logical axes


def test_the_printed_report_says_what_is_missing():
    reason = (
        "a path leads around " + "'a.long.name.of.a.convolution output', " * 3 + "and that is it"
    )
    text = program.as_text(
        a_report(
            data_resident="no",
            collectives=[],
            communication=[],
            closed_form=None,
            closed_form_not_covered=reason,
        )
    )
    assert "streamed from the host" in text
    assert "no collectives" in text
    assert "in theory" not in text
    assert f"closed form: not covered: {reason}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100

    unknown = program.UNKNOWN | dict(
        placement=[],
        activations=[],
        bytes_per_device=dict(parameters=None, optimizer=None),
        communication=None,
        closed_form=None,
        error="ValueError: not known",
    )
    lines = program.as_text(a_report(**unknown)).splitlines()
    assert len(lines) == 6
    assert lines[-1] == ("warning: there is no whole report on this program: ValueError: not known")
