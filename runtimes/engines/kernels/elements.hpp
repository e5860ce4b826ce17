// Single elements, float32 or bf16. Included after the pragma that switches instructions on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ettin {
namespace {

inline float as_float(float x) { return x; }
inline float as_float(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Rounded to nearest, ties to even.
inline void put(float x, float* to) { *to = x; }
inline void put(float x, uint16_t* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *to = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// The scale of a row; without scales, 1.
template <class Element> float scale_at(const void* scales, size_t row) {
    return scales ? as_float(static_cast<const Element*>(scales)[row]) : 1.0f;
}

}  // namespace
}  // namespace ettin
