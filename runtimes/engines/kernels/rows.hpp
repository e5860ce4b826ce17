// What lies between the linear layers and attention, row by row: the residual and the norm after it, and the gate of
// the MLP. Each is one pass over memory, rounded to int8 where an int8 product reads it. Nothing here depends on an
// inference engine.
#pragma once

#include <cstddef>

namespace ettin {

// sum = x + added, and the layer norm of the sum without weights, (sum − mean) / √(variance + eps). `sum` and `normed`
// are neither of the inputs.
struct AddedNorm {
    const void *x, *added;  // [rows, size]
    void* sum;              // as x
    void* normed;           // as x; with a step int8: whole multiples of it, −128 … 127
    int size;               // a multiple of 32
    float eps, step;
};

// gelu(up) · gate, with gelu(x) = x · Φ(x) to within 4.1e-5 up to |x| = 36, and to within 1.2e-6 · |x| beyond.
struct GatedGelu {
    const void *up, *gate;  // `size` elements of each row; rows are `stride` elements apart
    void* out;              // [rows, size], as up; with a step int8: whole multiples of it, −128 … 127
    int size;               // a multiple of 32
    size_t stride;
    float step;
};

// One way to compute them.
struct RowKernels {
    const char* name;  // the elements and the instruction set
    bool (*can_run)();
    bool is_bf16;  // whether the elements are bf16; else float32
    // Rows from … to − 1. Any thread.
    void (*normalise)(const AddedNorm& norm, size_t from, size_t to);
    void (*gate)(const GatedGelu& gelu, size_t from, size_t to);

    bool takes(bool bf16, int size) const { return bf16 == is_bf16 && size > 0 && size % 32 == 0; }
};

// Those of that name; nullptr: there are none.
const RowKernels* row_kernels_named(const char* name);

void normalise_f32_avx2(const AddedNorm& norm, size_t from, size_t to);
void normalise_f32_avx512(const AddedNorm& norm, size_t from, size_t to);
void normalise_bf16_avx512(const AddedNorm& norm, size_t from, size_t to);
void normalise_f32_neon(const AddedNorm& norm, size_t from, size_t to);
void gate_f32_avx2(const GatedGelu& gelu, size_t from, size_t to);
void gate_f32_avx512(const GatedGelu& gelu, size_t from, size_t to);
void gate_bf16_avx512(const GatedGelu& gelu, size_t from, size_t to);
void gate_f32_neon(const GatedGelu& gelu, size_t from, size_t to);

}  // namespace ettin
