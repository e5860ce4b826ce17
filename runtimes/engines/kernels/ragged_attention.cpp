#include "ragged_attention.hpp"

#ifdef __aarch64__
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ettin {

RopeTable::RopeTable(float theta, int head_dim, int rows)
    : rows(rows), cos(size_t(rows) * head_dim / 2), sin(size_t(rows) * head_dim / 2) {
    const int half = head_dim / 2;
    for (int at = 0; at < half; ++at) {
        // Angles in float32, as transformers computes them: at position 7998 their rounding shows.
        const float inverse_frequency = 1.0f / std::pow(theta, float(2 * at) / float(head_dim));
        for (int position = 0; position < rows; ++position) {
            const float angle = float(position) * inverse_frequency;
            cos[size_t(position) * half + at] = std::cos(angle);
            sin[size_t(position) * half + at] = std::sin(angle);
        }
    }
}

namespace {

bool has_known_heads(const RaggedAttention& task) { return task.head_dim == 32 || task.head_dim == 64; }
bool takes_f32(const RaggedAttention& task) { return has_known_heads(task) && !task.is_bf16; }

#ifdef __aarch64__

bool has_neon() { return true; }  // part of the architecture
bool has_neon_dot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

constexpr Variant kVariants[] = {
    {"f32_neon", has_neon, takes_f32, attend_f32_neon, nullptr},
    {"int8_neon", has_neon_dot, takes_f32, attend_int8_neon, normalise_neon},
};

#else

// A bit of EAX or EDX of leaf 7 of CPUID: GCC 12 does not know all features by name.
bool leaf7(unsigned part, int bit, bool of_edx) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid_count(7, part, &a, &b, &c, &d);
    return (of_edx ? d : a) >> bit & 1;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx2_vnni() {
#ifdef ETTIN_EVEX  // see int8_avx2.cpp
    return has_avx512_vnni();
#else
    return has_avx2() && leaf7(1, 4, false);
#endif
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx_bf16() {
    // Bits 22 (bf16) and 24 (tiles). Linux gives tiles to a process that asks: ARCH_REQ_XCOMP_PERM (0x1023) for
    // XTILEDATA (18).
    static const bool has =
        has_avx512_bf16() && leaf7(0, 22, true) && leaf7(0, 24, true) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return has;
}

bool takes_bf16(const RaggedAttention& task) { return has_known_heads(task) && task.is_bf16; }
bool takes_bf16_of_64(const RaggedAttention& task) { return task.head_dim == 64 && task.is_bf16 && task.step == 0; }

constexpr Variant kVariants[] = {
    {"f32_avx2", has_avx2, takes_f32, attend_f32_avx2, nullptr},
    {"f32_avx512", has_avx512, takes_f32, attend_f32_avx512, nullptr},
    {"int8_avx2", has_avx2_vnni, takes_f32, attend_int8_avx2, normalise_avx2},
    {"int8_avx512", has_avx512_vnni, has_known_heads, attend_int8_avx512, normalise_avx512},
    {"bf16_avx512", has_avx512_bf16, takes_bf16, attend_bf16_avx512, nullptr},
    {"bf16_amx", has_amx_bf16, takes_bf16_of_64, attend_bf16_amx, nullptr},
};

#endif

}  // namespace

const Variant* variant_named(const char* name) {
    for (const Variant& variant : kVariants)
        if (!std::strcmp(variant.name, name)) return &variant;
    return nullptr;
}

int64_t longest_sequence(const int64_t* bounds, size_t pairs) {
    int64_t longest = 1;
    for (size_t pair = 0; pair < pairs; ++pair) longest = std::max(longest, bounds[pair + 1] - bounds[pair]);
    return longest;
}

void attend_part(const Variant& variant, const RaggedAttention& task, const int64_t* bounds, size_t part) {
    const size_t pair = part / task.heads;
    const int64_t begin = bounds[pair], end = bounds[pair + 1];
    if (end > begin) variant.attend(task, begin, end, task.first_only ? pair : begin, part % task.heads);
}

bool can_normalise(const Variant& variant, bool is_bf16, int size) {
    RaggedAttention task{};
    task.is_bf16 = is_bf16;
    task.head_dim = 64;
    return variant.normalise && variant.takes(task) && size % 32 == 0;  // its norm takes the elements that it takes
}

}  // namespace ettin

extern "C" __attribute__((visibility("default"))) bool ettin_can_run(const char* name) {
    const ettin::Variant* variant = ettin::variant_named(name);
    return variant && variant->can_run();
}

// For tests and measurements. `bounds` [pairs + 1]: where each sequence begins and the last ends. False: the variant
// can't run here, or does not take this.
extern "C" __attribute__((visibility("default"))) bool ettin_attend(
    const char* name, bool is_bf16, const void* q, const void* k, const void* v, void* out, const int64_t* bounds,
    int64_t pairs, int heads, int head_dim, int window, float theta, bool first_only, float step) {
    const ettin::Variant* variant = ettin::variant_named(name);
    const ettin::RopeTable rope(theta, head_dim, int(ettin::longest_sequence(bounds, pairs)));
    const ettin::RaggedAttention task{q, k, v, out, is_bf16, step, &rope, heads, head_dim, window, first_only};
    if (!variant || !variant->can_run() || !variant->takes(task)) return false;
    for (size_t part = 0; part < size_t(pairs) * heads; ++part) ettin::attend_part(*variant, task, bounds, part);
    return true;
}

// For tests. False: the variant can't run here, or has no norm for this.
extern "C" __attribute__((visibility("default"))) bool ettin_normalise(
    const char* name, bool is_bf16, const void* x, void* out, int64_t rows, int size, float eps, float step) {
    const ettin::Variant* variant = ettin::variant_named(name);
    if (!variant || !variant->can_run() || !ettin::can_normalise(*variant, is_bf16, size)) return false;
    variant->normalise({x, out, is_bf16, size, eps, step}, 0, size_t(rows));
    return true;
}
