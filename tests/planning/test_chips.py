"""Names of slices, ours and the cloud's."""

import pytest

from sret_jax.errors import UserError
from sret_jax.planning.chips import find_slice


@pytest.mark.parametrize(
    ("name", "found", "chips"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-4", "v5e:2x2", 4),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-32", "v4:2x2x4", 16),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v3-32", "v3:4x4", 16),
        ("v2-8", "v2:2x2", 4),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64),
    ],
)
def test_a_slice_is_found_by_its_shape_and_by_the_clouds_name(name, found, chips):
    assert (find_slice(name).name, find_slice(name).chips) == (found, chips)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x5", "unknown topology 'v5e:3x5'; did you mean 'v5e:4x4'. v5e comes as 1x1, 2x2"),
        ("v4-33", "did you mean 'v4:2x2x4'"),
        ("tpu7x-8", "tpu7x comes as 2x2x1"),
        ("v9:2x2", "with a chip of v2, v3, v4, v5e, v5p, v6e, tpu7x$"),
        ("locl", "did you mean 'local'"),
        ("h100", "^unknown topology 'h100'. Plans are for TPUs and this machine: give local, or"),
        ("", "unknown topology ''"),
    ],
)
def test_an_unknown_topology_is_answered_with_those_there_are(name, message):
    with pytest.raises(UserError, match=message):
        find_slice(name)
