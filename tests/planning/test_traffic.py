"""Figures read from a compiled program's text, against answers known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from sret_jax.planning.compilation import bytes_accessed
from sret_jax.planning.hlo import ARRAY, _parse_array
from sret_jax.planning.traffic import Collective, Program

FLOAT = 4


def read(function, *args, **settings):
    compiled = jax.jit(function, **settings).lower(*args).compile()
    return compiled, Program(compiled.as_text())


def scanned(length):
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    return read(function, jnp.zeros((32, 64)), jnp.zeros((length, 64, 64)))


def test_a_program_without_loops_leaves_nothing_out():
    compiled, program = read(lambda x: jnp.tanh(x @ x), jnp.zeros((64, 64)))
    assert program.repeated_bytes() == 0
    assert bytes_accessed(compiled, program) == compiled.cost_analysis()["bytes accessed"]


def test_each_trip_of_a_loop_moves_its_slice_of_the_weights():
    _, three = scanned(3)
    _, nine = scanned(9)
    per_trip = (nine.repeated_bytes() - three.repeated_bytes()) / 6
    weights, activations = 64 * 64 * FLOAT, 32 * 64 * FLOAT
    # Slice the weights (read, write), multiply (read both, write), tanh (read, write), and copies.
    assert 3 * weights + 4 * activations <= per_trip <= 3 * weights + 8 * activations
    assert three.repeated_bytes() == 2 * per_trip


def test_nested_loops_multiply():
    def function(x):
        def inner(x, _):
            return jnp.tanh(x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0] * 2, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    _, program = read(function, jnp.zeros((1024,)))
    assert 3 * 5 * 2 * 4096 <= program.main_memory_bytes() <= 3 * 5 * 4 * 4096 + 3 * 10 * 4096


def test_an_all_reduce_counts_once_with_the_bytes_of_its_result():
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((16, 100), "float32", sharding=batch_sharding(mesh))
    _, program = read(lambda x: x.sum(0), x, out_shardings=replicated(mesh))
    assert program.collectives() == [Collective("all-reduce", 8, 1, 100 * FLOAT)]


SCATTER = """HloModule main, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[256,512]) -> f32[64,512] {
  %input = f32[256,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[256,512]{1,0:T(8,128)} all-reduce(%input), channel_id=4, \
replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id.2 = u32[] partition-id()
  %constant.14 = u32[] constant(64)
  %multiply.2 = u32[]{:T(128)} multiply(%partition-id.2, %constant.14)
  %constant.15 = u32[] constant(0)
  ROOT %slice = f32[64,512]{1,0:T(8,128)} dynamic-slice(%all-reduce.2, %multiply.2, %constant.15)
}

ENTRY %main (param: f32[256,512]) -> f32[64,512] {
  %param = f32[256,512]{1,0:T(8,128)} parameter(0)
  ROOT %fusion = f32[64,512]{1,0:T(8,128)} fusion(%param), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_an_all_reduce_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter_of_the_whole():
    program = Program(SCATTER)
    assert program.collectives() == [Collective("reduce-scatter", 4, 1, 256 * 512 * FLOAT)]


def test_a_collective_in_a_loop_counts_at_every_trip():
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((16, 100), "float32", sharding=batch_sharding(mesh))

    def function(x):
        def body(total, w):
            return total + (x * jnp.sin(total)[None] * w).sum(0), None

        return jax.lax.scan(body, jnp.ones((100,)), jnp.ones((7,)))[0]

    _, program = read(function, x, out_shardings=replicated(mesh))
    assert program.collectives() == [Collective("all-reduce", 8, 7, 7 * 100 * FLOAT)]


def test_an_all_gather_counts_what_comes_out():
    mesh = make_mesh()
    x = jax.ShapeDtypeStruct((16, 100), "float32", sharding=batch_sharding(mesh))
    _, program = read(lambda x: x + 1, x, out_shardings=replicated(mesh))
    assert program.collectives() == [Collective("all-gather", 8, 1, 1600 * FLOAT)]


@pytest.mark.parametrize(("axis", "devices"), [("data", 4), ("fsdp", 2)])
def test_a_collective_along_one_axis_of_the_mesh_is_among_its_devices(axis, devices):
    mesh = make_mesh(fsdp=2)
    along = NamedSharding(mesh, PartitionSpec(axis))
    x = jax.ShapeDtypeStruct((16, 100), "float32", sharding=along)
    _, program = read(lambda x: x + 1, x, out_shardings=replicated(mesh))
    assert program.collectives() == [Collective("all-gather", devices, 1, 1600 * FLOAT)]


ASYNCHRONOUS = """
%start (a: f32[64]) -> (f32[64], f32[256]) {
  %a = f32[64]{0:T(128)} parameter(0)
  %all-gather.1 = f32[256]{0:T(256)} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %first = (f32[64]{0:T(128)}, f32[256]{0:T(256)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%done (b: f32[64], c: f32[256]) -> f32[256] {
  %b = f32[64]{0:T(128)} parameter(0)
  %c = f32[256]{0:T(256)} parameter(1)
  %all-gather.2 = f32[256]{0:T(256)} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %last = f32[256]{0:T(256)} custom-call(%b, %c, %all-gather.2), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[64]) -> f32[256] {
  %p = f32[64]{0:T(128)} parameter(0)
  %started = (f32[64]{0:T(128)}, f32[256]{0:T(256)}) fusion(%p), kind=kCustom, calls=%start
  %own = f32[64]{0:T(128)} get-tuple-element(%started), index=0
  %all = f32[256]{0:T(256)} get-tuple-element(%started), index=1
  ROOT %ended = f32[256]{0:T(256)} fusion(%own, %all), kind=kCustom, calls=%done
}
"""


def test_an_asynchronous_collective_that_several_fusions_name_counts_once():
    expected = [Collective("all-gather", 4, 1, 256 * FLOAT)]
    assert Program(ASYNCHRONOUS).collectives() == expected


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", 4),
        ("{}", None),
    ],
)
def test_the_devices_of_a_collective_are_read_however_xla_writes_them(groups, devices):
    text = SCATTER.replace("{{0,1,2,3}}", groups)
    assert [c.devices for c in Program(text).collectives()] == [devices]


