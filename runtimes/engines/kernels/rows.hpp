// What lies between the linear layers and attention, row by row: the residual and the norm after it, the gate of the
// MLP, and the last layer's attention, which has one row for each sequence. The first two are one pass over memory,
// rounded to int8 where an int8 product reads it. Nothing here depends on an inference engine.
//
// Each row of int8 has a scale, the largest magnitude in it, for which 127 stands. What an int8 product makes of such a
// row is to be multiplied by its scale, which the next kernel does as it reads the product.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ragged_attention.hpp"

namespace ettin {

// sum = x + added, and the layer norm of the sum without weights, (sum − mean) / √(variance + eps). `sum` and `normed`
// are neither of the inputs.
struct AddedNorm {
    const void *x, *added;     // [rows, size]
    const void* added_scales;  // [rows], as x: what a row of `added` is multiplied by; nullptr: 1
    void* sum;                 // as x
    void* normed;              // as x, or int8 where it has scales
    void* normed_scales;       // [rows], as x; nullptr: `normed` is not rounded
    int size;                  // a multiple of 32
    float eps;
};

// gelu(up) · gate, with gelu(x) = x · Φ(x) to within 4.1e-5 up to |x| = 36, and to within 1.2e-6 · |x| beyond.
struct GatedGelu {
    const void *up, *gate;  // `size` elements of each row; rows are `stride` elements apart
    const void* scales;     // [rows], as up: what a row of both is multiplied by; nullptr: 1
    void* out;              // [rows, size], as up, or int8 where it has scales
    void* out_scales;       // [rows], as up; nullptr: `out` is not rounded
    int size;               // a multiple of 32
    size_t stride;
};

// What each sequence's first token attends to, before the projection of values: the sum of the rows of x, weighted by
// softmax(rope(q) · rope(k)ᵀ). A product with that projection gives the same as the sum of projected rows, and projects
// one row for each head instead of one for each token.
struct FirstAttention {
    const void *q, *k;  // [pairs, heads · head_dim], carrying the softmax scale, and [tokens, heads · head_dim]
    const void* x;      // [tokens, size], as q or int8
    const void* scales; // [tokens], as q: what a row of k and of x is multiplied by; nullptr: 1
    void* out;          // [pairs, heads, size], as q
    bool is_int8;       // whether x is
    const RopeTable* rope;  // reaches the longest sequence
    int heads, head_dim;    // head_dim: 32 or 64
    int window;             // as in RaggedAttention
    int size;               // a multiple of 32
};

// One way to compute them.
struct RowKernels {
    const char* name;  // the elements and the instruction set
    bool (*can_run)();
    bool is_bf16;  // whether the elements are bf16; else float32
    // Rows from … to − 1. Any thread.
    void (*normalise)(const AddedNorm& norm, size_t from, size_t to);
    void (*gate)(const GatedGelu& gelu, size_t from, size_t to);
    // One head of a sequence of tokens begin … end − 1, at least one. Any thread.
    void (*attend_first)(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head);

    bool takes(bool bf16, int size) const { return bf16 == is_bf16 && size > 0 && size % 32 == 0; }
};

// A part of the work of a batch, of pairs · heads parts: one head of one sequence, nothing for an empty one. `bounds`
// [pairs + 1]: where each begins and the last ends. Any thread.
void attend_first_part(const RowKernels& kernels, const FirstAttention& task, const int64_t* bounds, size_t part);

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
void attend_first_f32_avx2(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head);
void attend_first_f32_avx512(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head);
void attend_first_bf16_avx512(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head);
void attend_first_f32_neon(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head);

}  // namespace ettin
