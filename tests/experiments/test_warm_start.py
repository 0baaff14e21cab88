"""Variables of one network in place of another's, by name and shape."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.experiments.warm_start import merge_variables


def test_merge_by_name_and_shape():
    target = {
        "params": {
            "step_1": {"kernel": np.zeros((2, 2), np.float32)},
            "step_2": {"kernel": np.zeros((3, 2), np.float32)},
            "step_4": {"kernel": np.zeros(2, np.float32)},
        },
        "batch_stats": {"step_1": {"count": jnp.zeros((), jnp.int32)}},
    }
    source = {
        "params": {
            "step_1": {"kernel": jnp.ones((2, 2), jnp.bfloat16)},
            "step_2": {"kernel": np.ones((4, 2), np.float32)},
            "step_3": {"kernel": np.ones(2, np.float32)},
        },
        "batch_stats": {"step_1": {"count": np.int64(4)}},
    }
    merged = merge_variables(target, source)
    assert merged.loaded == ("batch_stats/step_1/count", "params/step_1/kernel")
    assert merged.missing == ("params/step_4/kernel",)
    assert merged.unexpected == ("params/step_3/kernel",)
    assert merged.misshapen == ("params/step_2/kernel",)
    assert jax.tree.structure(merged.variables) == jax.tree.structure(target)
    params = merged.variables["params"]
    np.testing.assert_array_equal(params["step_1"]["kernel"], np.ones((2, 2)))
    assert params["step_1"]["kernel"].dtype == np.float32
    assert merged.variables["batch_stats"]["step_1"]["count"] == 4
    assert merged.variables["batch_stats"]["step_1"]["count"].dtype == np.int32
    assert params["step_2"]["kernel"] is target["params"]["step_2"]["kernel"]
    np.testing.assert_array_equal(target["params"]["step_1"]["kernel"], 0)


def test_merge_with_itself_loads_all():
    variables = {"params": {"a": np.ones(2), "b": {"c": np.zeros(3)}}}
    merged = merge_variables(variables, variables)
    assert merged.loaded == ("params/a", "params/b/c")
    assert (merged.missing, merged.unexpected, merged.misshapen) == ((), (), ())
