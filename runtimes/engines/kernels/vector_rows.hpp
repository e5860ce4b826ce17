// The row kernels for any vector width. Included after the pragma that switches instructions on, and after the vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "elements.hpp"
#include "rows.hpp"
#include "vector_exp2.hpp"

namespace ettin {
namespace {

// Writes the scale of a row, and returns what rounds the row: 127 divided by the scale as it is read. The scale
// of a row of zeros is 1e-30, so that nothing is divided by 0.
template <class Element> float rounding_share(float largest, void* scales, size_t row) {
    auto* scale = static_cast<Element*>(scales) + row;
    put(largest < 1e-30f ? 1e-30f : largest, scale);
    return 127.0f / as_float(*scale);
}

// Of one row.
struct Moments {
    float mean, deviation;
    float largest;  // distance from the mean, if rows are rounded
};

// Adds a row, multiplied, and returns the moments of the sum.
//
// Squares are taken of what lies between an element and the first one, so that one pass is enough: the first one is
// no farther from the mean than √size deviations, so rounding costs the variance some size · 2⁻²³ of itself at most.
template <class Vector, bool kRounds, class Element>
Moments add_row(const Element* x, const Element* added, float scale, Element* sum, int size, float eps) {
    using Floats = typename Vector::Floats;
    constexpr int kLanes = Vector::kLanes;
    const auto by = Vector::all(scale);
    const auto add = [&](int at) {
        Vector::store(sum + at, Vector::multiply_add(by, Vector::load(added + at), Vector::load(x + at)));
        return Vector::load(sum + at);  // as it was rounded
    };
    float lanes[kLanes];
    Vector::store(lanes, add(0));
    const Floats origin = Vector::all(lanes[0]);
    Floats high = Vector::all(0.0f), low = high;
    Floats sums[2] = {Vector::all(0.0f), Vector::all(0.0f)}, squares[2] = {Vector::all(0.0f), Vector::all(0.0f)};
    for (int at = 0; at < size; at += 2 * kLanes)
        for (int part = 0; part < 2; ++part) {
            const Floats apart = Vector::subtract(add(at + part * kLanes), origin);
            if constexpr (kRounds) {
                high = Vector::larger(high, apart);
                low = Vector::smaller(low, apart);
            }
            sums[part] = Vector::add(sums[part], apart);
            squares[part] = Vector::multiply_add(apart, apart, squares[part]);
        }
    const float apart = Vector::sum(Vector::add(sums[0], sums[1])) / float(size);
    const float square = Vector::sum(Vector::add(squares[0], squares[1])) / float(size);
    const float lowest = -Vector::largest(Vector::subtract(Vector::all(0.0f), low));
    const float above = Vector::largest(high) - apart, below = apart - lowest;
    return {lanes[0] + apart, std::sqrt(std::max(square - apart * apart, 0.0f) + eps), std::max(above, below)};
}

// Rows are handled this many at a time, so that the sums of one are ready while another is read: what the L1 cache holds.
constexpr size_t kMostRows = 8;
inline size_t rows_at_once(size_t size) { return std::clamp<size_t>(4096 / size, 1, kMostRows); }

template <class Vector, class Element, bool kRounds>
void normalise_rows(const AddedNorm& norm, size_t from, size_t to) {
    using Floats = typename Vector::Floats;
    const size_t size = size_t(norm.size), block = rows_at_once(size);
    Moments moments[kMostRows];
    for (size_t first = from; first < to; first += block) {
        const size_t rows = std::min(block, to - first);
        for (size_t row = 0; row < rows; ++row) {
            const size_t at = (first + row) * size;
            moments[row] = add_row<Vector, kRounds>(static_cast<const Element*>(norm.x) + at,
                                                    static_cast<const Element*>(norm.added) + at,
                                                    scale_at<Element>(norm.added_scales, first + row),
                                                    static_cast<Element*>(norm.sum) + at, norm.size, norm.eps);
        }
        for (size_t row = 0; row < rows; ++row) {
            const auto [centre, deviation, largest] = moments[row];
            float share = 1.0f / deviation;
            if constexpr (kRounds)
                share *= rounding_share<Element>(largest / deviation, norm.normed_scales, first + row);
            const Floats mean = Vector::all(centre), by = Vector::all(share);
            const size_t begin = (first + row) * size;
            for (size_t at = begin; at < begin + size; at += Vector::kLanes) {
                const Floats apart = Vector::subtract(Vector::load(static_cast<const Element*>(norm.sum) + at), mean);
                if constexpr (kRounds)
                    Vector::store_int8(static_cast<uint8_t*>(norm.normed) + at, Vector::multiply(apart, by));
                else
                    Vector::store(static_cast<Element*>(norm.normed) + at, Vector::multiply(apart, by));
            }
        }
    }
}

template <class Vector, class Element> void normalise(const AddedNorm& norm, size_t from, size_t to) {
    if (norm.normed_scales)
        normalise_rows<Vector, Element, true>(norm, from, to);
    else
        normalise_rows<Vector, Element, false>(norm, from, to);
}

// x · Φ(x). Φ(x) − ½ is x times a polynomial in x² up to |x| = 4.4, and ½ beyond; the largest error of the result is
// as small as this many terms allow.
template <class Vector> typename Vector::Floats gelu(typename Vector::Floats x) {
    constexpr float kReach = 4.4f;
    constexpr float kTerms[] = {3.569219225729725e-11f, -3.753882094059691e-09f, 1.7407944596925518e-07f,
                                -4.724784503196133e-06f, 8.429236186202615e-05f, -0.001054990803822875f,
                                0.009643035009503365f, -0.06607647240161896f, 0.39876165986061096f};
    // Where x is NaN, the last product is.
    const auto near = Vector::smaller(Vector::all(kReach), Vector::larger(Vector::all(-kReach), x));
    const auto square = Vector::multiply(near, near);
    auto sum = Vector::all(kTerms[0]);
    for (int term = 1; term < 9; ++term) sum = Vector::multiply_add(sum, square, Vector::all(kTerms[term]));
    return Vector::multiply(x, Vector::multiply_add(near, sum, Vector::all(0.5f)));
}

// gelu(scale · up) · gate. The scale of gate is left to the caller.
template <class Vector, class Element>
typename Vector::Floats gated(const Element* up, const Element* gate, typename Vector::Floats scale) {
    return Vector::multiply(gelu<Vector>(Vector::multiply(scale, Vector::load(up))), Vector::load(gate));
}

template <class Vector, class Element> void gate_to_floats(const GatedGelu& task, size_t from, size_t to) {
    for (size_t row = from; row < to; ++row) {
        const auto scale = Vector::all(scale_at<Element>(task.scales, row));
        const size_t first = row * task.stride;
        for (int at = 0; at < task.size; at += Vector::kLanes) {
            const auto x = gated<Vector>(static_cast<const Element*>(task.up) + first + at,
                                         static_cast<const Element*>(task.gate) + first + at, scale);
            Vector::store(static_cast<Element*>(task.out) + row * task.size + at, Vector::multiply(scale, x));
        }
    }
}

template <class Vector, class Element> void gate_to_int8(const GatedGelu& task, size_t from, size_t to) {
    const size_t size = size_t(task.size), block = rows_at_once(size);
    thread_local std::vector<float> memory;
    memory.resize(block * size + 16);
    auto* floats = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    float shares[kMostRows];
    for (size_t first = from; first < to; first += block) {
        const size_t rows = std::min(block, to - first);
        for (size_t row = 0; row < rows; ++row) {
            const float scale = scale_at<Element>(task.scales, first + row);
            const auto by = Vector::all(scale);
            const auto* up = static_cast<const Element*>(task.up) + (first + row) * task.stride;
            const auto* gate = static_cast<const Element*>(task.gate) + (first + row) * task.stride;
            auto largest = Vector::all_words(0);  // bits without a sign, of which those of NaN are the greatest
            for (size_t at = 0; at < size; at += Vector::kLanes) {
                const auto x = gated<Vector>(up + at, gate + at, by);
                largest = Vector::larger_words(largest, Vector::as_words(Vector::magnitude(x)));
                Vector::store(&floats[row * size + at], x);
            }
            const float reach = scale * Vector::largest_magnitude(largest);
            shares[row] = scale * rounding_share<Element>(reach, task.out_scales, first + row);
        }
        auto* out = static_cast<uint8_t*>(task.out) + first * size;
        for (size_t row = 0; row < rows; ++row) {
            const auto share = Vector::all(shares[row]);
            for (size_t at = row * size; at < (row + 1) * size; at += Vector::kLanes)
                Vector::store_int8(out + at, Vector::multiply(share, Vector::load(&floats[at])));
        }
    }
}

template <class Vector, class Element> void gate(const GatedGelu& task, size_t from, size_t to) {
    if (task.out_scales)
        gate_to_int8<Vector, Element>(task, from, to);
    else
        gate_to_floats<Vector, Element>(task, from, to);
}

// The query of a first token · a key, rotated: position 0 is rotated by the angle 0, so only the key is.
template <class Vector, class Element>
float first_score(const float* query, const Element* key, const float* cos, const float* sin, int half) {
    auto sum = Vector::all(0.0f);
    for (int at = 0; at < half; at += Vector::kLanes) {
        const auto left = Vector::load(query + at), right = Vector::load(query + half + at);
        const auto x = Vector::load(key + at), y = Vector::load(key + half + at);
        const auto even = Vector::multiply_add(right, y, Vector::multiply(left, x));
        const auto odd = Vector::subtract_product(Vector::multiply(right, x), left, y);
        sum = Vector::multiply_add(Vector::load(cos + at), even, sum);
        sum = Vector::multiply_add(Vector::load(sin + at), odd, sum);
    }
    return Vector::sum(sum);
}

// kWidth elements of the sum of `rows` rows of x, each multiplied by its weight and all by `share`.
template <class Vector, int kWidth, class Input, class Element>
void mix_columns(const float* weights, const Input* x, int rows, int size, float share, Element* out) {
    constexpr int kVectors = kWidth / Vector::kLanes;
    typename Vector::Floats sums[kVectors];
    for (auto& sum : sums) sum = Vector::all(0.0f);
    for (int row = 0; row < rows; ++row)
        for (int part = 0; part < kVectors; ++part) {
            const auto elements = Vector::load(x + size_t(row) * size + part * Vector::kLanes);
            sums[part] = Vector::multiply_add(Vector::all(weights[row]), elements, sums[part]);
        }
    for (int part = 0; part < kVectors; ++part)
        Vector::store(out + part * Vector::kLanes, Vector::multiply(Vector::all(share), sums[part]));
}

template <class Vector, class Input, class Element>
void mix_rows(const float* weights, const Input* x, int rows, int size, float share, Element* out) {
    int at = 0;
    for (; at + 64 <= size; at += 64) mix_columns<Vector, 64>(weights, x + at, rows, size, share, out + at);
    if (at < size) mix_columns<Vector, 32>(weights, x + at, rows, size, share, out + at);
}

template <class Vector, class Element>
void attend_first(const FirstAttention& task, int64_t begin, int64_t end, size_t pair, int head) {
    constexpr int kLanes = Vector::kLanes;
    const int length = int(end - begin), half = task.head_dim / 2;
    const int seen = task.window >= 0 ? std::min(length, task.window + 1) : length;
    const size_t width = size_t(task.heads) * task.head_dim, column = size_t(head) * task.head_dim;
    float query[64];
    const auto* q = static_cast<const Element*>(task.q) + pair * width + column;
    for (int at = 0; at < task.head_dim; at += kLanes)
        Vector::store(query + at, Vector::multiply(Vector::all(kLog2E), Vector::load(q + at)));

    thread_local std::vector<float> weights;
    weights.resize(size_t(seen) + kLanes);
    float largest = -INFINITY;
    for (int key = 0; key < seen; ++key) {
        const auto* k = static_cast<const Element*>(task.k) + size_t(begin + key) * width + column;
        const size_t turn = size_t(key) * half;
        weights[key] = scale_at<Element>(task.scales, begin + key) *
                       first_score<Vector>(query, k, &task.rope->cos[turn], &task.rope->sin[turn], half);
        largest = std::max(largest, weights[key]);
    }
    std::fill_n(&weights[seen], kLanes, -INFINITY);  // weighs nothing
    auto sums = Vector::all(0.0f);
    for (int key = 0; key < seen; key += kLanes) {
        const auto x = exp2<Vector, 5>(Vector::subtract(Vector::load(&weights[key]), Vector::all(largest)));
        Vector::store(&weights[key], x);
        sums = Vector::add(sums, x);
    }
    const float share = 1.0f / Vector::sum(sums);
    if (task.scales)
        for (int key = 0; key < seen; ++key) weights[key] *= scale_at<Element>(task.scales, begin + key);
    auto* out = static_cast<Element*>(task.out) + (pair * task.heads + head) * task.size;
    const size_t first = size_t(begin) * task.size;
    if (task.is_int8)
        mix_rows<Vector>(weights.data(), static_cast<const int8_t*>(task.x) + first, seen, task.size, share, out);
    else
        mix_rows<Vector>(weights.data(), static_cast<const Element*>(task.x) + first, seen, task.size, share, out);
}

}  // namespace
}  // namespace ettin
