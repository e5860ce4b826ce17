#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define ETTIN_AVX512_BF16
#include "vector512.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
namespace {
// Queries, keys, values and weights are rounded to bf16; sums are float32.
struct Bf16Products : FloatingProducts<Vector512> {
    static constexpr bool kIsExact = false;
    static constexpr int kGroup = 2;

    template <bool kOfValues> static Sums step(Sums sums, Words left, Words right) {
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
    }
    template <int kDim, bool kIsKey> static float encode(const Floats* row, uint32_t* words) {
        for (int at = 0; at < kDim / 32; ++at) {
            const __m512bh pairs = _mm512_cvtne2ps_pbh(row[2 * at + 1], row[2 * at]);
            Vector512::store_words(words + at * 16, reinterpret_cast<__m512i>(pairs));
        }
        return 1.0f;
    }
    static Words joined(const Floats group[2]) {
        alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const auto halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(group[1], group[0]));
        return _mm512_permutexvar_epi16(Vector512::load_words(kOrder), halves);
    }
    static Floats store_weights(Floats x, uint8_t* to) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
        return x;
    }
};
}  // namespace
void attend_bf16_avx512(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<Vector512, Bf16Products, uint16_t>(task, begin, end, out_row, head);
}
}  // namespace ettin
