#include "rows.hpp"

#include <cstdint>
#include <cstring>

#include "processor.hpp"

namespace ettin {
namespace {

constexpr RowKernels kKernels[] = {
#ifdef __aarch64__
    {"f32_neon", has_neon, false, normalise_f32_neon, gate_f32_neon},
#else
    {"f32_avx2", has_avx2, false, normalise_f32_avx2, gate_f32_avx2},
    {"f32_avx512", has_avx512, false, normalise_f32_avx512, gate_f32_avx512},
    {"bf16_avx512", has_avx512_bf16, true, normalise_bf16_avx512, gate_bf16_avx512},
#endif
};

}  // namespace

const RowKernels* row_kernels_named(const char* name) {
    for (const RowKernels& kernels : kKernels)
        if (!std::strcmp(kernels.name, name)) return &kernels;
    return nullptr;
}

}  // namespace ettin

extern "C" __attribute__((visibility("default"))) bool ettin_rows_can_run(const char* name) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    return kernels && kernels->can_run();
}

// For tests. False: these kernels can't run here, or don't take rows of this size.
extern "C" __attribute__((visibility("default"))) bool ettin_normalise(
    const char* name, const void* x, const void* added, void* sum, void* normed, int64_t rows, int size, float eps,
    float step) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    if (!kernels || !kernels->can_run() || !kernels->takes(kernels->is_bf16, size)) return false;
    kernels->normalise({x, added, sum, normed, size, eps, step}, 0, size_t(rows));
    return true;
}

// For tests. `joint` [rows, 2 · size]: up and gate of each row. False: as above.
extern "C" __attribute__((visibility("default"))) bool ettin_gate(const char* name, const void* joint, void* out,
                                                                  int64_t rows, int size, float step) {
    const ettin::RowKernels* kernels = ettin::row_kernels_named(name);
    if (!kernels || !kernels->can_run() || !kernels->takes(kernels->is_bf16, size)) return false;
    const auto* gate = static_cast<const uint8_t*>(joint) + size_t(size) * (kernels->is_bf16 ? 2 : 4);
    kernels->gate({joint, gate, out, size, size_t(size) * 2, step}, 0, size_t(rows));
    return true;
}
