"""The kernels compile without spills, and what the compiler says is read right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "compile_all", Path(__file__).with_name("compile_all.py")
)
assert _SPEC is not None and _SPEC.loader is not None
compile_all = importlib.util.module_from_spec(_SPEC)
sys.modules["compile_all"] = compile_all
_SPEC.loader.exec_module(compile_all)

REPORT = """
ptxas info    : Compiling entry function '_Z10mix_kernelv' for 'sm_90'
ptxas info    : Function properties for _Z10mix_kernelv
    104 bytes stack frame, 176 bytes spill stores, 196 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 43520 bytes smem
ptxas info    : Compiling entry function '_Z5cleanv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
SASS = """
	code for sm_90
		Function : _Z10mix_kernelv
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x00000a00ff017b82 */
        /*0020*/                   STL [R1], R4 ;                    /* 0x00000a00ff017b82 */
        /*0030*/                   DFMA R4, R2, R6, R4 ;             /* 0x00000a00ff017b82 */
        /*0040*/                   REDG.E.ADD.F32 [R2.64], R4 ;      /* 0x00000a00ff017b82 */
"""
# Two values a turn, in the loop; what comes before and after it is no walk.
WALK = """
	code for sm_90
		Function : _Z5cleanv
        /*0000*/                   LDG.E R1, [R2.64] ;               /* 0x00000a00ff017b82 */
        /*0010*/              @P1 LDG.E.CONSTANT R4, [R2.64] ;       /* 0x00000a00ff017b82 */
        /*0020*/                   LDG.E.CONSTANT R5, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0030*/                   LDG.E.CONSTANT R6, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0040*/                   LDG.E.CONSTANT R7, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0050*/                   LDG.E.CONSTANT R8, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0060*/                   LDG.E.CONSTANT R9, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0070*/                   STG.E [R2.64], R9 ;               /* 0x00000a00ff017b82 */
        /*0080*/              @P0 BRA 0x10 ;                         /* 0x00000a00ff017b82 */
        /*0090*/              @P0 BRA 0x0 ;                          /* 0x00000a00ff017b82 */
        /*00a0*/                   BRA 0xa0;                         /* 0x00000a00ff017b82 */
"""


def parsed():
    kernels = {(k.name, k.arch): k for k in compile_all.parse_report(REPORT)}
    compile_all.count_instructions(SASS, kernels)
    return list(kernels.values())


def test_the_reports_of_the_tools_are_read():
    mix, clean = parsed()
    assert (mix.arch, mix.registers, mix.shared, mix.spills) == ("90", 128, 43520, 372)
    assert (clean.arch, clean.registers, clean.shared, clean.spills) == ("80", 32, 0, 0)
    assert mix.counts["wide loads"] == mix.counts["float64"] == mix.counts["local"] == 1
    assert mix.counts["wide stores"] == 0 and mix.counts["atomics"] == 1


def test_faults_are_named():
    mix, clean = parsed()
    mix.name = "mix_kernel<float>"
    assert list(mix.faults()) == [
        "spills 372 bytes",
        "has 1 of local",
        "has 1 of atomics",
        "has no wide stores",
    ]
    assert not list(clean.faults())


def test_the_instructions_of_a_walk_are_counted_for_each_value():
    kernels = {(k.name, k.arch): k for k in compile_all.parse_report(REPORT)}
    compile_all.count_instructions(WALK, kernels)
    walk = kernels["_Z5cleanv", "80"]
    assert not walk.code  # of another architecture
    walk.arch = "90"
    compile_all.count_instructions(WALK, {("_Z5cleanv", "90"): walk})
    walk.name = "patchify_backward_kernel<float, float, false>"
    assert [len(loop) for loop in walk.innermost_loops()] == [8]
    assert walk.instructions_per_value() == 8 / 2
    assert not list(walk.faults())
    walk.registers, walk.code = 65, []
    assert list(walk.faults()) == [
        "takes 65 registers, more than 64",
        "takes 0 instructions a value, more than 50 or none",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_spill_nothing_and_access_memory_in_wide_vectors(arch):
    for tool in ("nvcc", "cuobjdump", "nvdisasm"):
        if compile_all.find_tool(tool) is None:
            pytest.skip(f"no {tool}")
    kernels = compile_all.compile_all([arch])
    assert len(kernels) > 15
    assert [f"{k.name}: {fault}" for k in kernels for fault in k.faults()] == []
