#include "rows.hpp"
#include <algorithm>
#include <cmath>
#include <vector>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "vector512.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_f32_avx512(const AddedNorm& norm, size_t from, size_t to) { normalise<Vector512, float>(norm, from, to); }
void gate_f32_avx512(const GatedGelu& gelu, size_t from, size_t to) { gate<Vector512, float>(gelu, from, to); }
void attend_first_f32_avx512(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head) {
    attend_first<Vector512, float>(task, begin, end, pair, head);
}
}  // namespace ettin
