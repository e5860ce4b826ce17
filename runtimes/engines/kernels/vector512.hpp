// 16 floats or integers of 32 bits at a time. Included after the pragma that switches AVX-512 on.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace ettin {
namespace {

struct Vector512 {
    using Floats = __m512;
    using Words = __m512i;  // 32-bit integers, or groups of smaller elements
    static constexpr int kLanes = 16;
    // Rows × vectors of a product's block: 24 sums stay in the 32 registers.
    static constexpr int kScoreRows = 12, kScoreVectors = 2, kMixRows = 6, kMixVectors = 4;

    static Floats all(float x) { return _mm512_set1_ps(x); }
    static Words all_words(uint32_t x) { return _mm512_set1_epi32(int(x)); }
    static Floats load(const float* x) { return _mm512_loadu_ps(x); }
    static Floats load(const uint16_t* bf16) {
        const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
        return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
    }
    static Floats load(const int8_t* x) {
        return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
    }
    static Words load_words(const void* x) { return _mm512_loadu_si512(x); }
    static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
    static void store_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
    // Rounded to nearest, ties to even; NaN stays NaN.
    static void store(uint16_t* bf16, Floats x) {
#ifdef ETTIN_AVX512_BF16  // from the file that switches these instructions on
        const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
        const Words bits = as_words(x);
        const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all_words(1));
        const Words nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all_words(0x7fff)));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const Words chosen = _mm512_mask_mov_epi32(nearest, is_nan, all_words(0x7fc00000));
        const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
#endif
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), rounded);
    }

    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
    // The second where one is NaN, as the instruction has it.
    static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
    static Floats rounded(Floats x) { return _mm512_roundscale_ps(x, 8); }
    static float sum(Floats x) { return _mm512_reduce_add_ps(x); }
    static float largest(Floats x) { return _mm512_reduce_max_ps(x); }

    static Floats as_floats(Words x) { return _mm512_castsi512_ps(x); }
    static Words as_words(Floats x) { return _mm512_castps_si512(x); }
    static Words to_words(Floats x) { return _mm512_cvtps_epi32(x); }
    static Floats to_floats(Words x) { return _mm512_cvtepi32_ps(x); }
    static Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
    static Words larger_words(Words a, Words b) { return _mm512_max_epi32(a, b); }
    // As a float, of which these are the bits without a sign.
    static float largest_magnitude(Words bits) {
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(bits))));
    }
    static Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
    static Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
    static Words differing(Words a, Words b) { return _mm512_xor_si512(a, b); }
    template <int kBits> static Words left(Words x) { return _mm512_slli_epi32(x, kBits); }
    template <int kBits> static Words right(Words x) { return _mm512_srli_epi32(x, kBits); }

    // `x` where from ≤ first + lane < to, `other` elsewhere.
    static Floats within(Floats x, Floats other, int first, int from, int to) {
        const Words lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const Words index = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
        const __mmask16 outside = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(from)) |
                                  _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(to));
        return _mm512_mask_mov_ps(x, outside, other);
    }

    static Floats bounded(Floats x) { return x; }  // `scaled` takes any exponent of 2
    // x · 2^whole; 0 for −∞, whatever x is.
    static Floats scaled(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }

    // The low bytes of 16 integers.
    static void store_bytes(void* to, Words x) {
        _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
    }

    // The nearest whole numbers, −128 … 127; of NaN, any.
    static void store_int8(void* to, Floats x) {
        const Words whole = to_words(smaller(x, all(127.0f)));  // beyond 2³¹ it gives −2³¹
        _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
    }

    // A matrix of 16 × 16 words.
    static void transpose(Words rows[16]) {
        Words a[16], b[16];
        for (int row = 0; row < 16; row += 2) {
            a[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
            a[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
        }
        for (int row = 0; row < 16; row += 4) {
            b[row] = _mm512_unpacklo_epi64(a[row], a[row + 2]);
            b[row + 1] = _mm512_unpackhi_epi64(a[row], a[row + 2]);
            b[row + 2] = _mm512_unpacklo_epi64(a[row + 1], a[row + 3]);
            b[row + 3] = _mm512_unpackhi_epi64(a[row + 1], a[row + 3]);
        }
        for (int row = 0; row < 4; ++row) {
            const Words even = _mm512_shuffle_i32x4(b[row], b[row + 4], 0x88);
            const Words odd = _mm512_shuffle_i32x4(b[row], b[row + 4], 0xdd);
            const Words even2 = _mm512_shuffle_i32x4(b[row + 8], b[row + 12], 0x88);
            const Words odd2 = _mm512_shuffle_i32x4(b[row + 8], b[row + 12], 0xdd);
            rows[row] = _mm512_shuffle_i32x4(even, even2, 0x88);
            rows[row + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
            rows[row + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
            rows[row + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
        }
    }
};

}  // namespace
}  // namespace ettin
