#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("avx2,fma")
#include "vector256.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
void attend_f32_avx2(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<Vector256, F32Products<Vector256>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
