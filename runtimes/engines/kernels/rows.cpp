#include "rows.hpp"

#include <cstdint>
#include <cstring>

#include "processor.hpp"

namespace ettin {
namespace {

constexpr RowKernels kKernels[] = {
#ifdef __aarch64__
    {"f32_neon", has_neon, false, normalise_f32_neon, gate_f32_neon, attend_first_f32_neon},
#else
    {"f32_avx2", has_avx2, false, normalise_f32_avx2, gate_f32_avx2, attend_first_f32_avx2},
    {"f32_avx512", has_avx512, false, normalise_f32_avx512, gate_f32_avx512, attend_first_f32_avx512},
    {"bf16_avx512", has_avx512_bf16, true, normalise_bf16_avx512, gate_bf16_avx512, attend_first_bf16_avx512},
#endif
};

}  // namespace

const RowKernels* row_kernels_named(const char* name) {
    for (const RowKernels& kernels : kKernels)
        if (!std::strcmp(kernels.name, name)) return &kernels;
    return nullptr;
}

void attend_first_part(const RowKernels& kernels, const FirstAttention& task, const int64_t* bounds, size_t part) {
    const size_t pair = part / task.heads;
    const int64_t begin = bounds[pair], end = bounds[pair + 1];
    if (end > begin) kernels.attend_first(task, begin, end, pair, int(part % task.heads));
}

}  // namespace ettin

extern "C" __attribute__((visibility("default"))) bool ettin_rows_can_run(const char* name) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    return kernels && kernels->can_run();
}

// For tests. False: these kernels can't run here, or don't take rows of this size.
extern "C" __attribute__((visibility("default"))) bool ettin_normalise(
    const char* name, const void* x, const void* added, const void* added_scales, void* sum, void* normed,
    void* normed_scales, int64_t rows, int size, float eps) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    if (!kernels || !kernels->can_run() || !kernels->takes(kernels->is_bf16, size)) return false;
    kernels->normalise({x, added, added_scales, sum, normed, normed_scales, size, eps}, 0, size_t(rows));
    return true;
}

// For tests. `joint` [rows, 2 · size]: up and gate of each row. False: as above.
extern "C" __attribute__((visibility("default"))) bool ettin_gate(const char* name, const void* joint,
                                                                  const void* scales, void* out, void* out_scales,
                                                                  int64_t rows, int size) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    if (!kernels || !kernels->can_run() || !kernels->takes(kernels->is_bf16, size)) return false;
    const auto* gate = static_cast<const uint8_t*>(joint) + size_t(size) * (kernels->is_bf16 ? 2 : 4);
    kernels->gate({joint, gate, scales, out, out_scales, size, size_t(size) * 2}, 0, size_t(rows));
    return true;
}

// For tests. `bounds` [pairs + 1]: where each sequence begins and the last ends. False: as above.
extern "C" __attribute__((visibility("default"))) bool ettin_attend_first(
    const char* name, const void* q, const void* k, const void* x, bool is_int8, const void* scales, void* out,
    const int64_t* bounds, int64_t pairs, int heads, int head_dim, int window, float theta, int size) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    if (!kernels || !kernels->can_run() || !kernels->takes(kernels->is_bf16, size)) return false;
    if (!ettin::is_known_head_dim(head_dim)) return false;
    const ettin::RopeTable rope(theta, head_dim, int(ettin::longest_sequence(bounds, size_t(pairs))));
    const ettin::FirstAttention task{q, k, x, scales, out, is_int8, &rope, heads, head_dim, window, size};
    for (size_t part = 0; part < size_t(pairs) * heads; ++part) ettin::attend_first_part(*kernels, task, bounds, part);
    return true;
}
