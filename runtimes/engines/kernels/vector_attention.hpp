// Attention over sequences laid end to end, for any vector width and any kind of products. Included after the pragma
// that switches instructions on, and after the vectors and `products.hpp`.
//
// A block of queries meets its keys a chunk at a time. Scores of a chunk become weights relative to the chunk's largest
// score, and what the chunk adds up to is scaled when it joins the block's result. So weights of 8 bits have the full
// range in each chunk, and no score is too large.
//
// `Products` multiplies groups of kGroup elements that fill 32 bits: one word of the first factor, repeated, with a
// vector of words of the second.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "elements.hpp"
#include "ragged_attention.hpp"
#include "vector_exp2.hpp"

#ifdef __aarch64__
#define ETTIN_REGISTER "+w"
#else
#define ETTIN_REGISTER "+v"
#endif

namespace ettin {
namespace {

// f(0) … f(kCount − 1), each number a constant: GCC keeps an array in registers only if it never sees a variable index.
template <class Function, int... kNumbers>
[[gnu::always_inline]] inline void repeat(Function&& f, std::integer_sequence<int, kNumbers...>) {
    (f(std::integral_constant<int, kNumbers>()), ...);
}
template <int kCount, class Function> [[gnu::always_inline]] inline void repeat(Function&& f) {
    repeat(f, std::make_integer_sequence<int, kCount>());
}

constexpr float kHidden = -1e30f;

// Hides the scores of a row outside of from … to − 1.
template <class Vector> void mask(float* scores, int count, int from, int to) {
    for (int at = 0; at < count; at += Vector::kLanes)
        if (at < from || at + Vector::kLanes > to)
            Vector::store(scores + at, Vector::within(Vector::load(scores + at), Vector::all(kHidden), at, from, to));
}

template <class Vector, class Products, class Element, int kDim> class Attention {
    using Floats = typename Vector::Floats;
    using Words = typename Vector::Words;
    using Sums = typename Products::Sums;

    static constexpr int kLanes = Vector::kLanes, kGroup = Products::kGroup;
    static constexpr int kRowVectors = kDim / kLanes, kRowWords = kDim / kGroup;
    static constexpr int kQueries = 24;  // of a block: a multiple of both products' rows
    static constexpr int kPadded = (kQueries + kLanes - 1) / kLanes * kLanes;
    static constexpr int kKeys = 16;     // keys are handled this many at a time, or a multiple
    static constexpr int kChunk = 192;   // keys of a chunk, at most
    static constexpr int kScoreRows = Vector::kScoreRows, kScoreVectors = Vector::kScoreVectors;
    static constexpr int kMixRows = Vector::kMixRows;
    static constexpr int kMixVectors = std::min(Vector::kMixVectors, kRowVectors);
    static constexpr int kTerms = Products::kIsExact ? 5 : 3;
    static constexpr int kStagedWords = std::max(kRowWords, kLanes);
    static constexpr int kWeightWords = kChunk / kGroup + 16;  // of a row; of floats an odd number of cache lines

    struct alignas(64) Block {
        uint32_t queries[kQueries][kRowWords];
        float query_scales[kQueries];
        float scores[kQueries][kChunk + 16];
        uint32_t weights[kQueries][kWeightWords];
        float mixed[kQueries][kDim + 16];
        // Of each row: its largest score and its sum of weights, until now and in this chunk; and what scales both.
        float largest[kPadded], sums[kPadded], chunk_largest[kPadded], chunk_sums[kPadded];
        float keep[kPadded], take[kPadded];
        uint32_t staged[kKeys][kStagedWords];
        float value_scales[kDim], value_centres[kDim], key_centres[kDim];
    };

    const RaggedAttention& task_;
    const RopeTable& rope_;
    size_t stride_, column_;
    int length_, visible_, padded_;
    Block* block_;
    // Keys [keys / 16][words of a row][16 keys], values [keys / kGroup][kDim], and of each key its scale and the sum
    // that its products begin with.
    uint32_t *keys_, *values_;
    float* key_scales_;
    int32_t* key_sums_;

    template <class T> static T* taken(uint8_t*& from, size_t count) {
        T* result = reinterpret_cast<T*>(from);
        from += (count * sizeof(T) + 63) / 64 * 64;
        return result;
    }

    static int whole(int keys) { return (keys + kKeys - 1) / kKeys * kKeys; }

    void allocate() {
        thread_local std::vector<uint8_t> memory;
        const size_t words = size_t(padded_) * kRowWords, keys = size_t(padded_);
        const size_t needed = sizeof(Block) + 2 * 4 * words + 8 * keys + 6 * 64;
        if (memory.size() < needed) memory.resize(needed);
        auto* at = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        block_ = taken<Block>(at, 1);
        keys_ = taken<uint32_t>(at, words);
        values_ = taken<uint32_t>(at, words);
        key_scales_ = taken<float>(at, keys);
        key_sums_ = taken<int32_t>(at, keys);
    }

    const Element* row_of(const void* tensor, int64_t token) const {
        return static_cast<const Element*>(tensor) + task_.row_of(token) * stride_ + column_;
    }

    float scale_of(int64_t token) const { return scale_at<Element>(task_.scales, size_t(token)); }

    // A row of one head, rotated for its position and multiplied.
    void rotate(const Element* row, int position, float factor, Floats turned[kRowVectors]) const {
        constexpr int kHalf = kDim / 2;
        const float *cos = &rope_.cos[size_t(position) * kHalf], *sin = &rope_.sin[size_t(position) * kHalf];
        for (int at = 0; at < kHalf; at += kLanes) {
            const Floats by = Vector::all(factor);
            const Floats c = Vector::multiply(by, Vector::load(cos + at));
            const Floats s = Vector::multiply(by, Vector::load(sin + at));
            const Floats x = Vector::load(row + at), y = Vector::load(row + kHalf + at);
            turned[at / kLanes] = Vector::subtract_product(Vector::multiply(x, c), y, s);
            turned[(at + kHalf) / kLanes] = Vector::multiply_add(x, s, Vector::multiply(y, c));
        }
    }

    // The middle between least and largest of each dimension, over every `stride`-th of `length` rows, and half of what
    // lies between. A dimension with NaN has the scale NaN.
    template <class Row> static void range_of(int length, int stride, Row row, float centres[kDim], float* halves) {
        Floats low[kRowVectors], high[kRowVectors], nothing[kRowVectors];
        row(0, low);
        for (int at = 0; at < kRowVectors; ++at) {
            high[at] = low[at];
            nothing[at] = Vector::multiply(low[at], Vector::all(0.0f));
        }
        for (int index = stride; index < length; index += stride) {
            Floats x[kRowVectors];
            row(index, x);
            for (int at = 0; at < kRowVectors; ++at) {
                low[at] = Vector::smaller(low[at], x[at]);
                high[at] = Vector::larger(high[at], x[at]);
                nothing[at] = Vector::multiply_add(x[at], Vector::all(0.0f), nothing[at]);
            }
        }
        for (int at = 0; at < kRowVectors; ++at) {
            const Floats half = Vector::all(0.5f);
            const Floats sum = Vector::add(high[at], low[at]), apart = Vector::subtract(high[at], low[at]);
            Vector::store(centres + at * kLanes, Vector::multiply(half, sum));
            if (halves) Vector::store(halves + at * kLanes, Vector::multiply_add(half, apart, nothing[at]));
        }
    }

    void pack_keys(int64_t begin) {
        const auto row = [&](int key, Floats* turned) {
            rotate(row_of(task_.k, begin + key), key, scale_of(begin + key), turned);
        };
        // The same vector taken from all keys adds the same to all scores of a query, which the softmax ignores.
        // So the middle need not be exact: every fourth key is enough.
        if constexpr (!Products::kIsFloating) range_of(visible_, 4, row, block_->key_centres, nullptr);
        for (int first = 0; first < padded_; first += kKeys) {
            for (int key = first; key < first + kKeys; ++key) {
                Floats turned[kRowVectors];
                if (key < visible_) {
                    row(key, turned);
                    if constexpr (!Products::kIsFloating)
                        for (int at = 0; at < kRowVectors; ++at)
                            turned[at] = Vector::subtract(turned[at], Vector::load(block_->key_centres + at * kLanes));
                } else {
                    for (auto& part : turned) part = Vector::all(0.0f);
                }
                key_scales_[key] = Products::template encode<kDim, true>(turned, block_->staged[key - first]);
            }
            uint32_t* words = keys_ + size_t(first) * kRowWords;
            for (int key = 0; key < kKeys; key += kLanes)
                for (int word = 0; word < kRowWords; word += kLanes) {
                    Words tile[kLanes];
                    for (int at = 0; at < kLanes; ++at) tile[at] = Vector::load_words(&block_->staged[key + at][word]);
                    Vector::transpose(tile);
                    for (int at = 0; at < std::min(kLanes, kRowWords); ++at)
                        Vector::store_words(words + size_t(word + at) * kKeys + key, tile[at]);
                }
            if constexpr (Products::kQueryOffset != 0)
                for (int key = 0; key < kKeys; key += kLanes) {
                    Words sum = Vector::all_words(0);
                    for (int word = 0; word < kRowWords; ++word)
                        sum = Products::template step<false>(sum, Vector::all_words(0x80808080),
                                                             Vector::load_words(words + size_t(word) * kKeys + key));
                    Vector::store_words(key_sums_ + first + key, Products::negative(sum));
                }
        }
    }

    void pack_values(int64_t begin) {
        const auto row = [&](int key, Floats* x) {
            const Element* values = row_of(task_.v, begin + key);
            const Floats by = Vector::all(scale_of(begin + key));
            for (int at = 0; at < kRowVectors; ++at) x[at] = Vector::multiply(by, Vector::load(values + at * kLanes));
        };
        Floats centres[kRowVectors], shares[kRowVectors];
        if constexpr (!Products::kIsFloating) {
            range_of(visible_, 1, row, block_->value_centres, block_->value_scales);
            for (int at = 0; at < kRowVectors; ++at) {
                const Floats half = Vector::load(block_->value_scales + at * kLanes);
                centres[at] = Vector::load(block_->value_centres + at * kLanes);
                // Never infinite: of equal values nothing is left that a share could multiply.
                shares[at] = Vector::divide(Vector::all(127.0f), Vector::larger(Vector::all(1e-30f), half));
                const Floats scale = Vector::multiply(half, Vector::all(1.0f / 127.0f));
                Vector::store(block_->value_scales + at * kLanes, scale);
                if constexpr (Products::kValueOffset != 0)
                    Vector::store(block_->value_centres + at * kLanes,
                                  Vector::subtract_product(centres[at], Vector::all(Products::kValueOffset), scale));
            }
        }
        for (int key = 0; key < padded_; key += kGroup) {
            Floats x[kGroup][kRowVectors];
            for (int at = 0; at < kGroup; ++at)
                if (key + at < visible_) {
                    row(key + at, x[at]);
                    if constexpr (!Products::kIsFloating)
                        for (int part = 0; part < kRowVectors; ++part)
                            x[at][part] = Vector::multiply(Vector::subtract(x[at][part], centres[part]), shares[part]);
                } else {
                    for (auto& part : x[at]) part = Vector::all(0.0f);
                }
            uint32_t* words = values_ + size_t(key / kGroup) * kDim;
            for (int part = 0; part < kRowVectors; ++part) {
                Floats group[kGroup];
                for (int at = 0; at < kGroup; ++at) group[at] = x[at][part];
                Vector::store_words(words + part * kLanes, Products::joined(group));
            }
        }
    }

    void pack_queries(int64_t row, int position, int rows) {
        for (int at = 0; at < kQueries; ++at) {
            Floats turned[kRowVectors];
            if (at < rows) {
                const float scale = task_.first_only ? 1.0f : scale_of(row + at);
                const float factor = Products::kIsFloating ? kLog2E * scale : scale;
                rotate(row_of(task_.q, row + at), position + at, factor, turned);
            } else {
                for (auto& part : turned) part = Vector::all(0.0f);
            }
            block_->query_scales[at] = kLog2E * Products::template encode<kDim, false>(turned, block_->queries[at]);
        }
    }

    // kRows × kVectors of a product, of `groups` groups: `rows` and `columns` are its factors.
    template <int kRows, int kVectors, bool kOfValues> struct Tile {
        Sums sums[kRows * kVectors];

        // `vector_words` lie between the vectors of a group of columns, `column_words` between groups.
        [[gnu::always_inline]] void multiply(const uint32_t* rows, size_t row_words, const uint32_t* columns,
                                             size_t vector_words, size_t column_words, int groups) {
            Sums local[kRows * kVectors];
            repeat<kRows * kVectors>([&](auto n) __attribute__((always_inline)) { local[n] = sums[n]; });
            for (int group = 0; group < groups; ++group) {
                Words right[kVectors];
                repeat<kVectors>([&](auto n) __attribute__((always_inline)) {
                    right[n] = Vector::load_words(columns + size_t(group) * column_words + n * vector_words);
                });
                repeat<kRows>([&](auto row) __attribute__((always_inline)) {
                    const Words left = Vector::all_words(rows[row * row_words + group]);
                    repeat<kVectors>([&](auto n) __attribute__((always_inline)) {
                        Sums& sum = local[row * kVectors + n];
                        sum = Products::template step<kOfValues>(sum, left, right[n]);
                        asm("" : ETTIN_REGISTER(sum));  // without it, GCC 12 copies every sum, and keeps most of them in memory
                    });
                });
            }
            repeat<kRows * kVectors>([&](auto n) __attribute__((always_inline)) { sums[n] = local[n]; });
        }
    };

    // Scores of `rows` queries with kVectors vectors of keys; `key`: of the chunk that begins at `from`.
    template <int kVectors> void score_keys(int from, int key, int rows) {
        const int index = from + key;
        const uint32_t* columns = keys_ + size_t(index / kKeys) * kKeys * kRowWords + index % kKeys;
        for (int row = 0; row < rows; row += kScoreRows) {
            Tile<kScoreRows, kVectors, false> tile;
            repeat<kScoreRows * kVectors>([&](auto n) __attribute__((always_inline)) {
                tile.sums[n] = Products::start(key_sums_ + index + n % kVectors * kLanes);
            });
            tile.multiply(block_->queries[row], kRowWords, columns, kLanes < kKeys ? kLanes : kKeys * kRowWords, kKeys,
                          kRowWords);
            repeat<kScoreRows * kVectors>([&](auto n) __attribute__((always_inline)) {
                constexpr int kRow = n / kVectors, kAt = n % kVectors * kLanes;
                Floats scores = Products::floats(tile.sums[n]);
                if constexpr (!Products::kIsFloating)
                    scores = Vector::multiply(scores, Vector::load(key_scales_ + index + kAt));
                Vector::store(&block_->scores[row + kRow][key + kAt], scores);
            });
        }
    }

    void score(int from, int count, int rows) {
        constexpr int kWidth = kLanes * kScoreVectors;
        int key = 0;
        for (; key + kWidth <= count; key += kWidth) score_keys<kScoreVectors>(from, key, rows);
        if constexpr (kWidth > kKeys)
            if (key < count) score_keys<kKeys / kLanes>(from, key, rows);
    }

    // Scores of a row become weights.
    void soften(int row, int count) {
        const float* scores = block_->scores[row];
        auto* weights = reinterpret_cast<uint8_t*>(block_->weights[row]);
        // Two at a time, so that one need not wait for the other.
        const auto each = [count](auto&& body) __attribute__((always_inline)) {
            int at = 0;
            for (; at + 2 * kLanes <= count; at += 2 * kLanes) body(at, 0), body(at + kLanes, 1);
            if (at < count) body(at, 0);
        };
        Floats highest[2] = {Vector::load(scores), Vector::load(scores)};
        each([&](int key, int part) __attribute__((always_inline)) {
            highest[part] = Vector::larger(highest[part], Vector::load(scores + key));
        });
        const float largest = Vector::largest(Vector::larger(highest[0], highest[1]));
        const Floats reference = Vector::all(largest), scale = Vector::all(block_->query_scales[row]);
        Floats sums[2] = {Vector::all(0.0f), Vector::all(0.0f)};
        each([&](int key, int part) __attribute__((always_inline)) {
            Floats below = Vector::subtract(Vector::load(scores + key), reference);
            if constexpr (!Products::kIsFloating)
                below = Vector::multiply_add(below, scale, Vector::all(Products::kLogRange));
            const Floats x = exp2<Vector, kTerms>(below);
            sums[part] = Vector::add(sums[part], Products::store_weights(x, weights + key * 4 / kGroup));
        });
        block_->chunk_largest[row] = Products::kIsFloating ? largest : largest * block_->query_scales[row];
        block_->chunk_sums[row] = Vector::sum(Vector::add(sums[0], sums[1]));
    }

    // How much of the result until now is kept, and how much of the chunk is taken.
    void rescale() {
        for (int at = 0; at < kQueries; at += kLanes) {
            const Floats before = Vector::load(block_->largest + at), now = Vector::load(block_->chunk_largest + at);
            const Floats largest = Vector::larger(before, now);
            const Floats keep = exp2<Vector, 5>(Vector::subtract(before, largest));
            const Floats take = exp2<Vector, 5>(Vector::subtract(now, largest));
            Vector::store(block_->largest + at, largest);
            Vector::store(block_->keep + at, keep);
            Vector::store(block_->take + at, take);
            const Floats kept = Vector::multiply(keep, Vector::load(block_->sums + at));
            Vector::store(block_->sums + at, Vector::multiply_add(take, Vector::load(block_->chunk_sums + at), kept));
        }
    }

    void mix(int from, int count, int rows) {
        for (int row = 0; row < rows; row += kMixRows)
            for (int part = 0; part < kRowVectors; part += kMixVectors) {
                Tile<kMixRows, kMixVectors, true> tile;
                repeat<kMixRows * kMixVectors>([&](auto n) __attribute__((always_inline)) {
                    tile.sums[n] = Products::zero();
                });
                const uint32_t* columns = values_ + size_t(from / kGroup) * kDim + part * kLanes;
                tile.multiply(block_->weights[row], kWeightWords, columns, kLanes, kDim, count / kGroup);
                repeat<kMixRows * kMixVectors>([&](auto n) __attribute__((always_inline)) {
                    const int of = row + n / kMixVectors;
                    float* mixed = &block_->mixed[of][(part + n % kMixVectors) * kLanes];
                    const Floats kept = Vector::multiply(Vector::all(block_->keep[of]), Vector::load(mixed));
                    const Floats taken = Vector::all(block_->take[of]);
                    Vector::store(mixed, Vector::multiply_add(taken, Products::floats(tile.sums[n]), kept));
                });
            }
    }

    void write(int64_t first_row, int rows) const {
        for (int row = 0; row < rows; ++row) {
            const size_t place = size_t(first_row + row) * stride_ + column_;
            auto *out = static_cast<Element*>(task_.out) + place;
            auto *bytes = static_cast<uint8_t*>(task_.out) + place;
            const Floats by = Vector::all(1.0f / task_.step);
            const Floats share = Vector::all(1.0f / block_->sums[row]);
            for (int at = 0; at < kDim; at += kLanes) {
                Floats mixed = Vector::multiply(share, Vector::load(&block_->mixed[row][at]));
                if constexpr (!Products::kIsFloating)
                    mixed = Vector::multiply_add(mixed, Vector::load(block_->value_scales + at),
                                                 Vector::load(block_->value_centres + at));
                if (task_.step == 0)
                    Vector::store(out + at, mixed);
                else
                    Vector::store_int8(bytes + at, Vector::multiply(mixed, by));
            }
        }
    }

public:
    Attention(const RaggedAttention& task, int64_t begin, int64_t end, int head)
        : task_(task), rope_(*task.rope), stride_(size_t(task.heads) * kDim), column_(size_t(head) * kDim),
          length_(int(end - begin)),
          // The first token of a local layer sees the first tokens alone.
          visible_(task.first_only && task.window >= 0 ? std::min(length_, task.window + 1) : length_),
          padded_(whole(visible_)) {
        allocate();
        pack_keys(begin);
        pack_values(begin);
    }

    void run(int64_t out_row) {
        const int queries = task_.first_only ? 1 : length_;
        const bool is_local = task_.window >= 0;
        for (int first = 0; first < queries; first += kQueries) {
            const int rows = std::min(kQueries, queries - first);
            const int score_rows = (rows + kScoreRows - 1) / kScoreRows * kScoreRows;
            const int mix_rows = (rows + kMixRows - 1) / kMixRows * kMixRows;
            pack_queries(out_row + first, first, rows);
            std::fill_n(block_->largest, kPadded, kHidden);
            std::fill_n(block_->chunk_largest, kPadded, kHidden);
            std::fill_n(block_->sums, kPadded, 0.0f);
            std::fill_n(block_->chunk_sums, kPadded, 1.0f);
            std::fill_n(&block_->mixed[0][0], sizeof block_->mixed / sizeof(float), 0.0f);
            const int from = is_local ? std::max(0, first - task_.window) / kKeys * kKeys : 0;
            const int to = whole(is_local ? std::min(visible_, first + rows + task_.window) : visible_);
            const int chunks = (to - from + kChunk - 1) / kChunk;
            const int step = whole((to - from + chunks - 1) / chunks);
            for (int key = from; key < to; key += step) {
                const int count = std::min(step, to - key);
                score(key, count, score_rows);
                for (int row = 0; row < rows; ++row) {
                    const int low = is_local ? first + row - task_.window - key : 0;
                    const int high = (is_local ? std::min(length_, first + row + task_.window + 1) : length_) - key;
                    if (low > 0 || high < count) mask<Vector>(block_->scores[row], count, low, high);
                    soften(row, count);
                }
                rescale();
                mix(key, count, mix_rows);
            }
            write(out_row + first, rows);
        }
    }
};

template <class Vector, class Products, class Element>
void attend(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    if (task.head_dim == 64)
        Attention<Vector, Products, Element, 64>(task, begin, end, head).run(out_row);
    else
        Attention<Vector, Products, Element, 32>(task, begin, end, head).run(out_row);
}

}  // namespace
}  // namespace ettin
