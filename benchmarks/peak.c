// SPDX-License-Identifier: Apache-2.0
// The most that a core multiplies, from registers alone. Compiled at run time by benchmarks/peak.py.
// 24 accumulators hide the latency of two units; the operands stay in two more registers.

#define STEP(op) op("0") op("1") op("2") op("3") op("4") op("5") op("6") op("7") op("8") op("9") \
    op("10") op("11") op("12") op("13") op("14") op("15") op("16") op("17") op("18") op("19") \
    op("20") op("21") op("22") op("23")
#define CLEAR(r) "vpxord %%zmm" r ", %%zmm" r ", %%zmm" r "\n"
#define INT8(r) "vpdpbusd %%zmm24, %%zmm25, %%zmm" r "\n"
#define FP32(r) "vfmadd231ps %%zmm24, %%zmm25, %%zmm" r "\n"
#define ALL "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", \
    "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "cc"

// 24 * 64 products of u8 by s8 a round, each with its addition. Operands: all bits set (255 and -1).
__attribute__((target("avx512f"))) void int8_rounds(long rounds) {
    __asm__ volatile(
        STEP(CLEAR) "vpternlogd $255, %%zmm24, %%zmm24, %%zmm24\n"
        "vmovdqa64 %%zmm24, %%zmm25\n"
        "1:\n" STEP(INT8) "dec %0\n jnz 1b\n"
        : "+r"(rounds) : : ALL);
}

// 24 * 16 products of fp32 a round, each with its addition.
__attribute__((target("avx512f"))) void fp32_rounds(long rounds) {
    __asm__ volatile(
        STEP(CLEAR) CLEAR("24") CLEAR("25")
        "1:\n" STEP(FP32) "dec %0\n jnz 1b\n"
        : "+r"(rounds) : : ALL);
}
