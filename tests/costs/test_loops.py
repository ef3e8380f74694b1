"""Loops of compiled programs, as the compiler of TPUs writes them for parameters that are split."""

import math

import pytest

from vmoe.costs.collectives import parse_collectives
from vmoe.costs.hlo import Program
from vmoe.costs.products import products

TEXT = """
%start (p: bf16[16,32]) -> (bf16[16,32], bf16[128,32], u32[]) {
  %p = bf16[16,32]{1,0} parameter(0)
  %gather = bf16[128,32]{1,0} all-gather(%p), channel_id=12, replica_groups=[1,8]<=[8], \
dimensions={0}
  ROOT %started = (bf16[16,32]{1,0}, bf16[128,32]{1,0}, u32[]) custom-call(%gather), \
custom_call_target="AsyncCollectiveStart"
}
%part (q: bf16[16,32]) -> bf16[128,32] {
  %q = bf16[16,32]{1,0} parameter(0)
  ROOT %gather.1 = bf16[128,32]{1,0} all-gather(%q), channel_id=12, replica_groups=[1,8]<=[8], \
dimensions={0}
}
%body (state: (bf16[16,32], bf16[32,8], u32[])) -> (bf16[16,32], bf16[32,8], u32[]) {
  %state = (bf16[16,32]{1,0}, bf16[32,8]{1,0}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %x = bf16[16,32]{1,0} get-tuple-element(%state), index=0
  %w = bf16[32,8]{1,0} get-tuple-element(%state), index=1
  %i = u32[]{:T(128)} get-tuple-element(%state), index=2
  %product = bf16[16,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %rest = bf16[128,32]{1,0} fusion(%x), kind=kOutput, calls=%part
  %sent = bf16[32,8]{1,0} collective-permute(%w), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %states = (bf16[16,32]{1,0}, bf16[32,8]{1,0}, u32[]{:T(128)}) tuple(%x, %sent, %next)
}
%condition (state.1: (bf16[16,32], bf16[32,8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %state.1 = (bf16[16,32]{1,0}, bf16[32,8]{1,0}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%state.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT, metadata={op_name="jit(f)/dot"}
}
ENTRY %main (a: bf16[16,32], b: bf16[32,8]) -> bf16[32,8] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,8]{1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %copied = u32[]{:T(128)} copy(%zero)
  %first = (bf16[16,32]{1,0}, bf16[128,32]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%start
  %all = (bf16[16,32]{1,0}, bf16[32,8]{1,0}, u32[]{:T(128)}) tuple(%a, %b, /*index=2*/%copied)
  %loop = (bf16[16,32]{1,0}, bf16[32,8]{1,0}, u32[]{:T(128)}) while(%all), \
condition=%condition, body=%body, metadata={op_name="jit(f)/dot"}
  ROOT %w.1 = bf16[32,8]{1,0} get-tuple-element(%loop), index=1
}
"""
PRODUCT = 2 * 16 * 32 * 8  # FLOPs of one


@pytest.mark.parametrize(
    ("changed", "trips"),
    [
        (("constant(7)", "constant(7)"), 4),  # counters of 0, 2, 4 and 6
        (("constant(7)", "constant(8)"), 4),
        (("constant(0)", "constant(6)"), 1),
        (("add(%i, %two)", "multiply(%i, %two)"), math.nan),
        (("add(%i, %two)", "add(%i, %i)"), math.nan),
        (("get-tuple-element(%state), index=2", "get-tuple-element(%x), index=2"), math.nan),
        (("direction=LT", "direction=NE"), math.nan),
        (("copy(%zero)", "negate(%zero)"), math.nan),
        (("while(%all)", "while(%first)"), math.nan),  # no tuple
        (("compare(%j, %limit), direction=LT", "constant(true)"), math.nan),
    ],
)
def test_the_length_of_a_loop_is_read_from_its_counter_or_not_known(
    changed: tuple[str, str], trips: float
) -> None:
    program = Program(TEXT.replace("\\\n", "").replace(*changed))
    ((_, flops, _),) = products(program)
    assert flops == pytest.approx(trips * PRODUCT, nan_ok=True)


def test_a_collective_in_steps_beside_products_counts_once() -> None:
    kinds = [(each.kind, each.bytes_sent) for each in parse_collectives(TEXT.replace("\\\n", ""))]
    assert sorted(kinds) == [("all-gather", 7 * 16 * 32 * 2), ("collective-permute", 32 * 8 * 2)]


@pytest.mark.parametrize(("marked", "beside"), [("", True), ('"is_sync":true', False)])
def test_a_message_whose_start_waits_for_its_end_has_nothing_beside_it(
    marked: str, beside: bool
) -> None:
    """GPUs write both as pairs."""
    text = f"""
ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  %sent = ((f32[8,4]), f32[8,4]) all-to-all-start(%x), replica_groups={{{{0,1}}}}, \
backend_config={{{marked}}}
  ROOT %received = f32[8,4]{{1,0}} all-to-all-done(%sent)
}}"""
    (sent,) = parse_collectives(text)
    assert (sent.kind, sent.bytes_sent, sent.asynchronous) == ("all-to-all", 64, beside)
