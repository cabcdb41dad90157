"""The machine that runs PTX stops where a GPU, compute-sanitizer's memcheck, racecheck or initcheck would."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx.machine import Counted, launch
from ptx.memory import Fault, Global
from ptx.program import parse

KERNEL = """
.version 9.0
.target sm_90

.global .align 8 .b8 seven[8] = {7, 0, 0, 0};

.entry small(
	.param .u64 small_param_0,
	.param .u64 small_param_1
)
.maxntid 64, 1, 1
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .f32 	%f<3>;
	.reg .b64 	%rd<9>;
	.shared .align 16 .b8 box[4096];

	ld.param.u64 	%rd1, [small_param_0];
	ld.param.u64 	%rd2, [small_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	mov.u32 	%r3, box;
	shl.b32 	%r4, %r1, 2;
	add.s32 	%r5, %r3, %r4;
	setp.lt.u32 	%p1, %r1, 32;
BODY
$L__END:
	ret;
}
"""
"""Of each thread: rd4, rd5 its word of what is read, written; r5 that of shared memory; p1 the first warp."""


def launched(body: str, blocks: int = 1) -> tuple[Counted, list[int], Global]:
    """What 64 threads count and write that are given 64 words from 1000 on and zeros to write over."""
    memory = Global(1 << 16)
    a = memory.put("source", np.arange(1000, 1064, dtype=np.uint32))
    b = memory.put("out", np.zeros(64, np.uint32), written="once")
    statements = (x.strip() for x in body.split(";"))
    lines = [x if x.endswith(":") else f"\t{x};" for x in statements if x]
    program = parse(KERNEL.replace("BODY", "\n".join(lines)))
    given = [np.uint64(x).tobytes() for x in (a, b)]
    counted = launch(program, program.kernels[0], memory, blocks, given)
    return counted, memory.get(b, 256).view(np.uint32).tolist(), memory


def run(body: str, blocks: int = 1) -> tuple[list[int], Global]:
    """The same without what is counted."""
    return launched(body, blocks)[1:]


def test_a_loop_that_parts_and_meets() -> None:
    """Each thread adds as many times as its number says; then all store at once."""
    out, memory = run(
        """mov.u32 %r6, 0; mov.u32 %r7, 0;
        $L__TOP:
        ; setp.ge.u32 %p2, %r6, %r1; @%p2 bra $L__OUT;
        add.s32 %r7, %r7, 3; add.s32 %r6, %r6, 1; bra.uni $L__TOP;
        $L__OUT:
        ; st.global.u32 [%rd5], %r7"""
    )
    assert out == [3 * i for i in range(64)]
    assert memory.traffic["out", "write"].requests == 2 and memory.traffic["out", "write"].sectors == 8


def test_words_move_through_shared_memory() -> None:
    out, _ = run(
        """ld.global.u32 %r6, [%rd4]; st.shared.u32 [%r5], %r6; bar.sync 0; xor.b32 %r7, %r4, 252;
        add.s32 %r7, %r7, %r3; ld.shared.u32 %r8, [%r7]; st.global.u32 [%rd5], %r8"""
    )
    assert out == list(range(1063, 999, -1))


def test_a_constant_a_predicate_and_four_values() -> None:
    out, memory = run(
        """mov.u64 %rd6, seven; ld.global.u32 %r6, [%rd6]; @!%p1 add.s32 %r6, %r6, 1; and.b32 %r7, %r1, 3;
        setp.eq.s32 %p2, %r7, 0; @%p2 st.global.v4.u32 [%rd5], {%r6, %r1, %r1, %r6}"""
    )
    assert out == [x for i in range(0, 64, 4) for x in (7 + (i > 31), i, i, 7 + (i > 31))]
    assert (memory.traffic["out", "write"].sectors, memory.traffic["out", "write"].lines) == (8, 2)


FAULTS = {
    "4 bytes at .* is outside of what was allocated, 0 after source": "ld.global.u32 %r6, [%rd4+4]",
    "is outside of what was allocated": "mov.u64 %rd6, 8; ld.global.u32 %r6, [%rd6]",
    "thread 1 of block 0: 8 bytes .* is not aligned": "@%p1 ld.global.nc.v2.u32 {%r6, %r7}, [%rd4]",
    "source: .* writes what is only read": "st.global.u32 [%rd4], %r1",
    "out: .* writes what another wrote or read": "st.global.u32 [%rd2], %r1",
    "out: .* reads what another wrote": "st.global.u32 [%rd5], %r1; @%p1 ld.global.u32 %r6, [%rd5+128]",
    "thread 63 .* bytes of shared memory at 4096: outside": "st.shared.u32 [%r5+3844], %r1",
    "reads what nobody wrote": "@%p1 st.shared.u32 [%r5], %r1; bar.sync 0; ld.shared.u32 %r6, [%r5]",
    "reads what another wrote since they met": "st.shared.u32 [%r5], %r1; @%p1 ld.shared.u32 %r6, [%r5+128]",
    "shared memory: a thread writes what another": "st.shared.u32 [%r3], %r1",
    "a barrier that not every thread": "@%p1 bra $L__END; bar.sync 0",
    "a barrier that not .*": "@%p1 bra $L__TWO; bar.sync 0; ret;\n$L__TWO:\n; bar.sync 0",
    "bra.uni .*: run 1000000 times": "\n$L__EVER:\n; bra.uni $L__EVER",
}


@pytest.mark.parametrize("said", FAULTS)
def test_faults(said: str) -> None:
    with pytest.raises(Fault) as fault:
        run(FAULTS[said])
    assert re.search(said, str(fault.value)), fault.value


def test_two_blocks_that_write_the_same_word() -> None:
    with pytest.raises(Fault, match=r"thread 0 of block \d: out: .* writes what another wrote"):
        run("st.global.u32 [%rd5], %r1", blocks=2)


UNKNOWN = (
    "mul.wide.f32 %rd6, %f1, %f2",
    "add.f32 %f1, %f1, %f2",
    "add.rn.ftz.f32 %f1, %f1, %f2",
    "sin.approx.f32 %f1, %f2",
    "ld.global.ca.u32 %r6, [%rd4]",
)


@pytest.mark.parametrize("body", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(body: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(body)):
        run(body)


STORE = "mad.lo.s32 %r6, %r1, {step}, %r3; @%p1 st.shared.u32 [%r6], %r1"
LOAD = "setp.eq.s32 %p2, %r1, 0; @%p2 st.shared.u32 [%r3], %r1; bar.sync 0; @%p1 ld.shared.u32 %r6, [%r3]"


@pytest.mark.parametrize(("step", "waves"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_banks(step: int, waves: int) -> None:
    """A warp's words: neighbours are one wave, every second one two, those of one bank 32, the same one."""
    counted, _, _ = launched(STORE.format(step=step) if step else LOAD)
    assert counted.waves["store" if step else "load"] == waves
