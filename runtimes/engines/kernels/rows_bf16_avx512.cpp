#include "rows.hpp"
#include <algorithm>
#include <cmath>
#include <vector>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define ETTIN_AVX512_BF16
#include "vector512.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_bf16_avx512(const AddedNorm& norm, size_t from, size_t to) {
    normalise<Vector512, uint16_t>(norm, from, to);
}
void gate_bf16_avx512(const GatedGelu& gelu, size_t from, size_t to) { gate<Vector512, uint16_t>(gelu, from, to); }
void attend_first_bf16_avx512(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head) {
    attend_first<Vector512, uint16_t>(task, begin, end, pair, head);
}
}  // namespace ettin
