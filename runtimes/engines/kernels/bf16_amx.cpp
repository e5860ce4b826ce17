// bf16 on AMX. Products are summed, and the softmax is computed, in float32; queries, keys and weights are rounded to
// bf16.
#include "ragged_attention.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#define ETTIN_AVX512_BF16
#include "vector512.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
namespace {

constexpr int kHeadDim = 64;  // two tiles of 32 bf16
constexpr int kQueries = 32;  // of a block: two tiles
constexpr int kStep = 64;     // keys that are scored at a time: with the next, all scores stay in the first-level cache
constexpr int kKeys = 256;    // keys whose values are mixed at a time
constexpr int kTileBytes = 1024;
constexpr int kHalf = kHeadDim / 2;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What one head of one sequence needs, of one thread.
struct Scratch {
    // Keys as tiles [keys / 16][2 halves of d][16 pairs of d][16 keys], values [keys / 32][4 parts of d][16 pairs of
    // keys][16 of d]: what _tile_dpbf16ps wants of its second factor.
    uint8_t *keys, *values;
    struct alignas(64) Block {
        // Rows are an odd number of cache lines long: of a power of 2, all rows would fall into a few cache sets.
        uint16_t queries[kQueries][kHeadDim];
        float scores[2][kQueries][kStep + 16];  // of this step and of the next
        uint16_t weights[kQueries][kKeys + 32];
        float mixed[kQueries][kHeadDim + 16];
        float sums[kQueries][16];   // of weights, a part in each lane
        float reference[kQueries];  // what is subtracted from a row's scores
    }* block;

