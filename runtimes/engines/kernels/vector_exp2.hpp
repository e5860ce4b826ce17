// Powers of 2 for any vector width. Included after the vectors.
#pragma once

namespace ettin {
namespace {

constexpr float kLog2E = 1.44269504f;  // into the queries, so that exponentials are powers of 2

// 2^x; x is at most 0 or a little more. `kTerms` of a polynomial whose relative error is least over −½ … ½:
// 3 give 8e-5, 5 give 2e-7.
template <class Vector, int kTerms> typename Vector::Floats exp2(typename Vector::Floats x) {
    static_assert(kTerms == 3 || kTerms == 5);
    constexpr float kThree[] = {0.05517164f, 0.24261112f, 0.69326099f, 0.99992807f};
    constexpr float kFive[] = {0.00132764701f, 0.00967554189f, 0.0555071346f, 0.240221202f, 0.693146944f, 1.00000012f};
    const auto bounded = Vector::bounded(x);
    const auto whole = Vector::rounded(bounded);
    const auto rest = Vector::subtract(bounded, whole);
    const float* factors = kTerms == 3 ? kThree : kFive;
    auto sum = Vector::all(factors[0]);
    for (int term = 1; term <= kTerms; ++term) sum = Vector::multiply_add(sum, rest, Vector::all(factors[term]));
    return Vector::scaled(sum, whole);
}

}  // namespace
}  // namespace ettin
