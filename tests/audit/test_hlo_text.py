"""What HLO text says about whole-pool copies, collectives and aliases; no compiler needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.hlo_text import HloText, Shape, collectives, parse, whole_pool_copies

POOL = Shape("bf16", 2 * 64 * 16 * 128)
TYPE = "bf16[2,64,16,128]{3,2,1,0:T(8,128)(2,1)}"
OTHER_LAYOUT = "bf16[2,64,16,128]{3,0,2,1:T(2,128)(2,1)}"
SMALL = "bf16[2,8,128]{2,1,0:T(8,128)(2,1)}"
HEADER = "HloModule jit_step, is_scheduled=true, {alias}entry_computation_layout={{()->()}}, num_partitions=4\n"
ALIAS = "input_output_alias={ {0}: (0, {}, may-alias), {2}: (5, {}, must-alias) }, "


def module(*entry: str, fused: tuple[str, ...] = (), body: tuple[str, ...] = (), alias: str = "") -> HloText:
    """A module with an entry computation, and where given one that it fuses and one that it loops over."""
    parts = [HEADER.format(alias=alias)]
    for head, lines in (("%fused.1 (p: bf16[]) -> bf16[]", fused), ("%body.1 (p: (s32[])) -> (s32[])", body)):
        if lines:
            parts.append("\n".join([f"{head} {{", *(f"  {line}" for line in lines), "}"]))
    parts.append("\n".join(["ENTRY %main (p: bf16[]) -> bf16[] {", *(f"  {line}" for line in entry), "}"]))
    return parse("\n\n".join(parts))


def copies(*entry: str, fused: tuple[str, ...] = (), body: tuple[str, ...] = ()) -> list[str]:
    return [each.name for each in whole_pool_copies(module(*entry, fused=fused, body=body), [POOL])]


FUSION = f"ROOT %f.1 = {TYPE} fusion(%p.1, %rows), kind=kLoop, calls=%fused.1"
PARAMETER = f"%p.1 = {TYPE} parameter(0)"


def test_updates_in_place_are_no_copies() -> None:
    assert not copies(
        PARAMETER,
        f"%scatter.1 = {TYPE} scatter(%p.1, %where, %rows), to_apply=%r",
        f"%loop = (s32[], {TYPE}, /*index=2*/{TYPE}) while(%t), condition=%c, body=%b",
        f"ROOT %g = {TYPE} get-tuple-element(%loop), index=1",
    )
    assert not copies(PARAMETER, FUSION, fused=(PARAMETER, f"ROOT %d = {TYPE} dynamic-update-slice(%p.1, %r, %i)"))


@pytest.mark.parametrize(
    "line",
    [
        f"%x = {OTHER_LAYOUT} copy(%p.1)",
        "%x = f32[2,64,16,128]{3,2,1,0} convert(%p.1)",
        "%x = bf16[64,16,2,128]{3,2,1,0} transpose(%p.1), dimensions={1,2,0,3}",
        "%x = bf16[2,1024,128]{2,1,0} reshape(%p.1)",
        f"%x = ({OTHER_LAYOUT}, {TYPE}, u32[]{{:S(2)}}) copy-start(%p.1)",
        "%x = bf16[4,64,16,128]{3,2,1,0} concatenate(%p.1, %p.1), dimensions={0}",
        'ROOT %x = bf16[2,64,16,128]{3,2,1,0} custom-call(%p.1), custom_call_target="AllocateBuffer"',
    ],
)
def test_whatever_makes_an_array_of_a_pools_size_is_a_copy(line: str) -> None:
    assert copies(PARAMETER, line) == ["x"]
    assert copies(PARAMETER, body=(line,)) == ["x"]


def test_a_kernel_that_takes_the_pool_over_is_no_copy() -> None:
    kernel = f'ROOT %k = {TYPE} custom-call(%p.1), custom_call_target="tpu_custom_call"'
    assert copies(PARAMETER, kernel) == ["k"]
    assert not copies(PARAMETER, kernel + ", output_to_operand_aliasing={{}: (0, {})}")


def test_a_fusion_is_judged_by_what_it_holds() -> None:
    update = f"ROOT %d = {TYPE} dynamic-update-slice(%c, %r, %i)"
    assert copies(PARAMETER, FUSION, fused=(PARAMETER, f"%c = {TYPE} convert(%p.1)", update)) == ["f.1"]
    assert copies(PARAMETER, FUSION, fused=(PARAMETER, f"ROOT %s = {TYPE} select(%m, %p.1, %new)")) == ["f.1"]
    # Read on the way to something small, a converted pool is never written down.
    small = f"%f.1 = {SMALL} fusion(%p.1), kind=kLoop, calls=%fused.1"
    assert not copies(PARAMETER, small, fused=(PARAMETER, f"%c = {TYPE} convert(%p.1)", f"ROOT %s = {SMALL} slice(%c)"))


def test_small_arrays_are_never_copies_of_a_pool() -> None:
    assert not copies(PARAMETER, f"%x = {SMALL} copy(%y)", "%z = s32[129]{0} add(%a, %b)")


def test_what_reads_a_pool_on_another_core_is_judged_by_what_it_does_there() -> None:
    start = f"%s = (({TYPE}, s32[8]{{0}}), {SMALL}, u32[]{{:S(8)}}) call-start(%p.1, %i), to_apply=%body.1"
    done = f"%d = {SMALL} call-done(%s)"
    assert not copies(PARAMETER, start, done, body=(f"ROOT %g = {SMALL} gather(%p.1, %i)",))
    assert copies(PARAMETER, start, done, body=(f"%c = {TYPE} copy(%p.1)",)) == ["c"]


def test_each_array_of_a_quantised_pool_counts() -> None:
    scales = Shape("f32", 2 * 64 * 16)
    hlo = module("%x = f32[2,64,16]{2,1,0} copy(%scales)", "%y = f32[2,64,17]{2,1,0} copy(%other)")
    assert [each.name for each in whole_pool_copies(hlo, [Shape("s8", POOL.elements), scales])] == ["x", "y"]


@given(st.permutations([2, 64, 16, 128]), st.sampled_from(["bf16", "f32", "u16", "s8", "f8e4m3fn"]))
def test_a_copy_is_found_in_whatever_order_and_type_it_is_made(dims: list[int], dtype: str) -> None:
    assert copies(f"%x = {dtype}[{','.join(map(str, dims))}]{{3,2,1,0}} copy(%p.1)") == ["x"]


def test_collectives_are_counted_once_also_where_they_run_asynchronously() -> None:
    hlo = module(
        "%a = s32[129]{0:T(256)S(1)} all-reduce(%r), channel_id=1, to_apply=%sum",
        f"%s = ({SMALL}, {SMALL}) all-gather-start(%x), channel_id=2",
        f"%d = {SMALL} all-gather-done(%s)",
        "%n = s32[129]{0} add(%all-reduce, %a)",
        body=(f"%p = {SMALL} collective-permute(%x), channel_id=3",),
    )
    assert [each.name for each in collectives(hlo)] == ["p", "a", "s"]
    assert [shape.num_bytes for each in collectives(hlo)[:2] for shape in each.shapes] == [2 * 8 * 128 * 2, 129 * 4]


def test_aliased_outputs_are_those_of_the_header() -> None:
    assert module(PARAMETER, alias=ALIAS).aliased_outputs == {0, 2}
    assert module(PARAMETER).aliased_outputs == frozenset()


def test_cycles_add_up_outside_of_fusions_and_are_unknown_where_none_are_given() -> None:
    cycles = 'backend_config={"estimated_cycles":"%d"}'
    none = f"%n = {SMALL} copy(%y), {cycles % (2**64 - 1)}"
    hlo = module(none, f"{FUSION}, {cycles % 70}", fused=(f"ROOT %d = {TYPE} copy(%p), {cycles % 9000}",))
    assert hlo.cycles() == 70
    assert module(PARAMETER).cycles() is None


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bf16", 2), ("f32", 4), ("s8", 1), ("u16", 2), ("f8e5m2", 1), ("pred", 1), ("s4", 1), ("c64", 8)],
)
def test_bytes_of_an_element(dtype: str, size: int) -> None:
    assert Shape(dtype, 3).num_bytes == 3 * size
