#include "ragged_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "processor.hpp"

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

bool has_known_heads(const RaggedAttention& task) { return is_known_head_dim(task.head_dim); }
bool takes_f32(const RaggedAttention& task) { return has_known_heads(task) && !task.is_bf16; }

#ifdef __aarch64__

constexpr Variant kVariants[] = {
    {"f32_neon", has_neon, takes_f32, attend_f32_neon},
    {"int8_neon", has_neon_dot, takes_f32, attend_int8_neon},
};

#else

bool takes_bf16(const RaggedAttention& task) { return has_known_heads(task) && task.is_bf16; }
bool takes_bf16_of_64(const RaggedAttention& task) { return task.head_dim == 64 && task.is_bf16 && task.step == 0; }

constexpr Variant kVariants[] = {
    {"f32_avx2", has_avx2, takes_f32, attend_f32_avx2},
    {"f32_avx512", has_avx512, takes_f32, attend_f32_avx512},
    {"int8_avx2", has_avx2_vnni, takes_f32, attend_int8_avx2},
    {"int8_avx512", has_avx512_vnni, takes_f32, attend_int8_avx512},
    {"bf16_avx512", has_avx512_bf16, takes_bf16, attend_bf16_avx512},
    {"bf16_amx", has_amx_bf16, takes_bf16_of_64, attend_bf16_amx},
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

}  // namespace ettin

extern "C" __attribute__((visibility("default"))) bool ettin_can_run(const char* name) {
    const ettin::Variant* variant = ettin::variant_named(name);
    return variant && variant->can_run();
}

// For tests and measurements. `bounds` [pairs + 1]: where each sequence begins and the last ends. False: the variant
// can't run here, or does not take this.
extern "C" __attribute__((visibility("default"))) bool ettin_attend(
    const char* name, bool is_bf16, const void* q, const void* k, const void* v, const int64_t* rows, const void* scales,
    void* out, const int64_t* bounds, int64_t pairs, int heads, int head_dim, int window, float theta, bool first_only,
    float step) {
    const ettin::Variant* variant = ettin::variant_named(name);
    const ettin::RopeTable rope(theta, head_dim, int(ettin::longest_sequence(bounds, pairs)));
    const ettin::RaggedAttention task{q,       k,    v,     rows,  scales,   out,    is_bf16,
                                      step, &rope, heads, head_dim, window, first_only};
    if (!variant || !variant->can_run() || !variant->takes(task)) return false;
    for (size_t part = 0; part < size_t(pairs) * heads; ++part) ettin::attend_part(*variant, task, bounds, part);
    return true;
}
