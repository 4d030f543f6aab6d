"""Estimate what schedules can hide: literal programs whose times are sums by hand.

The lines are shortened from what XLA printed for four H100s (jax 0.10.2 and 0.11.2, compiled
without a GPU): the end of the backward pass of AlexNet under `data`.
"""

import pytest

from cnn_spmd.analysis import hlo, schedule

MESH = {"data": 4, "model": 1}
# A FLOP or a byte of memory takes 1, a byte of the link 2 and a collective's latency 100 units.
RATES = schedule.Rates(flops=1.0, bandwidth=1.0, link=0.5, latency=100.0)
H100 = "NVIDIA H100 80GB HBM3"
ALL_REDUCE = (
    "channel_id={id}, replica_groups=mesh['axis_0'=4,'axis_1'=1] {{'axis_0'}}, "
    'use_global_device_ids=true, to_apply=%add.clone, backend_config={{"operation_queue_id":"0",'
    '"collective_backend_config":{{"is_sync":false,"is_pipelined":false,"backend":"DEFAULT"}}}}'
)
# By jax: the shape of the start of an all-reduce of `{0}`.
STARTS = {"0.10.2": "{0}", "0.11.2": "(({0}), {0})"}

PROGRAM = """\
HloModule jit_train_chunk, is_scheduled=true, num_partitions=4

%add.clone (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%gemm_fusion_dot.16_computation (parameter_0.7: bf16[8,2], parameter_1.7: bf16[8,4]) -> bf16[2,4] {{
  %parameter_0.7 = bf16[8,2]{{1,0}} parameter(0), metadata={{scheduling_name="parameter_0.7"}}
  %parameter_1.7 = bf16[8,4]{{1,0}} parameter(1), metadata={{scheduling_name="parameter_1.7"}}
  ROOT %dot.31 = bf16[2,4]{{1,0}} dot(%parameter_0.7, %parameter_1.7), lhs_contracting_dims={{0}}, \
rhs_contracting_dims={{0}}, metadata={{op_name="jit(train_chunk)/transpose(jvp())/transpose"}}
}}

%wrapped_slice_computation (param_0.3352: bf16[64]) -> bf16[4] {{
  %param_0.3352 = bf16[64]{{0}} parameter(0), metadata={{scheduling_name="param_0.3352"}}
  ROOT %slice.135 = bf16[4]{{0}} slice(%param_0.3352), slice={{[0:4]}}
}}

%region_0.36_spmd (param.12: (s32[], bf16[8,2], bf16[8,4], bf16[64], bf16[2,4])) -> (s32[]) {{
  %param.12 = (s32[], bf16[8,2]{{1,0}}, bf16[8,4]{{1,0}}, bf16[64]{{0}}, bf16[2,4]) parameter(0)
  %x = bf16[8,2]{{1,0}} get-tuple-element(%param.12), index=1
  %dy = bf16[8,4]{{1,0}} get-tuple-element(%param.12), index=2
  %joined = bf16[64]{{0}} get-tuple-element(%param.12), index=3
{body}
}}

ENTRY %main.38_spmd (param.14: (s32[], bf16[8,2], bf16[8,4], bf16[64], bf16[2,4])) -> (s32[]) {{
  %param.14 = (s32[], bf16[8,2]{{1,0}}, bf16[8,4]{{1,0}}, bf16[64]{{0}}, bf16[2,4]) parameter(0)
  ROOT %while.79 = (s32[]) while(%param.14), condition=%region_30.37_spmd, body=%region_0.36_spmd, \
backend_config={{"known_trip_count":{{"n":"10"}},"known_init_step":{{"init":"0","step":"1"}}}}
}}
"""
# The gradient of fc2's kernel takes 2*2*4*8 = 128 FLOP (its bytes are 112), the slice 16 bytes.
GEMM = (
    "%gemm_fusion_dot.16 = bf16[2,4]{1,0} fusion(%x, %dy), kind=kCustom, "
    'calls=%gemm_fusion_dot.16_computation, frontend_attributes={xla.pdl_launch="true"}, '
    'metadata={op_name="jit(train_chunk)/transpose(jvp())/transpose"}'
)
SLICE = (
    "%wrapped_slice = bf16[4]{0} fusion(%joined), kind=kLoop, calls=%wrapped_slice_computation, "
    'backend_config={"operation_queue_id":"0","reification_cost":[]}'
)
# All-reduces of 128 and 16 bytes: a device sends 192 and 24 of them.
JOINED_MS, KERNEL_MS = 100 + 2 * 192, 100 + 2 * 24


