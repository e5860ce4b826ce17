#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#include "vector512.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
namespace {
struct Dot512 : Vector512 {
    static Words dot(Words sums, Words left, Words right) { return _mm512_dpbusd_epi32(sums, left, right); }
};
}  // namespace
void attend_int8_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<MixedSigns<Dot512>, Int8Products<MixedSigns<Dot512>>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
