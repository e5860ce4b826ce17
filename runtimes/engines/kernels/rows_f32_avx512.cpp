#include "rows.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "vector512.hpp"
#include "vector_rows.hpp"

namespace ettin {
void normalise_f32_avx512(const AddedNorm& norm, size_t from, size_t to) { normalise<Vector512, float>(norm, from, to); }
void gate_f32_avx512(const GatedGelu& gelu, size_t from, size_t to) { gate<Vector512, float>(gelu, from, to); }
}  // namespace ettin
