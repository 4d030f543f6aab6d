"""Kernels of traced programs and their times, with answers by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from cnn_spmd.analysis import cost, roofline
from cnn_spmd.analysis.roofline import Kernel
from cnn_spmd.layers import common

F4 = jnp.float32


def kernels(function, *shapes, dtype=F4):
    """The kernels of a function of arrays of these shapes."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return roofline.kernels_of(jax.make_jaxpr(function)(*arguments))


def test_a_product_has_its_flops_and_an_epilogue():
    """[64, 128] by [128, 256], with bias and ReLU: one kernel."""
    (kernel,) = kernels(lambda x, w, b: jax.nn.relu(x @ w + b), (64, 128), (128, 256), (256,))
    assert kernel == Kernel(4 * (64 * 128 + 128 * 256 + 64 * 256), 2 * 64 * 128 * 256, 64, 4)
    (kernel,) = kernels(jnp.matmul, (64, 128), (128, 32), dtype=jnp.bfloat16)
    assert (kernel.width, kernel.itemsize) == (32, 2)


def test_a_convolution_and_its_gradients_have_the_same_flops():
    """3x3 on 8 images of 16x16x4, 32 maps out. A stride of 2 makes a quarter of the pixels."""
    flops = 8 * 16 * 16 * 32 * 9 * 4 * 2
    for stride, share in ((1, 1), (2, 4)):

        def loss(x, w, stride=stride):
            return (common.convolve(x, w, [(1, 1)] * 2, (stride, stride)) ** 2).sum()

        found = kernels(jax.grad(loss, (0, 1)), (8, 16, 16, 4), (3, 3, 4, 32))
        assert [kernel.flops for kernel in found if kernel.flops] == [flops / share] * 3


def test_element_wise_operations_join_into_kernels():
    """By what must be stored: 4 MB each, of 1 MB of numbers. A long sum is two kernels."""
    n, size = 2**20, 4 * 2**20
    for function, expected in (
        (lambda x: jnp.sqrt(x * 2 + 1), [2 * size]),
        (lambda x: (x + 1, x * 2), [3 * size]),  # both read x at once
        (lambda x: (x * 2).sum(), [4, size + 4]),
        (lambda x: (x * 2).reshape(-1, 4096).sum(1), [size + 4 * n // 4096]),
        (lambda x: x / x.sum(), [4, size + 4, 2 * size + 4]),  # the sum comes first
        (lambda x: lax.optimization_barrier(x + 1) * 2, [2 * size, 2 * size]),
        (lambda x: (jnp.sin(x) + jnp.sin(x)).sum(), [4, size + 4]),  # once, not twice
        (lambda x: x[:1000] + 1, [2 * 4000]),
    ):
        assert sorted(kernel.bytes for kernel in kernels(function, (n,))) == expected


def test_what_takes_long_is_stored_for_its_second_use():
    """exp(x) serves the sum, and the division after it."""
    softmax = kernels(lambda x: jnp.exp(x) / jnp.exp(x).sum(), (2**20,))
    size = 4 * 2**20
    assert sorted(kernel.bytes for kernel in softmax) == [4, 2 * size + 4, 2 * size + 4]


def test_what_two_kernels_need_is_stored_where_that_moves_less():
    """A sum of four arrays, and of one array; the total must come before it is subtracted."""
    size, kept = 4 * 2**20, lambda x: x - x.sum()
    four = kernels(lambda a, b, c, d: kept(a + b + c + d), *[(2**20,)] * 4)
    assert sorted(kernel.bytes for kernel in four) == [4, 2 * size + 4, 5 * size + 4]
    one = kernels(lambda a: kept(a + 1), (2**20,))
    assert sorted(kernel.bytes for kernel in one) == [4, size + 4, 2 * size + 4]


def test_an_update_is_one_kernel():
    """It reads weight, momentum and gradient, and writes the first two: 20 bytes per weight."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def update(weight, momentum, gradient):
        state = (optax.TraceState(momentum), optax.EmptyState())
        updates, (trace, _) = optimizer.update(gradient, state, weight)
        return optax.apply_updates(weight, updates), trace.trace

    assert kernels(update, *[(2**20,)] * 3) == [Kernel(20 * 2**20)]


def test_the_time_of_kernels():
    """1e12 bytes/s; 1e14 FLOP/s from a width of 100 on, half of it for float32; 1 us each."""
    card = dataclasses.replace(
        cost.load("h200"),
        copy_rate=2e12,
        kernel_seconds=0.5e-6,
        product_rates=[(50, 5e13), (100, 1e14)],
    )
    efficiency = roofline.Efficiency(kernel=2, copy=0.5, float32=0.5)
    alone = roofline.SCALAR_KERNELS * 1e-6
    for kernel, microseconds in (
        (Kernel(1e6), 1),
        (Kernel(1e6, 1e9, 200), 10),
        (Kernel(1e6, 1e9, 200, 4), 20),
        (Kernel(1e6, 1e9, 75), 1e9 / 7.5e13 * 1e6),
        (Kernel(1e6, 1e9, 8), 20),
        (Kernel(30e6, 1e9, 8), 30),
    ):
        seconds = roofline.seconds([kernel], card, efficiency)
        assert seconds - alone == pytest.approx((microseconds + 1) * 1e-6)