def read(body):
    """Return Overlaps of a program whose loop over ten steps has this body."""
    module = hlo.Module(PROGRAM.format(body="\n".join(body)), MESH)
    return schedule.Schedule(module, RATES).overlaps(module.collectives(10))


def start(name, operand, shape, channel, jax="0.11.2"):
    result = STARTS[jax].format(shape)
    return f"%{name} = {result} all-reduce-start(%{operand}), {ALL_REDUCE.format(id=channel)}"


def done(name, shape):
    ended = name.replace("start", "done")
    return f'%{ended} = {shape} all-reduce-done(%{name}), metadata={{scheduling_name="{ended}"}}'


def joined(jax="0.11.2"):
    return start("all-reduce-start.2", "joined", "bf16[64]{0}", 1, jax)


def kernel(jax="0.11.2"):
    return start("all-reduce-start.1", "gemm_fusion_dot.16", "bf16[2,4]{1,0}", 14, jax)


JOINED_DONE = done("all-reduce-start.2", "bf16[64]{0}")
KERNEL_DONE = done("all-reduce-start.1", "bf16[2,4]{1,0}")


@pytest.mark.parametrize("jax", STARTS)
def test_computing_between_start_and_done_is_hidden(jax):
    """As XLA orders it: the gradient of fc2 is computed during another layer's all-reduce."""
    body = [joined(jax), GEMM, JOINED_DONE, kernel(jax), SLICE, KERNEL_DONE]
    first, second = read(body)
    assert first[1:] == (JOINED_MS, 128, 128)
    assert second[1:] == (KERNEL_MS, 16, 16)
    assert [(row.collective.name, row.collective.count) for row in (first, second)] == [
        ("all-reduce-start.2", 1),
        ("all-reduce-start.1", 1),
    ]


def test_two_in_flight_share_the_link_and_computing_hides_only_once():
    body = [joined(), GEMM, kernel(), SLICE, KERNEL_DONE, JOINED_DONE]
    first, second = read(body)
    # The link has the kernel's gradient from 484 to 632. Its done waits from 144 on, also for the
    # all-reduce that began first.
    assert first[1:] == (JOINED_MS, 144, 144)
    assert second[1:] == (KERNEL_MS, 16, 0)
    assert sum(row.seconds - row.hidden for row in (first, second)) == 632 - 144


def test_a_collective_that_is_shorter_than_what_it_hides_behind_is_hidden_whole():
    long = GEMM.replace("bf16[2,4]{1,0} fusion", "(bf16[2,4]{1,0}, u8[1000]{0}) fusion")
    (row,) = read([joined(), long, JOINED_DONE])
    assert row[1:] == (JOINED_MS, 112 + 1000, JOINED_MS)


