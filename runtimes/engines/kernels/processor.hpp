// What the processor that this runs on can do.
#pragma once

#ifdef __aarch64__
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ettin {

#ifdef __aarch64__

inline bool has_neon() { return true; }  // part of the architecture
inline bool has_neon_dot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

#else

// A bit of EAX or EDX of leaf 7 of CPUID: GCC 12 does not know all features by name.
inline bool leaf7(unsigned part, int bit, bool of_edx) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid_count(7, part, &a, &b, &c, &d);
    return (of_edx ? d : a) >> bit & 1;
}

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

inline bool has_avx2_vnni() {
#ifdef ETTIN_EVEX  // see int8_avx2.cpp
    return has_avx512_vnni();
#else
    static const bool has = has_avx2() && leaf7(1, 4, false);  // virtual machines take microseconds for CPUID
    return has;
#endif
}

inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

inline bool has_amx_bf16() {
    // Bits 22 (bf16) and 24 (tiles). Linux gives tiles to a process that asks: ARCH_REQ_XCOMP_PERM (0x1023) for
    // XTILEDATA (18).
    static const bool has =
        has_avx512_bf16() && leaf7(0, 22, true) && leaf7(0, 24, true) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return has;
}

#endif

}  // namespace ettin
