// 8 floats or integers of 32 bits at a time. Included after the pragma that switches AVX2 and FMA on.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ettin {
namespace {

struct Vector256 {
    using Floats = __m256;
    using Words = __m256i;  // 32-bit integers, or groups of smaller elements
    static constexpr int kLanes = 8;
    // Rows × vectors of a product's block: 12 sums stay in the 16 registers.
    static constexpr int kScoreRows = 6, kScoreVectors = 2, kMixRows = 6, kMixVectors = 2;

    static Floats all(float x) { return _mm256_set1_ps(x); }
    static Words all_words(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    static Floats load(const float* x) { return _mm256_loadu_ps(x); }
    static Floats load(const uint16_t* bf16) {
        const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
        return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded), 16));
    }
    static Floats load(const int8_t* x) {
        return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
    }
    static Words load_words(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
    static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
    static void store_words(void* to, Words x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats subtract_product(Floats c, Floats a, Floats b) { return _mm256_fnmadd_ps(a, b, c); }
    // The second where one is NaN, as the instruction has it.
    static Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats magnitude(Floats x) { return _mm256_and_ps(x, as_floats(all_words(0x7fffffff))); }
    static Floats rounded(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static float sum(Floats x) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static float largest(Floats x) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }

    static Floats as_floats(Words x) { return _mm256_castsi256_ps(x); }
    static Words as_words(Floats x) { return _mm256_castps_si256(x); }
    static Words to_words(Floats x) { return _mm256_cvtps_epi32(x); }
    static Floats to_floats(Words x) { return _mm256_cvtepi32_ps(x); }
    static Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
    static Words larger_words(Words a, Words b) { return _mm256_max_epi32(a, b); }
    // As a float, of which these are the bits without a sign.
    static float largest_magnitude(Words bits) {
        __m128i half = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
    }
    static Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
    static Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
    static Words differing(Words a, Words b) { return _mm256_xor_si256(a, b); }
    template <int kBits> static Words left(Words x) { return _mm256_slli_epi32(x, kBits); }
    template <int kBits> static Words right(Words x) { return _mm256_srli_epi32(x, kBits); }

    // `x` where from ≤ first + lane < to, `other` elsewhere.
    static Floats within(Floats x, Floats other, int first, int from, int to) {
        const Words index = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(first));
        const Words inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), index),
                                                 _mm256_cmpgt_epi32(_mm256_set1_epi32(to), index));
        return _mm256_blendv_ps(other, x, as_floats(inside));
    }

    // An exponent of 2 that `scaled` takes, −∞ included: 1e-38 stands for less. NaN stays.
    static Floats bounded(Floats x) { return larger(all(-126.0f), x); }
    // x · 2^whole, for x from ½ to 2.
    static Floats scaled(Floats x, Floats whole) {
        return as_floats(_mm256_add_epi32(as_words(x), _mm256_slli_epi32(to_words(whole), 23)));
    }

    // The low bytes of 8 integers.
    static void store_bytes(void* to, Words x) {
        const Words order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                             0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const Words bytes = _mm256_shuffle_epi8(x, order);
        const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storel_epi64(static_cast<__m128i*>(to), joined);
    }

    // The nearest whole numbers, −128 … 127; of NaN, any.
    static void store_int8(void* to, Floats x) {
        const Words whole = to_words(smaller(x, all(127.0f)));  // beyond 2³¹ it gives −2³¹
        const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi16(half, half));
    }

    // A matrix of 8 × 8 words.
    static void transpose(Words rows[8]) {
        Words a[8], b[8];
        for (int row = 0; row < 8; row += 2) {
            a[row] = _mm256_unpacklo_epi32(rows[row], rows[row + 1]);
            a[row + 1] = _mm256_unpackhi_epi32(rows[row], rows[row + 1]);
        }
        for (int row = 0; row < 8; row += 4) {
            b[row] = _mm256_unpacklo_epi64(a[row], a[row + 2]);
            b[row + 1] = _mm256_unpackhi_epi64(a[row], a[row + 2]);
            b[row + 2] = _mm256_unpacklo_epi64(a[row + 1], a[row + 3]);
            b[row + 3] = _mm256_unpackhi_epi64(a[row + 1], a[row + 3]);
        }
        for (int row = 0; row < 4; ++row) {
            rows[row] = _mm256_permute2x128_si256(b[row], b[row + 4], 0x20);
            rows[row + 4] = _mm256_permute2x128_si256(b[row], b[row + 4], 0x31);
        }
    }
};

}  // namespace
}  // namespace ettin
