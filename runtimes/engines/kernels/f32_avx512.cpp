#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "vector512.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
void attend_f32_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<Vector512, F32Products<Vector512>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