    explicit Scratch(int tokens) {
        thread_local std::vector<uint8_t> memory;
        const size_t packed = size_t(tokens) * kHeadDim * 2;
        const size_t needed = 2 * packed + sizeof(Block) + 64;
        if (memory.size() < needed) memory.resize(needed);
        keys = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        values = keys + packed;
        block = reinterpret_cast<Block*>(values + packed);
    }
};

// Tokens are handled 32 at a time: a tile of bf16 is as wide.
inline int whole_tiles(int tokens) { return (tokens + 31) / 32 * 32; }

inline __m512i narrowed(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// A row of one head, rotated and multiplied: its two halves, 32 bf16 each.
inline void rotated(const uint16_t* row, const RopeTable& rope, int position, float factor, __m512i halves[2]) {
    __m512 left[2], right[2];
    for (int part = 0; part < 2; ++part) {
        const __m512 by = _mm512_set1_ps(factor);
        const __m512 cos = _mm512_mul_ps(by, _mm512_loadu_ps(&rope.cos[size_t(position) * kHalf + 16 * part]));
        const __m512 sin = _mm512_mul_ps(by, _mm512_loadu_ps(&rope.sin[size_t(position) * kHalf + 16 * part]));
        const __m512 x = Vector512::load(row + 16 * part), y = Vector512::load(row + kHalf + 16 * part);
        left[part] = _mm512_fnmadd_ps(y, sin, _mm512_mul_ps(x, cos));
        right[part] = _mm512_fmadd_ps(x, sin, _mm512_mul_ps(y, cos));
    }
    halves[0] = narrowed(left[0], left[1]);
    halves[1] = narrowed(right[0], right[1]);
}

// `row` gives the elements of a head by the key's place in its sequence, and `scale` what they are multiplied by.
template <class Row, class Scale>
void pack_keys(const RopeTable& rope, Row row, Scale scale, int length, int padded, uint8_t* tiles) {
    for (int first = 0; first < padded; first += 16) {
        __m512i rows[2][16];
        for (int at = 0; at < 16; ++at) {
            __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (first + at < length) rotated(row(first + at), rope, first + at, scale(first + at), halves);
            rows[0][at] = halves[0];
            rows[1][at] = halves[1];
        }
        for (int half = 0; half < 2; ++half) {
            Vector512::transpose(rows[half]);
            uint8_t* tile = tiles + size_t(first / 16 * 2 + half) * kTileBytes;
            for (int at = 0; at < 16; ++at) _mm512_store_si512(tile + 64 * at, rows[half][at]);
        }
    }
}

// Two rows of values become rows of pairs.
template <class Row, class Scale>
void pack_values(Row row, Scale scale, bool has_scales, int length, int padded, uint8_t* tiles) {
    alignas(64) uint16_t order[2][32];
    for (int at = 0; at < 16; ++at)
        for (int part = 0; part < 2; ++part) {
            order[part][2 * at] = uint16_t(16 * part + at);
            order[part][2 * at + 1] = uint16_t(32 + 16 * part + at);
        }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int key = 0; key < padded; key += 2) {
        const auto loaded = [&](int at, int half) {
            if (at >= length) return _mm512_setzero_si512();
            const auto* values = row(at) + kHalf * half;
            if (!has_scales) return _mm512_loadu_si512(values);
            const __m512 by = _mm512_set1_ps(scale(at));
            const __m512 first = Vector512::load(values), second = Vector512::load(values + 16);
            return narrowed(_mm512_mul_ps(by, first), _mm512_mul_ps(by, second));
        };
        uint8_t* packed = tiles + size_t(key / 32) * 4 * kTileBytes + key % 32 / 2 * 64;
        for (int half = 0; half < 2; ++half) {
            const __m512i even = loaded(key, half), odd = loaded(key + 1, half);
            _mm512_store_si512(packed + 2 * half * kTileBytes, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(packed + (2 * half + 1) * kTileBytes, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

// Tiles 0 … 3 are sums of 32 × 32 results; 4 and 5 hold rows of the first factor, 6 and 7 of the second.
inline void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load_tiles(const float* sums, int stride_bytes) {
    const auto* lower = reinterpret_cast<const uint8_t*>(sums) + 16 * stride_bytes;
    _tile_loadd(0, sums, stride_bytes);
    _tile_loadd(1, sums + 16, stride_bytes);
    _tile_loadd(2, lower, stride_bytes);
    _tile_loadd(3, lower + 64, stride_bytes);
}

inline void store_tiles(float* sums, int stride_bytes) {
    auto* lower = reinterpret_cast<uint8_t*>(sums) + 16 * stride_bytes;
    _tile_stored(0, sums, stride_bytes);
    _tile_stored(1, sums + 16, stride_bytes);
    _tile_stored(2, lower, stride_bytes);
    _tile_stored(3, lower + 64, stride_bytes);
}

void score_step(const Scratch::Block& block, const uint8_t* keys, int count, float (*scores)[kStep + 16]) {
    for (int key = 0; key < count; key += 32) {
        const uint8_t* tile = keys + size_t(key / 16) * 2 * kTileBytes;
        zero_tiles();
        for (int half = 0; half < 2; ++half) {
            _tile_loadd(4, &block.queries[0][kHalf * half], sizeof block.queries[0]);
            _tile_loadd(5, &block.queries[16][kHalf * half], sizeof block.queries[0]);
            _tile_loadd(6, tile + half * kTileBytes, 64);
            _tile_loadd(7, tile + (2 + half) * kTileBytes, 64);
            multiply_tiles();
        }
        store_tiles(&scores[0][key], sizeof scores[0]);
    }
}

void mix_chunk(Scratch::Block& block, const uint8_t* values, int count, bool is_first) {
    for (int half = 0; half < 2; ++half) {
        if (is_first) zero_tiles();
        else load_tiles(&block.mixed[0][kHalf * half], sizeof block.mixed[0]);
        for (int key = 0; key < count; key += 32) {
            const uint8_t* tile = values + size_t(key / 32) * 4 * kTileBytes + 2 * half * kTileBytes;
            _tile_loadd(4, &block.weights[0][key], sizeof block.weights[0]);
            _tile_loadd(5, &block.weights[16][key], sizeof block.weights[0]);
            _tile_loadd(6, tile, 64);
            _tile_loadd(7, tile + kTileBytes, 64);
            multiply_tiles();
        }
        store_tiles(&block.mixed[0][kHalf * half], sizeof block.mixed[0]);
    }
}

// A row's reference grows: what was made with the old one shrinks.
__attribute__((noinline)) void raise_reference(Scratch::Block& block, int row, float to, int weights) {
    const float shrink = std::exp2(std::max(block.reference[row] - to, -200.0f));
    const __m512 by = _mm512_set1_ps(shrink);
    block.reference[row] = to;
    _mm512_storeu_ps(block.sums[row], _mm512_mul_ps(by, _mm512_loadu_ps(block.sums[row])));
    for (int at = 0; at < kHeadDim; at += 16)
        _mm512_storeu_ps(&block.mixed[row][at], _mm512_mul_ps(by, _mm512_loadu_ps(&block.mixed[row][at])));
    for (int at = 0; at < weights; at += 32) {
        const __m512 first = Vector512::load(&block.weights[row][at]), second = Vector512::load(&block.weights[row][at + 16]);
        _mm512_storeu_si512(&block.weights[row][at], narrowed(_mm512_mul_ps(by, first), _mm512_mul_ps(by, second)));
    }
}

// Scores of a row become weights 2^(score − reference). The reference is the largest of the row's first scores; it is
// raised only where a score exceeds it by more than kSlack: floating-point weights are as exact above 1 as below.
constexpr float kSlack = 16.0f;

inline void soften_row(Scratch::Block& block, const float* scores, int row, int at, int count, bool is_first) {
    __m512 highest = _mm512_loadu_ps(scores);
    for (int key = 16; key < count; key += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + key));
    if (is_first) {
        block.reference[row] = _mm512_reduce_max_ps(highest);
        _mm512_storeu_ps(block.sums[row], _mm512_setzero_ps());
    } else if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(block.reference[row] + kSlack), _CMP_GT_OQ)) {
        raise_reference(block, row, _mm512_reduce_max_ps(highest), at);
    }
    const __m512 reference = _mm512_set1_ps(block.reference[row]);
    __m512 sum = _mm512_loadu_ps(block.sums[row]);
    for (int key = 0; key < count; key += 32) {
        const __m512 first = exp2<Vector512, 3>(_mm512_sub_ps(_mm512_loadu_ps(scores + key), reference));
        const __m512 second = exp2<Vector512, 3>(_mm512_sub_ps(_mm512_loadu_ps(scores + key + 16), reference));
        sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
        _mm512_storeu_si512(&block.weights[row][at + key], narrowed(first, second));
    }
    _mm512_storeu_ps(block.sums[row], sum);
}

}  // namespace

void attend_bf16_amx(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    const int length = int(end - begin), queries = task.first_only ? 1 : length;
    const bool is_local = task.window >= 0;
    const size_t stride = size_t(task.heads) * kHeadDim, column = size_t(head) * kHeadDim;
    // The first token of a local layer sees the first tokens alone.
    const int visible = task.first_only && is_local ? std::min(length, task.window + 1) : length;
    const int packed = whole_tiles(visible);
    const Scratch scratch(packed);
    Scratch::Block& block = *scratch.block;
    const auto row_of = [&](const void* tensor, int64_t token) {
        return static_cast<const uint16_t*>(tensor) + task.row_of(token) * stride + column;
    };
    const auto key_row = [&](int key) { return row_of(task.k, begin + key); };
    const auto value_row = [&](int key) { return row_of(task.v, begin + key); };
    const auto scale = [&](int key) { return scale_at<uint16_t>(task.scales, size_t(begin + key)); };
    pack_keys(*task.rope, key_row, scale, visible, packed, scratch.keys);
    pack_values(value_row, scale, task.scales != nullptr, visible, packed, scratch.values);

    const TileConfig config;
    _tile_loadconfig(&config);
    for (int first = 0; first < queries; first += kQueries) {
        const int rows = std::min(kQueries, queries - first);
        for (int row = 0; row < kQueries; ++row) {
            __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (row < rows)
                rotated(row_of(task.q, out_row + first + row), *task.rope, first + row,
                        task.first_only ? kLog2E : kLog2E * scale(first + row), halves);
            for (int half = 0; half < 2; ++half) _mm512_storeu_si512(&block.queries[row][kHalf * half], halves[half]);
        }
        const int from = is_local ? std::max(0, first - task.window) / 32 * 32 : 0;
        const int to = is_local ? std::min(visible, first + rows + task.window) : visible;
        const int stop = whole_tiles(to);
        const auto score = [&](int at) {
            const uint8_t* keys = scratch.keys + size_t(at / 16) * 2 * kTileBytes;
            if (at < stop) score_step(block, keys, std::min(kStep, stop - at), block.scores[(at - from) / kStep % 2]);
        };
        score(from);
        for (int at = from; at < stop; at += kStep) {
            score(at + kStep);  // the tiles' work goes on while these scores become weights
            auto& scores = block.scores[(at - from) / kStep % 2];
            const int keys = std::min(kStep, stop - at), place = (at - from) % kKeys;
            for (int row = 0; row < rows; ++row) {
                const int low = is_local ? first + row - task.window - at : 0;
                const int high = (is_local ? std::min(length, first + row + task.window + 1) : length) - at;
                if (low > 0 || high < keys) mask<Vector512>(scores[row], keys, low, high);
                soften_row(block, scores[row], row, place, keys, at == from);
            }
            if (place + keys == kKeys || at + keys == stop) {
                const int start = at - place;
                const uint8_t* values = scratch.values + size_t(start / 32) * 4 * kTileBytes;
                mix_chunk(block, values, place + keys, start == from);
            }
        }
        for (int row = 0; row < rows; ++row) {
            uint16_t* out = static_cast<uint16_t*>(task.out) + (out_row + first + row) * stride + column;
            const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(block.sums[row]));
            const __m512 share = _mm512_set1_ps(1.0f / sum);
            for (int at = 0; at < kHeadDim; at += 32) {
                const __m512 low = _mm512_mul_ps(share, _mm512_loadu_ps(&block.mixed[row][at]));
                const __m512 high = _mm512_mul_ps(share, _mm512_loadu_ps(&block.mixed[row][at + 16]));
                _mm512_storeu_si512(out + at, narrowed(low, high));
            }
        }
    }
    _tile_release();
}

}  // namespace ettin
