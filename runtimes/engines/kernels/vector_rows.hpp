// The row kernels for any vector width. Included after the pragma that switches instructions on, and after the vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rows.hpp"
#include "vector_exp2.hpp"

namespace ettin {
namespace {

// The bytes of element `at` of an output that is int8 where there is a step.
template <class Vector, class Element>
void store_rounded(void* out, size_t at, typename Vector::Floats x, bool is_int8) {
    if (is_int8)
        Vector::store_int8(static_cast<uint8_t*>(out) + at, x);
    else
        Vector::store(static_cast<Element*>(out) + at, x);
}

// Of one row.
struct Moments {
    float mean, deviation;
};

// Adds a row and returns the moments of the sum.
//
// Squares are taken of what lies between an element and the first one, so that one pass is enough: the first one is
// no farther from the mean than √size deviations, so rounding costs the variance some size · 2⁻²³ of itself at most.
template <class Vector, class Element>
Moments add_row(const Element* x, const Element* added, Element* sum, int size, float eps) {
    using Floats = typename Vector::Floats;
    constexpr int kLanes = Vector::kLanes;
    const auto first = Vector::load(x), other = Vector::load(added);
    Vector::store(sum, Vector::add(first, other));
    float lanes[kLanes];
    Vector::store(lanes, Vector::load(sum));
    const Floats origin = Vector::all(lanes[0]);
    Floats sums[2] = {Vector::all(0.0f), Vector::all(0.0f)}, squares[2] = {Vector::all(0.0f), Vector::all(0.0f)};
    for (int at = 0; at < size; at += 2 * kLanes)
        for (int part = 0; part < 2; ++part) {
            const int place = at + part * kLanes;
            Vector::store(sum + place, Vector::add(Vector::load(x + place), Vector::load(added + place)));
            const Floats apart = Vector::subtract(Vector::load(sum + place), origin);
            sums[part] = Vector::add(sums[part], apart);
            squares[part] = Vector::multiply_add(apart, apart, squares[part]);
        }
    const float apart = Vector::sum(Vector::add(sums[0], sums[1])) / float(size);
    const float square = Vector::sum(Vector::add(squares[0], squares[1])) / float(size);
    return {lanes[0] + apart, std::sqrt(std::max(square - apart * apart, 0.0f) + eps)};
}

// Rows are handled several at a time: the sums of one are ready while another is read.
template <class Vector, class Element> void normalise(const AddedNorm& norm, size_t from, size_t to) {
    using Floats = typename Vector::Floats;
    constexpr size_t kMostRows = 8;
    const size_t size = size_t(norm.size), block = std::clamp<size_t>(4096 / size, 1, kMostRows);  // of the L1 cache
    const bool is_int8 = norm.step != 0.0f;
    Moments moments[kMostRows];
    for (size_t first = from; first < to; first += block) {
        const size_t rows = std::min(block, to - first);
        for (size_t row = 0; row < rows; ++row) {
            const size_t at = (first + row) * size;
            moments[row] = add_row<Vector>(static_cast<const Element*>(norm.x) + at,
                                           static_cast<const Element*>(norm.added) + at,
                                           static_cast<Element*>(norm.sum) + at, norm.size, norm.eps);
        }
        for (size_t row = 0; row < rows; ++row) {
            const Floats mean = Vector::all(moments[row].mean);
            const Floats by = Vector::all(1.0f / (moments[row].deviation * (is_int8 ? norm.step : 1.0f)));
            const size_t begin = (first + row) * size;
            for (size_t at = begin; at < begin + size; at += Vector::kLanes) {
                const Floats apart = Vector::subtract(Vector::load(static_cast<const Element*>(norm.sum) + at), mean);
                store_rounded<Vector, Element>(norm.normed, at, Vector::multiply(apart, by), is_int8);
            }
        }
    }
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

template <class Vector, class Element> void gate(const GatedGelu& task, size_t from, size_t to) {
    const bool is_int8 = task.step != 0.0f;
    const auto by = Vector::all(is_int8 ? 1.0f / task.step : 1.0f);
    for (size_t row = from; row < to; ++row) {
        const auto* up = static_cast<const Element*>(task.up) + row * task.stride;
        const auto* gate = static_cast<const Element*>(task.gate) + row * task.stride;
        for (int at = 0; at < task.size; at += Vector::kLanes) {
            const auto gated = Vector::multiply(gelu<Vector>(Vector::load(up + at)), Vector::load(gate + at));
            store_rounded<Vector, Element>(task.out, row * task.size + at, Vector::multiply(gated, by), is_int8);
        }
    }
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
        weights[key] = first_score<Vector>(query, k, &task.rope->cos[turn], &task.rope->sin[turn], half);
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
    auto* out = static_cast<Element*>(task.out) + (pair * task.heads + head) * task.size;
    const size_t first = size_t(begin) * task.size;
    if (task.is_int8)
        mix_rows<Vector>(weights.data(), static_cast<const int8_t*>(task.x) + first, seen, task.size, share, out);
    else
        mix_rows<Vector>(weights.data(), static_cast<const Element*>(task.x) + first, seen, task.size, share, out);
}

}  // namespace
}  // namespace ettin
