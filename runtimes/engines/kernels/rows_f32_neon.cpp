#include "rows.hpp"
#include <algorithm>
#include <cmath>
#include <vector>
#include "vector_neon.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_f32_neon(const AddedNorm& norm, size_t from, size_t to) { normalise<VectorNeon, float>(norm, from, to); }
void gate_f32_neon(const GatedGelu& gelu, size_t from, size_t to) { gate<VectorNeon, float>(gelu, from, to); }
void attend_first_f32_neon(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head) {
    attend_first<VectorNeon, float>(task, begin, end, pair, head);
}
}  // namespace ettin
