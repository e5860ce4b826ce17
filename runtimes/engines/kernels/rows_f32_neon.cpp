#include "rows.hpp"
#include <algorithm>
#include <cmath>
#include "vector_neon.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_f32_neon(const AddedNorm& norm, size_t from, size_t to) { normalise<VectorNeon, float>(norm, from, to); }
void gate_f32_neon(const GatedGelu& gelu, size_t from, size_t to) { gate<VectorNeon, float>(gelu, from, to); }
}  // namespace ettin
