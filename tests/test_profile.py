"""Traces made by hand, with known times, and traces of eight CPU devices."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cnn_spmd.analysis import profile

MS = 1e9  # picoseconds


def a_trace(planes):
    """Return a profile of {plane: {line: [(event, start, duration, stats)]}}.

    Times are milliseconds. Stats are text or whole numbers.
    """
    ids, text = {}, ""
    for plane, lines in planes.items():
        text += f'planes {{ name: "{plane}"\n'
        for line, events in lines.items():
            text += f'lines {{ name: "{line}"\n'
            for name, start, duration, stats in events:
                number = ids.setdefault(name, len(ids) + 1)
                text += (
                    f"events {{ metadata_id: {number} offset_ps: {start * MS:.0f} "
                    f"duration_ps: {duration * MS:.0f}\n"
                )
                for key, value in stats.items():
                    kind = "str_value" if isinstance(value, str) else "int64_value"
                    number = ids.setdefault(key, len(ids) + 1)
                    text += f"stats {{ metadata_id: {number} {kind}: {json.dumps(value)} }}\n"
                text += "}\n"
            text += "}\n"
        for key in ("event_metadata", "stat_metadata"):
            text += "".join(
                f'{key} {{ key: {n} value {{ id: {n} name: "{name}" }} }}\n'
                for name, n in ids.items()
            )
        text += "}\n"
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def parts(summary):
    """Return the milliseconds of step, compute, communication, exposed and idle."""
    return [
        summary[f"{part}_milliseconds"]
        for part in ("step", "compute", "communication", "exposed", "idle")
    ]


@pytest.mark.parametrize(
    "intervals, length",
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(5, 6), (1, 3)], 3),
        ([(1, 3), (2, 5)], 4),
        ([(1, 9), (2, 3), (4, 5)], 8),
        ([(1, 3), (3, 4)], 3),
    ],
)
def test_busy_is_the_length_of_the_union(intervals, length):
    assert profile.busy(intervals) == length


ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def test_gpu_streams():
    first = {
        "Stream #14(Compute,MemcpyD2D)": [
            ("conv", 0, 4, {}),
            ("MemcpyD2D", 4, 2, {}),
            ("conv", 10, 4, {}),
        ],
        "Stream #15(Compute)": [(ALL_REDUCE, 4, 4, {"hlo_op": "psum.1"})],
        "XLA Ops": [("fusion", 0, 16, {})],
        "Steps": [("1", 0, 100, {})],
        "_counters_": [("power", 200, 0, {})],
    }
    second = {
        "Stream #14(Compute)": [("conv", 0, 4, {}), ("conv", 12, 4, {})],
        "Stream #16": [
            ("one_shot_kernel", 6, 2, {"hlo_op": "all-reduce-start.7"}),
            ("fused", 13, 1, {"hlo_op": "all-reduce.fusion"}),
        ],
    }
    host = {"thread": [("conv", 0, 500, {"hlo_op": "conv", "device_ordinal": 0, "_p": 1})]}
    summary = profile.summarise(
        a_trace({"/host:CPU": host, "/device:GPU:0": first, "/device:GPU:1": second}), 2, 2
    )
    # Milliseconds of both steps: a window of 16; per device, compute 10 and 8, communication 4 and
    # 2, and 2 and 2 of these exposed.
    assert parts(summary) == [8, 4.5, 1.5, 1, 2.5]
    assert summary["note"] == ""
    rows = [tuple(row.values()) for row in summary["top"]]
    assert rows == [
        ("conv", 4, 1, False),
        (ALL_REDUCE, 1, 0.25, True),
        ("MemcpyD2D", 0.5, 0.25, False),
        ("one_shot_kernel", 0.5, 0.25, True),
        ("fused", 0.25, 0.25, False),
    ]
    assert json.loads(json.dumps(summary)) == summary


def test_top_holds_the_fifteen_longest():
    streams = {"Stream #1": [(f"k{n}", 100 * n, n, {}) for n in range(1, 21)]}
    names = [
        row["name"] for row in profile.summarise(a_trace({"/device:GPU:0": streams}), 1, 1)["top"]
    ]
    assert names == [f"k{n}" for n in range(20, 5, -1)]


def operation(name, start, duration, device, key):
    return name, start, duration, {"hlo_op": name, "device_ordinal": device, "_p": key}


def test_cpu_threads_serve_any_device():
    planes = {
        "/host:CPU": {
            "a": [
                operation("while.3", 0, 10, 0, 1),
                # Handed to another thread, and done at 5.
                operation("convolution.1", 1, 1, 0, 2),
                operation("psum.4", 4, 4, 1, 3),
                ("Rendezvous", 5, 2, {}),
                ("end: psum.4", 8, 0, {"_c": 3}),
            ],
            "b": [
                operation("tanh", 0, 3, 1, 4),
                ("end: tanh", 3, 0, {"_c": 4}),
                # A rendezvous outside of any operation.
                ("Rendezvous", 3.5, 1, {}),
                ("end: convolution.1", 5, 0, {"_c": 2}),
                operation("psum.4", 5, 3, 0, 5),
                ("Rendezvous", 6, 1, {}),
                ("end: psum.4", 8, 0, {"_c": 5}),
                operation("all-gather", 8, 2, 0, 7),
                # Between processes there is no rendezvous.
                ("end: all-gather", 10, 0, {"_c": 7}),
                ("end: while.3", 10, 0, {"_c": 1}),
            ],
            "c": [("dispatch", 0, 50, {}), operation("conditional.clone", 50, 9, 0, 6)],
        }
    }
    summary = profile.summarise(a_trace(planes), 1, 2)
    # Device 0 computes from 1 to 5 and communicates from 5 to 10.
    # Device 1 computes from 0 to 3 and communicates from 4 to 8.
    assert parts(summary) == [10, 3.5, 4.5, 4.5, 2]
    assert [(row["name"], row["communication"]) for row in summary["top"]] == [
        ("psum.4", True),
        ("convolution.1", False),
        ("tanh", False),
        ("all-gather", True),
    ]
    assert "share the CPU's cores" in summary["note"]


def product(contracted):
    """Return a call of a jitted a @ b over eight devices.

    They share the contracted dimension, which needs an all-reduce, or a's rows, which needs none.
    """
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    if contracted:
        a, b = put(jnp.ones((16, 64)), None, "model"), put(jnp.ones((64, 16)), "model")
        f = jax.jit(lambda a, b: a @ b, out_shardings=NamedSharding(mesh, PartitionSpec()))
    else:
        a, b = put(jnp.ones((16, 64)), "model"), put(jnp.ones((64, 16)))
        f = jax.jit(lambda a, b: a @ b)
    return lambda: f(a, b)


def test_a_real_trace_with_an_all_reduce(tmp_path):
    # As if a call were two steps.
    summary = profile.trace(product(contracted=True), 3, 2, tmp_path)
    (row,) = [row for row in summary["top"] if row["communication"]]
    assert row["name"].startswith("all-reduce")
    assert row["count"] == 0.5
    assert (summary["steps"], summary["devices"]) == (6, 8)
    step, compute, communication, exposed, idle = parts(summary)
    assert 0 < exposed <= communication < step
    assert compute > 0
    assert step == pytest.approx(compute + exposed + idle, abs=1e-3)
    # The calls are independent: two may wait at the same time.
    assert row["milliseconds"] >= communication
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_real_trace_without_collectives(tmp_path):
    call, called = product(contracted=False), []
    summary = profile.trace(lambda: called.append(1) or call(), 3, 1, tmp_path)
    # The first call compiles, and is not traced.
    assert len(called) == 1 + 3
    assert parts(summary)[2:4] == [0, 0]
    assert parts(summary)[1] > 0
    assert {row["count"] for row in summary["top"]} == {1}


@pytest.mark.parametrize(
    "planes",
    [
        {},
        {"/host:CPU": {"a": [("dispatch", 0, 1, {})]}},
        {"/device:GPU:0": {"XLA Ops": [("fusion", 0, 1, {})]}},
    ],
)
def test_a_trace_without_device_events_is_refused(planes):
    with pytest.raises(ValueError, match="the trace has events of 0 devices, expected 2"):
        profile.summarise(a_trace(planes), 1, 2)


def test_a_trace_that_lacks_a_device_is_refused():
    with pytest.raises(ValueError, match="the trace has events of 1 devices, expected 2"):
        profile.summarise(
            a_trace({"/device:GPU:0": {"Stream #1": [("k", 0, 1, {})]}, "/device:GPU:1": {}}), 1, 2
        )