@pytest.mark.parametrize(
    ("text", "size", "space"),
    [
        ("f32[784,42]{1,0:T(8,128)}", 784 * 128 * 4, 0),
        ("f32[784,42]{0,1:T(8,128)S(1)}", 48 * 896 * 4, 1),
        ("bf16[3,10,42]{2,1,0:T(8,128)(2,1)}", 3 * 16 * 128 * 2, 0),
        ("bf16[16]{0:T(256)(128)(2,1)S(1)}", 512, 1),
        ("pred[]{:T(512)}", 512, 0),
        ("f32[5,7]{1,0}", 140, 0),
        ("s32[]", 4, 0),
    ],
)
def test_arrays_are_padded_to_the_tiles_of_their_layout(text, size, space):
    array = _parse_array(ARRAY.fullmatch(text))
    assert (array.padded_bytes, array.space) == (size, space)


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %y = f32[8]{0:T(128)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i, %y)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=DIRECTION
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%a), condition=%condition, body=%body
}
"""


def test_where_xla_notes_no_trip_count_the_condition_tells_it():
    program = Program(LOOP.replace("DIRECTION", "LT"))
    assert program.repeated_bytes() == 3 * 2 * 512


def test_a_loop_of_unknown_length_counts_once_and_is_counted():
    program = Program(LOOP.replace("DIRECTION", "NE"))
    assert (program.repeated_bytes(), program.loops_counted_once()) == (0, 1)


PREFETCH = """
ENTRY %main (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) slice-start(%a), slice={[0:16], [0:128]}
  %part = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%start)
  ROOT %k = f32[16,128]{1,0:T(8,128)} custom-call(%part), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"bytes_accessed":"16384"}}
}
"""


def test_a_prefetch_reads_its_part_of_main_memory_and_a_kernel_what_was_prefetched_on_the_chip():
    part = 16 * 128 * FLOAT
    assert Program(PREFETCH).main_memory_bytes() == part + part  # the prefetch, the result
    assert Program(PREFETCH.replace("S(1)", "")).main_memory_bytes() == part + 2 * part


def test_text_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="not that of a compiled program"):
        Program("hello")
