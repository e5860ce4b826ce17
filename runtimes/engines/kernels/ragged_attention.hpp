// Attention over sequences laid end to end: softmax(rope(q) · rope(k)ᵀ) · v for each sequence and head, without padding
// and without masks. One algorithm (`vector_attention.hpp`) is compiled for several instruction sets and kinds of
// products, and AMX has its own (`bf16_amx.cpp`). Nothing here depends on an inference engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ettin {

// cos and sin of the angles of `rows` positions, float32 [rows, head_dim / 2].
struct RopeTable {
    RopeTable(float theta, int head_dim, int rows);
    int rows;
    std::vector<float> cos, sin;
};

inline bool is_known_head_dim(int64_t head_dim) { return head_dim == 32 || head_dim == 64; }

struct RaggedAttention {
    const void *q, *k, *v;  // rows of heads · head_dim, one for each token; q carries the softmax scale
    const int64_t* rows;    // the row of each token in q, k and v; nullptr: its own. Not with first_only
    const void* scales;     // as q: what the rows of each token are multiplied by, in q not with first_only; nullptr: 1
    void* out;              // a row for each of q's tokens
    bool is_bf16;           // whether q, k and v are bf16; else float32
    float step;             // out is int8: whole multiples of this, −128 … 127; 0: out is as q
    const RopeTable* rope;  // reaches the longest sequence
    int heads, head_dim;
    int window;       // each token sees this many to both sides; below 0: all of its sequence
    bool first_only;  // q and out have one row for each sequence, its first token

    size_t row_of(int64_t token) const { return size_t(rows ? rows[token] : token); }
};

// One way to compute it.
struct Variant {
    const char* name;   // the precision of its products and the instruction set
    bool (*can_run)();  // whether this processor has the instructions, and the system lets this process use them
    bool (*takes)(const RaggedAttention& task);  // whether it knows the elements and the size of a head
    // One head of the sequence of tokens begin … end − 1, at least one. `out_row`: its first row of q and out. Any
    // thread.
    void (*attend)(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
};

// The variant of that name; nullptr: there is none.
const Variant* variant_named(const char* name);

// Tokens of the longest sequence of a batch, at least 1. `bounds` [pairs + 1]: where each begins and the last ends.
int64_t longest_sequence(const int64_t* bounds, size_t pairs);

// A part of the work of a batch, of pairs · heads parts: one head of one sequence, nothing for an empty one. Any thread.
void attend_part(const Variant& variant, const RaggedAttention& task, const int64_t* bounds, size_t part);

void attend_f32_avx2(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_f32_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_int8_avx2(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_int8_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_bf16_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_bf16_amx(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_f32_neon(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);
void attend_int8_neon(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head);

}  // namespace ettin
