"""The error tree and its mapping to status codes."""

import pytest

from kvstore.protocol import errors
from kvstore.protocol.errors import InvalidRequest, KVStoreError, NotFound, from_code

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KVStoreError)]


def test_every_kind_survives_the_wire() -> None:
    for kind in KINDS:
        error = from_code(kind.code, "why")
        assert type(error) is kind
        assert str(error) == "why"


def test_codes_are_distinct_grpc_codes() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert all(1 <= code <= 16 for code in codes)


@pytest.mark.parametrize("code", [0, 1, 17, 65_535])
def test_an_unknown_code_is_still_our_error(code: int) -> None:
    assert type(from_code(code, "odd")) is KVStoreError


def test_not_found_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest):
        raise from_code(NotFound.code, "no such lease")


def test_the_tree_is_drawn_in_full() -> None:
    assert errors.__doc__ is not None
    assert all(kind.__name__ in errors.__doc__ for kind in KINDS)
