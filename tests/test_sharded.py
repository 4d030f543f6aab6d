"""Sharded data: the exchange plans of the host, and numbers equal to those of resident data."""

import jax
import numpy as np
import pytest
from setups import BATCH, TEST_EXAMPLES, gather, narrow, setup_of, trained  # noqa: F401

from cnn_spmd.data import sharded


def numbers(name, parallelism, shape, resident, **changes):
    """Return the numbers of three steps and an evaluation, by name."""
    from cnn_spmd.training.evaluate import Evaluator
    setup = setup_of(name, parallelism, shape, dtype="float32", steps_per_call=2, data=dict(resident=resident), **changes)
    losses, params = trained(setup, 3)
    ev = Evaluator(setup, setup.feeds[1]); ev.feed.load()
    return setup, params | dict(losses=losses) | ev(setup.init())

@pytest.mark.parametrize(("name","parallelism","shape"),[("simple_cnn","hybrid",(4,2)),("simple_cnn","hybrid",(8,1)),("simple_cnn","model",(2,4)),("alexnet_2012","two_tower",(4,2))])
def test_eq(name,parallelism,shape):
    _, expected = numbers(name,parallelism,shape,"yes")
    setup, got = numbers(name,parallelism,shape,"sharded")
    for k,v in expected.items():
        np.testing.assert_array_equal(got[k], v, err_msg=k)
    from cnn_spmd.analysis import program
    rep=program.report(setup.train_program(2),setup.place.mesh,2)
    print(setup.feeds[0].capacity,setup.feeds[0].exchanged_bytes,[r for r in rep["collectives"] if r["operation"]=="all-to-all"])
