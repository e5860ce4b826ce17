#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#include "vector_neon.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
void attend_f32_neon(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<VectorNeon, F32Products<VectorNeon>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
