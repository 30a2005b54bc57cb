"""The public names and their parameters are torch.func 2.13's; ours may follow, never replace
them."""

import inspect

import pytest

import aotfunc

KIND = inspect.Parameter
NAMES = {
    "grad": "func argnums=0 has_aux=False",
    "grad_and_value": "func argnums=0 has_aux=False",
    "vjp": "func *primals has_aux=False",
    "jvp": "func primals tangents strict=False has_aux=False",
    "linearize": "func *primals",
    "vmap": "func in_dims=0 out_dims=0 randomness='error' chunk_size=None",
    "jacrev": "func argnums=0 has_aux=False chunk_size=None",
    "jacfwd": "func argnums=0 has_aux=False randomness='error' chunk_size=None",
    "hessian": "func argnums=0 has_aux=False chunk_size=None",
    "functionalize": "func remove='mutations'",
    "functional_call": "module parameter_and_buffer_dicts args=None kwargs=None "
    "tie_weights=True strict=False",
    "stack_module_state": "models",
    "replace_all_batch_norm_modules_": "root",
    "make_functional": "model disable_autograd_tracking=False",
    "make_functional_with_buffers": "model disable_autograd_tracking=False",
    "combine_state_for_ensemble": "models",
    "chunk_vmap": "func in_dims=0 out_dims=0 randomness='error' chunks=2",
    "make_fx": "f decomposition_table=None tracing_mode='real'",
    "jit": "f=None backend='auto' static_argnums=None",
    "aot_function": "fn=None fw_compiler='auto' bw_compiler=None partition_fn=None "
    "decompositions=None static_argnums=None",
    "aot_module": "mod",
    "check_grads": "f args order=2",
    "coverage": "",
}


def spelled(parameter):
    star = "*" if parameter.kind is KIND.VAR_POSITIONAL else ""
    has_default = parameter.default is not KIND.empty and not callable(parameter.default)
    return f"{star}{parameter.name}" + (f"={parameter.default!r}" if has_default else "")


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    given = [spelled(p) for p in inspect.signature(getattr(aotfunc, name)).parameters.values()]
    for wanted in NAMES[name].split():
        assert wanted in given, f"{name} lacks {wanted}: {given}"
    order = [given.index(w) for w in NAMES[name].split()]
    if name not in ("jacrev", "jacfwd"):  # whose keyword-only tails differ in order
        assert order == sorted(order)


@pytest.mark.parametrize("name", NAMES)
def test_has_a_docstring(name):
    assert inspect.getdoc(getattr(aotfunc, name))


def test_the_transform_keeps_the_name_of_f():
    def my_loss(x):
        """Doc of my_loss."""
        return x.sum()

    for transform in (aotfunc.grad, aotfunc.vmap, aotfunc.jacrev, aotfunc.jit):
        assert (
            transform(my_loss).__wrapped__ is my_loss or "my_loss" in transform(my_loss).__name__
        )
