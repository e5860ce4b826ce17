// Layer norm whose result is rounded to int8. Included as `vector_attention.hpp` is.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "ragged_attention.hpp"

namespace ettin {
namespace {

template <class Vector, class Element> void normalise(const Element* x, uint8_t* out, const RoundedNorm& norm) {
    using Floats = typename Vector::Floats;
    constexpr int kLanes = Vector::kLanes;
    Floats sums[2] = {Vector::all(0.0f), Vector::all(0.0f)};
    for (int at = 0; at < norm.size; at += 2 * kLanes)
        for (int part = 0; part < 2; ++part) sums[part] = Vector::add(sums[part], Vector::load(x + at + part * kLanes));
    const Floats mean = Vector::all(Vector::sum(Vector::add(sums[0], sums[1])) / float(norm.size));
    Floats squares[2] = {Vector::all(0.0f), Vector::all(0.0f)};
    for (int at = 0; at < norm.size; at += 2 * kLanes)
        for (int part = 0; part < 2; ++part) {
            const Floats apart = Vector::subtract(Vector::load(x + at + part * kLanes), mean);
            squares[part] = Vector::multiply_add(apart, apart, squares[part]);
        }
    const float variance = Vector::sum(Vector::add(squares[0], squares[1])) / float(norm.size);
    const Floats by = Vector::all(1.0f / (std::sqrt(variance + norm.eps) * norm.step));
    for (int at = 0; at < norm.size; at += kLanes)
        store_int8<Vector>(out + at, Vector::multiply(Vector::subtract(Vector::load(x + at), mean), by));
}

template <class Vector, class Element> void normalise(const RoundedNorm& norm, size_t from, size_t to) {
    for (size_t row = from; row < to; ++row)
        normalise<Vector, Element>(static_cast<const Element*>(norm.x) + row * norm.size,
                                   static_cast<uint8_t*>(norm.out) + row * norm.size, norm);
}

}  // namespace
}  // namespace ettin
