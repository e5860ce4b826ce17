// Attention over sequences laid end to end, in bf16 on AMX: softmax(rope(q) · rope(k)ᵀ) · v for each sequence and
// head. Products are summed, and the softmax is computed, in float32; queries, keys and weights are rounded to bf16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ettin {

constexpr int kHeadDim = 64;  // of all ModernBERT shapes; two tiles of 32 bf16

// cos and sin of the angles of `rows` positions, float32 [rows, kHeadDim / 2].
struct RopeTable {
    RopeTable(float theta, int rows);
    int rows;
    std::vector<float> cos, sin;
};

struct RaggedAttention {
    const uint16_t *q, *k, *v;  // bf16, a row of heads · kHeadDim for each token; q carries the softmax scale
    uint16_t* out;              // bf16, shaped as q
    const RopeTable* rope;      // reaches the longest sequence
    int heads;
    int window;       // each token sees this many to both sides; below 0: all of its sequence
    bool first_only;  // q and out have one row for each sequence, its first token
};

// Whether the processor has what the kernel is compiled for, and the kernel lets this process use its tiles.
bool has_amx_bf16();

// One head of the sequence of tokens begin … end − 1. `out_row`: its first row of q and out. Any thread.
void attend(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);

}  // namespace ettin
