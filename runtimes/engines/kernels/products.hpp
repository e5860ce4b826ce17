// The products of `vector_attention.hpp` in float32 and int8, and what those in bf16 share with them. Included after the vectors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ettin {
namespace {

// What products have in common whose sums are float32.
template <class Vector> struct FloatingProducts {
    using Floats = typename Vector::Floats;
    using Words = typename Vector::Words;
    using Sums = Floats;
    static constexpr bool kIsFloating = true;
    static constexpr uint8_t kQueryOffset = 0, kValueOffset = 0;
    static constexpr float kLogRange = 0.0f;

    static Sums zero() { return Vector::all(0.0f); }
    static Sums start(const int32_t*) { return zero(); }
    static Floats floats(Sums x) { return x; }
};

template <class Vector> struct F32Products : FloatingProducts<Vector> {
    using Floats = typename Vector::Floats;
    using Words = typename Vector::Words;
    using Sums = Floats;
    static constexpr bool kIsExact = true;
    static constexpr int kGroup = 1;

    template <bool kOfValues> static Sums step(Sums sums, Words left, Words right) {
        return Vector::multiply_add(Vector::as_floats(left), Vector::as_floats(right), sums);
    }
    template <int kDim, bool kIsKey> static float encode(const Floats* row, uint32_t* words) {
        for (int at = 0; at < kDim; at += Vector::kLanes)
            Vector::store_words(words + at, Vector::as_words(row[at / Vector::kLanes]));
        return 1.0f;
    }
    static Words joined(const Floats group[1]) { return Vector::as_words(group[0]); }
    static Floats store_weights(Floats x, uint8_t* to) {
        Vector::store_words(to, Vector::as_words(x));
        return x;
    }
};

// For `Vector::dot` of unsigned with signed bytes.
template <class Vector> struct MixedSigns : Vector {
    using Words = typename Vector::Words;
    static constexpr uint8_t kQueryOffset = 128, kValueOffset = 0;

    static Words dot_scores(Words sums, Words left, Words right) { return Vector::dot(sums, left, right); }
    static Words dot_values(Words sums, Words left, Words right) { return Vector::dot(sums, left, right); }
};

// `Vector` must also have `dot_scores(sums, queries, keys)` and `dot_values(sums, weights, values)`, which add four
// products of bytes to each sum.
//
// Queries and keys are rounded with a scale for each row, values with one for each dimension of a sequence; weights are
// 0 … 255, relative to the largest of their chunk. Keys are signed and weights are unsigned. Some instructions multiply
// unsigned with signed bytes alone (`MixedSigns`): queries are unsigned there, and what their offset of 128 adds to a
// score is where its sum begins. Others multiply equal kinds: values are unsigned there, and their offset, which is the
// same for every key, is taken from their centre.
template <class Vector> struct Int8Products {
    using Floats = typename Vector::Floats;
    using Words = typename Vector::Words;
    using Sums = Words;
    static constexpr bool kIsFloating = false, kIsExact = false;
    static constexpr uint8_t kQueryOffset = Vector::kQueryOffset, kValueOffset = Vector::kValueOffset;
    static constexpr int kGroup = 4;
    static constexpr float kLogRange = 7.99435344f;  // log2(255)

    static Sums zero() { return Vector::all_words(0); }
    static Sums start(const int32_t* sums) { return kQueryOffset ? Vector::load_words(sums) : zero(); }
    static Floats floats(Sums x) { return Vector::to_floats(x); }
    template <bool kOfValues> static Sums step(Sums sums, Words left, Words right) {
        return kOfValues ? Vector::dot_values(sums, left, right) : Vector::dot_scores(sums, left, right);
    }
    static Words negative(Sums x) {
        return Vector::add_words(Vector::differing(x, Vector::all_words(~0u)), Vector::all_words(1));
    }

    // Returns the scale: never so small that a hidden score would count, and not finite if the row has NaN or infinity,
    // whose bits without the sign are greater than those of any number.
    template <int kDim, bool kIsKey> static float encode(const Floats* row, uint32_t* words) {
        constexpr int kVectors = kDim / Vector::kLanes;
        Words bits = Vector::as_words(Vector::magnitude(row[0]));
        for (int at = 1; at < kVectors; ++at)
            bits = Vector::larger_words(bits, Vector::as_words(Vector::magnitude(row[at])));
        const float size = Vector::largest_magnitude(bits);
        const Floats by = Vector::all(127.0f / (size < 1e-30f ? 1e-30f : size));
        const Words flip = Vector::all_words(kIsKey ? 0 : kQueryOffset);
        auto* bytes = reinterpret_cast<uint8_t*>(words);
        for (int at = 0; at < kVectors; ++at)
            Vector::store_bytes(bytes + at * Vector::kLanes,
                                Vector::differing(Vector::to_words(Vector::multiply(row[at], by)), flip));
        return (size < 1e-20f ? 1e-20f : size) * (1.0f / 127.0f);
    }
    static Words joined(const Floats group[4]) {
        Words bytes[4];
        for (int at = 0; at < 4; ++at) bytes[at] = Vector::both(Vector::to_words(group[at]), Vector::all_words(0xff));
        const Words low = Vector::either(bytes[0], Vector::template left<8>(bytes[1]));
        const Words high = Vector::either(Vector::template left<16>(bytes[2]), Vector::template left<24>(bytes[3]));
        const Words all = Vector::either(low, high);
        if constexpr (kValueOffset == 0) return all;
        return Vector::differing(all, Vector::all_words(kValueOffset * 0x01010101u));
    }
    // Returns the weights as they were rounded, so that they are shares of their own sum; NaN stays.
    static Floats store_weights(Floats x, uint8_t* to) {
        const Floats whole = Vector::rounded(x);
        Vector::store_bytes(to, Vector::to_words(whole));
        return whole;
    }
};

}  // namespace
}  // namespace ettin
