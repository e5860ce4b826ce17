#include "rows.hpp"
#include <algorithm>
#include <cmath>
#include <vector>
#pragma GCC target("avx2,fma")
#include "vector256.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_f32_avx2(const AddedNorm& norm, size_t from, size_t to) { normalise<Vector256, float>(norm, from, to); }
void gate_f32_avx2(const GatedGelu& gelu, size_t from, size_t to) { gate<Vector256, float>(gelu, from, to); }
void attend_first_f32_avx2(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head) {
    attend_first<Vector256, float>(task, begin, end, pair, head);
}
}  // namespace ettin
