#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#ifdef ETTIN_EVEX  // in tests, for a processor whose only encoding of the 256-bit product is that of AVX-512
#pragma GCC target("avx2,fma,avx512vl,avx512vnni")
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif
#include "vector256.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
namespace {
struct Dot256 : Vector256 {
    static Words dot(Words sums, Words left, Words right) {
#ifdef ETTIN_EVEX
        return _mm256_dpbusd_epi32(sums, left, right);
#else
        return _mm256_dpbusd_avx_epi32(sums, left, right);
#endif
    }
};
}  // namespace
void attend_int8_avx2(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<MixedSigns<Dot256>, Int8Products<MixedSigns<Dot256>>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
