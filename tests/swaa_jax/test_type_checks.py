"""The tests' own checks of types: an inner function's signature is checked under every hint."""

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int, TypeCheckError, jaxtyped

from tests.support import typecheck


def inner_function(hint, returned=object, default=None):
    @jaxtyped(typechecker=typecheck.check)
    def inner(x: hint, y: object = default) -> returned:
        return x

    return inner


@pytest.mark.parametrize(
    "hint, right, wrong",
    [
        (int, 1, "a"),
        (str, "a", 1),
        (Float[Array, "a b"], jnp.zeros((2, 3)), jnp.zeros(2)),
        (Float[Array, "a"], jnp.zeros(2), jnp.zeros((2, 3))),
        (Int[Array, "a"], jnp.zeros(2, int), jnp.zeros(2)),
    ],
    ids=str,
)
def test_inner_functions_of_one_name_keep_their_hints_apart(hint, right, wrong):
    for default in (None, 1, [1]):
        inner_function(hint, default=default)(right)
        inner_function(object, hint, default=default)(right)
        with pytest.raises(TypeCheckError, match="parameters"):
            inner_function(hint, default=default)(wrong)
        with pytest.raises(TypeCheckError, match="return value"):
            inner_function(object, hint, default=default)(wrong)


def test_one_signature_is_made_ready_once():
    inner_function(bytes)(b"")
    before = dict(typecheck._inner)
    inner_function(bytes)(b"")
    assert typecheck._inner == before
    inner_function(bytearray)(bytearray())
    assert len(typecheck._inner) > len(before)
