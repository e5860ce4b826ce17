// 4 floats or integers of 32 bits at a time, with the instructions that every 64-bit ARM processor has.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ettin {
namespace {

struct VectorNeon {
    using Floats = float32x4_t;
    using Words = int32x4_t;  // 32-bit integers, or groups of smaller elements
    static constexpr int kLanes = 4;
    // Rows × vectors of a product's block: 16 sums stay in the 32 registers. Of 24, GCC 12 keeps some in memory.
    static constexpr int kScoreRows = 4, kScoreVectors = 4, kMixRows = 4, kMixVectors = 4;

    static Floats all(float x) { return vdupq_n_f32(x); }
    static Words all_words(uint32_t x) { return vdupq_n_s32(int32_t(x)); }
    static Floats load(const float* x) { return vld1q_f32(x); }
    static Floats load(const int8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, sizeof bytes);
        return to_floats(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))))));
    }
    static Words load_words(const void* x) { return vld1q_s32(static_cast<const int32_t*>(x)); }
    static void store(float* to, Floats x) { vst1q_f32(to, x); }
    static void store_words(void* to, Words x) { vst1q_s32(static_cast<int32_t*>(to), x); }

    static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
    static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static Floats subtract_product(Floats c, Floats a, Floats b) { return vfmsq_f32(c, a, b); }
    // NaN where one is NaN, as the instruction has it. x86 gives the second there: nothing may rely on either.
    static Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
    static Floats smaller(Floats a, Floats b) { return vminq_f32(a, b); }
    static Floats magnitude(Floats x) { return vabsq_f32(x); }
    static Floats rounded(Floats x) { return vrndnq_f32(x); }
    static float sum(Floats x) { return vaddvq_f32(x); }
    static float largest(Floats x) { return vmaxvq_f32(x); }

    static Floats as_floats(Words x) { return vreinterpretq_f32_s32(x); }
    static Words as_words(Floats x) { return vreinterpretq_s32_f32(x); }
    static Words to_words(Floats x) { return vcvtnq_s32_f32(x); }
    static Floats to_floats(Words x) { return vcvtq_f32_s32(x); }
    static Words add_words(Words a, Words b) { return vaddq_s32(a, b); }
    static Words larger_words(Words a, Words b) { return vmaxq_s32(a, b); }
    // As a float, of which these are the bits without a sign.
    static float largest_magnitude(Words bits) {
        return vgetq_lane_f32(as_floats(vdupq_n_s32(vmaxvq_s32(bits))), 0);
    }
    static Words both(Words a, Words b) { return vandq_s32(a, b); }
    static Words either(Words a, Words b) { return vorrq_s32(a, b); }
    static Words differing(Words a, Words b) { return veorq_s32(a, b); }
    template <int kBits> static Words left(Words x) { return vshlq_n_s32(x, kBits); }

    // `x` where from ≤ first + lane < to, `other` elsewhere.
    static Floats within(Floats x, Floats other, int first, int from, int to) {
        const int32_t lanes[4] = {0, 1, 2, 3};
        const Words index = vaddq_s32(vld1q_s32(lanes), vdupq_n_s32(first));
        const uint32x4_t inside = vandq_u32(vcgeq_s32(index, vdupq_n_s32(from)), vcltq_s32(index, vdupq_n_s32(to)));
        return vbslq_f32(inside, x, other);
    }

    // An exponent of 2 that `scaled` takes, −∞ included: 1e-38 stands for less. NaN stays.
    static Floats bounded(Floats x) { return larger(all(-126.0f), x); }
    // x · 2^whole, for x from ½ to 2.
    static Floats scaled(Floats x, Floats whole) {
        return as_floats(vaddq_s32(as_words(x), vshlq_n_s32(to_words(whole), 23)));
    }

    // The low bytes of 4 integers.
    static void store_bytes(void* to, Words x) {
        const int16x4_t half = vmovn_s32(x);
        const int8x8_t bytes = vmovn_s16(vcombine_s16(half, half));
        const uint32_t joined = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
        std::memcpy(to, &joined, sizeof joined);
    }

    // The nearest whole numbers, −128 … 127; of NaN, any.
    static void store_int8(void* to, Floats x) {
        const int16x4_t half = vqmovn_s32(to_words(x));
        const int8x8_t bytes = vqmovn_s16(vcombine_s16(half, half));
        const uint32_t joined = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
        std::memcpy(to, &joined, sizeof joined);
    }

    // A matrix of 4 × 4 words.
    static void transpose(Words rows[4]) {
        const int64x2_t even = vreinterpretq_s64_s32(vtrn1q_s32(rows[0], rows[1]));
        const int64x2_t odd = vreinterpretq_s64_s32(vtrn2q_s32(rows[0], rows[1]));
        const int64x2_t even2 = vreinterpretq_s64_s32(vtrn1q_s32(rows[2], rows[3]));
        const int64x2_t odd2 = vreinterpretq_s64_s32(vtrn2q_s32(rows[2], rows[3]));
        rows[0] = vreinterpretq_s32_s64(vtrn1q_s64(even, even2));
        rows[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd, odd2));
        rows[2] = vreinterpretq_s32_s64(vtrn2q_s64(even, even2));
        rows[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd, odd2));
    }
};

}  // namespace
}  // namespace ettin