def test_what_has_no_start_hides_nothing_and_what_is_wrapped_starts_where_its_wrapper_does():
    """XLA leaves a collective synchronous where nothing can stand beside it."""
    (row,) = read([joined("0.10.2").replace("-start(", "("), GEMM])
    assert row[1:] == (JOINED_MS, 0, 0)
    wrapped = [
        "%rs-start = ((bf16[64]), bf16[16]) async-start(%joined), calls=%async_computation",
        GEMM,
        "%rs-done = bf16[16]{0} async-done(%rs-start)",
        "}",
        "%async_computation (param_0: bf16[64]) -> bf16[16] {",
        "%param_0 = bf16[64]{0} parameter(0)",
        "%reduce-scatter.1 = bf16[16]{0} reduce-scatter(%param_0), channel_id=32, "
        "replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={0}, "
        "to_apply=%add.clone",
    ]
    (row,) = read(wrapped)
    assert row[1:] == (100 + 2 * 96, 128, 128)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # 2 images, maps of 5x4 and 6 channels, from 3 channels by windows of 3x2.
        (
            "(bf16[2,5,4,6]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), window={size=3x2}, "
            'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"',
            2 * (2 * 5 * 4 * 6) * (3 * 2 * 3),
        ),
        (
            "(bf16[2,7,5,3]{3,2,1,0}, u8[0]{0}) custom-call(%y, %b), window={size=3x2}, "
            'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"',
            2 * (2 * 5 * 4 * 6) * (3 * 2 * 3),
        ),
        (
            "(bf16[6,3,2,3]{3,2,1,0}, u8[0]{0}) custom-call(%a, %y), window={size=3x2}, "
            'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"',
            2 * (2 * 5 * 4 * 6) * (3 * 2 * 3),
        ),
        (
            "(f32[8,6]{1,0}, s8[64]{0}) custom-call(%p, %q), "
            'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 2 * 8 * 6 * 50,  # float32 runs at half the rate of bfloat16
        ),
    ],
    ids=["forward", "input", "filter", "cublas"],
)
def test_flops_of_what_calls_a_library(line, flops):
    operands = dict(
        a="bf16[2,7,5,3]", b="bf16[6,3,2,3]", y="bf16[2,5,4,6]", p="f32[8,50]", q="f32[50,6]"
    )
    body = [f"%{name} = {shape} get-tuple-element(%param.12)" for name, shape in operands.items()]
    (row,) = read([*body, joined(), f"%called = {line}", JOINED_DONE])
    assert row.between == flops


def test_a_loop_between_start_and_done_counts_as_often_as_it_runs():
    loop = (
        "%while.3 = (s32[]) while(%t), condition=%c, body=%gemm_fusion_dot.16_computation, "
        'backend_config={"known_trip_count":{"n":"3"}}'
    )
    (row,) = read([joined(), loop, JOINED_DONE])
    assert row.between == 3 * 128


def test_the_report_is_a_share_of_time_and_of_bytes(monkeypatch):
    monkeypatch.setitem(schedule.RATES, H100, RATES)
    body = [joined(), GEMM, JOINED_DONE, kernel(), SLICE, KERNEL_DONE]
    module = hlo.Module(PROGRAM.format(body="\n".join(body)), MESH)
    found = schedule.report(module, module.collectives(10), H100, "gpu")
    assert found["hidden_share"] == pytest.approx((128 + 16) / (JOINED_MS + KERNEL_MS), abs=1e-4)
    sent_hidden = 192 * 128 / JOINED_MS + 24 * 16 / KERNEL_MS
    assert found["hidden_bytes_share"] == pytest.approx(sent_hidden / (192 + 24), abs=1e-4)
    assert found["communication_milliseconds"] == 1e3 * (JOINED_MS + KERNEL_MS)
    assert found["rates"] == RATES._asdict()
    assert found["reason"] is None
    assert found["collectives"][1] == dict(
        name="all-reduce-start.1",
        operation="all-reduce",
        axes=["data"],
        phase="backward",
        count=1,
        ring_bytes=24,
        milliseconds=1e3 * KERNEL_MS,
        computing_between_milliseconds=16e3,
        hidden_milliseconds=16e3,
    )


@pytest.mark.parametrize(
    ("body", "kind", "platform", "reason"),
    [
        ([], H100, "gpu", "there are no collectives"),
        ([joined(), JOINED_DONE], "cpu", "cpu", "XLA for CPUs gives a collective no start"),
        ([joined(), JOINED_DONE], "NVIDIA A100", "gpu", "schedule.py has no NVIDIA A100"),
        ([joined()], H100, "gpu", "all-reduce-start.2 has no done in region_0.36_spmd"),
        ([JOINED_DONE, joined()], H100, "gpu", "all-reduce-start.2 has no done"),
        ([joined(), GEMM.replace("%dy", "%dx"), JOINED_DONE], H100, "gpu", "KeyError: 'dx'"),
        (
            [joined(), SLICE.replace("bf16[4]{0} fusion", "f4[4] fusion"), JOINED_DONE],
            H100,
            "gpu",
            "unknown element type 'f4'",
        ),
    ],
)
def test_a_share_that_is_not_known_is_null_with_a_reason(body, kind, platform, reason):
    module = hlo.Module(PROGRAM.format(body="\n".join(body)), MESH)
    found = schedule.report(module, module.collectives(10), kind, platform)
    assert reason in found.pop("reason")
    assert found == schedule.UNKNOWN
