#include "ragged_attention.hpp"
#include <algorithm>
#include <cmath>
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "vector_neon.hpp"
#include "products.hpp"
#include "vector_attention.hpp"

namespace ettin {
namespace {
// The product of unsigned with signed bytes came later (FEAT_I8MM) and is no faster.
struct DotNeon : VectorNeon {
    static constexpr uint8_t kQueryOffset = 0, kValueOffset = 128;

    static Words dot_scores(Words sums, Words left, Words right) {
        return vdotq_s32(sums, vreinterpretq_s8_s32(left), vreinterpretq_s8_s32(right));
    }
    static Words dot_values(Words sums, Words left, Words right) {
        return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sums), vreinterpretq_u8_s32(left),
                                               vreinterpretq_u8_s32(right)));
    }
};
}  // namespace
void attend_int8_neon(const RaggedAttention& task, int64_t begin, int64_t end, int64_t out_row, int head) {
    attend<DotNeon, Int8Products<DotNeon>, float>(task, begin, end, out_row, head);
}
}  // namespace ettin
