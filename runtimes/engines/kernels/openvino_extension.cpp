// The kernels as OpenVINO operations; see `ragged_attention.hpp` and `rows.hpp`.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/core/version.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <utility>

#include "ragged_attention.hpp"
#include "rows.hpp"

namespace {

// Tables are shared by all layers of a θ and grow with the longest sequence seen.
std::shared_ptr<const ettin::RopeTable> rope_table(float theta, int head_dim, int rows) {
    static std::mutex guard;
    static std::map<std::pair<float, int>, std::shared_ptr<const ettin::RopeTable>> tables;
    const std::lock_guard<std::mutex> lock(guard);
    auto& table = tables[{theta, head_dim}];
    if (!table || table->rows < rows)
        table = std::make_shared<ettin::RopeTable>(theta, head_dim, (rows + 511) / 512 * 512);
    return table;
}

// OpenVINO's CPU plugin hands int64 inputs over as int32.
std::vector<int64_t> values_of(const ov::Tensor& tensor) {
    if (tensor.get_element_type() == ov::element::i32)
        return {tensor.data<int32_t>(), tensor.data<int32_t>() + tensor.get_size()};
    return {tensor.data<int64_t>(), tensor.data<int64_t>() + tensor.get_size()};
}

// Where each sequence begins and the last ends. A graph comes from an artifact: nothing outside of the tokens is read.
std::vector<int64_t> bounds_of(const ov::Tensor& tensor, size_t tokens, const char* operation) {
    auto bounds = values_of(tensor);
    OPENVINO_ASSERT(!bounds.empty() && bounds.front() >= 0 && std::is_sorted(bounds.begin(), bounds.end()) &&
                        size_t(bounds.back()) <= tokens,
                    operation, ": cu_seqlens must not decrease and must end within ", tokens, " tokens");
    return bounds;
}

// Scales, if there is such an input: one for each row, of the elements of what they multiply. Else nullptr.
const void* scales_in(const ov::TensorVector& inputs, size_t at, size_t rows, const char* operation) {
    if (inputs.size() <= at) return nullptr;
    const auto& scales = inputs[at];
    OPENVINO_ASSERT(scales.get_element_type() == inputs[0].get_element_type() && scales.get_size() == rows, operation,
                    ": ", rows, " scales are expected, found ", scales.get_shape());
    return scales.data();
}

// Inputs: queries, keys, values, float32 or bf16 [1, tokens, heads · head_dim]; cu_seqlens [pairs + 1], where each
// sequence begins and the last ends. Tokens after that belong to none: their result is 0. Queries are [1, pairs, …]
// with `first_only`. What the runtime chooses for its processor: `variant` names how it is computed, and with a `step`
// the result is int8. A fifth input of integers [tokens] has the row of each token: queries, keys and values are tables
// then, [rows, heads · head_dim]. A fifth input of floats [1, tokens, 1] has the scales that keys, values and, but with
// `first_only`, queries are multiplied by.
class RaggedAttention : public ov::op::Op {
public:
    OPENVINO_OP("RaggedAttention", "ettin");

    RaggedAttention() = default;
    explicit RaggedAttention(const ov::OutputVector& inputs) : Op(inputs) {}

    void validate_and_infer_types() override {
        OPENVINO_ASSERT(get_input_size() == 4 || get_input_size() == 5,
                        "RaggedAttention takes queries, keys, values, cu_seqlens and perhaps rows or scales");
        const bool has_tables = get_input_size() == 5 && get_input_element_type(4).is_integral_number();
        OPENVINO_ASSERT(!has_tables || !m_first_only, "RaggedAttention of first tokens takes no tables");
        auto shape = get_input_partial_shape(0);
        if (has_tables) shape = {1, get_input_partial_shape(4)[0], shape[1]};
        set_output_type(0, m_step == 0 ? get_input_element_type(0) : ov::element::i8, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<RaggedAttention>(inputs);
        clone->m_heads = m_heads;
        clone->m_window = m_window;
        clone->m_theta = m_theta;
        clone->m_first_only = m_first_only;
        clone->m_variant = m_variant;
        clone->m_step = m_step;
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("heads", m_heads);
        visitor.on_attribute("window", m_window);
        visitor.on_attribute("theta", m_theta);
        visitor.on_attribute("first_only", m_first_only);
        visitor.on_attribute("variant", m_variant);
        visitor.on_attribute("step", m_step);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ettin::Variant* variant = ettin::variant_named(m_variant.c_str());
        OPENVINO_ASSERT(variant && variant->can_run(), "RaggedAttention: '", m_variant, "' can't run here");
        const auto type = inputs[0].get_element_type();
        for (int at = 0; at < 3; ++at)
            OPENVINO_ASSERT(inputs[at].get_element_type() == type, "RaggedAttention takes one element type");
        const bool has_tables = inputs.size() == 5 && inputs[4].get_element_type().is_integral_number();
        const auto rows = has_tables ? values_of(inputs[4]) : std::vector<int64_t>();
        const auto of_q = inputs[0].get_shape(), of_k = inputs[1].get_shape();
        OPENVINO_ASSERT(of_k.size() == (has_tables ? 2 : 3) && of_k == inputs[2].get_shape(),
                        "RaggedAttention takes as many values as keys");
        OPENVINO_ASSERT(of_q.size() == of_k.size() && (has_tables || of_k[0] == 1), "RaggedAttention: keys are ", of_k);
        const size_t size = of_q.back();
        const auto bounds = bounds_of(inputs[3], has_tables ? rows.size() : of_k[1], "RaggedAttention");
        const size_t pairs = bounds.size() - 1;
        OPENVINO_ASSERT(of_q == (m_first_only ? ov::Shape{1, pairs, size} : of_k) && of_k.back() == size,
                        "RaggedAttention: queries are ", of_q, ", keys ", of_k);
        for (const int64_t row : rows)
            OPENVINO_ASSERT(row >= 0 && size_t(row) < of_k[0], "RaggedAttention: there is no row ", row);
        const void* scales = has_tables ? nullptr : scales_in(inputs, 4, of_k[1], "RaggedAttention");
        OPENVINO_ASSERT(m_heads > 0 && size % m_heads == 0, "RaggedAttention: rows of ", size, " are not those of ",
                        m_heads, " heads");
        outputs[0].set_shape(has_tables ? ov::Shape{1, rows.size(), size} : of_q);
        const int head_dim = int(size / m_heads);
        const auto rope = rope_table(m_theta, head_dim, int(ettin::longest_sequence(bounds.data(), pairs)));
        const bool is_bf16 = type == ov::element::bf16;
        const ettin::RaggedAttention task{inputs[0].data(), inputs[1].data(), inputs[2].data(),
                                          has_tables ? rows.data() : nullptr, scales, outputs[0].data(), is_bf16, m_step,
                                          rope.get(), int(m_heads), head_dim, int(m_window), m_first_only};
        OPENVINO_ASSERT((is_bf16 || type == ov::element::f32) && variant->takes(task), "RaggedAttention: '",
                        m_variant, "' does not take ", type, " in heads of ", head_dim);
        ov::parallel_for(pairs * m_heads,
                         [&](size_t part) { ettin::attend_part(*variant, task, bounds.data(), part); });
        if (!m_first_only) {
            const size_t row_bytes = size * outputs[0].get_element_type().size();
            auto* out = static_cast<uint8_t*>(outputs[0].data());
            std::fill(out + bounds.back() * row_bytes, out + outputs[0].get_byte_size(), uint8_t(0));
        }
        return true;
    }

private:
    int64_t m_heads = 1, m_window = -1;
    float m_theta = 0, m_step = 0;
    bool m_first_only = false;
    std::string m_variant = "bf16_amx";
};

// What the runtime chooses of the operations on rows: `kernels` names how it is computed, and with `rounds` the result
// is int8, and the last output has the scales of its rows [1, tokens, 1].
class RowOperation : public ov::op::Op {
public:
    RowOperation() = default;
    explicit RowOperation(const ov::OutputVector& inputs) : Op(inputs) {}

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("eps", m_eps);
        visitor.on_attribute("rounds", m_rounds);
        visitor.on_attribute("kernels", m_kernels);
        return true;
    }

    bool has_evaluate() const override { return true; }

protected:
    // `scales_at`: the output that scales are.
    void set_result(ov::PartialShape shape, size_t scales_at) {
        set_output_type(0, m_rounds ? ov::element::i8 : get_input_element_type(0), shape);
        shape[shape.size() - 1] = 1;
        if (m_rounds) set_output_type(scales_at, get_input_element_type(0), shape);
    }

    void* scales_of(ov::TensorVector& outputs, ov::Shape shape) const {
        if (!m_rounds) return nullptr;
        shape.back() = 1;
        outputs.back().set_shape(shape);
        return outputs.back().data();
    }

    std::shared_ptr<ov::Node> as_this(std::shared_ptr<RowOperation> clone) const {
        clone->m_eps = m_eps;
        clone->m_rounds = m_rounds;
        clone->m_kernels = m_kernels;
        clone->constructor_validate_and_infer_types();
        return clone;
    }

    // Also when a graph is made: OpenVINO 2026.4.1 hides what goes wrong in a call on one thread.
    const ettin::RowKernels& kernels(const ov::element::Type& type, int64_t size) const {
        const ettin::RowKernels* kernels = ettin::row_kernels_named(m_kernels.c_str());
        OPENVINO_ASSERT(kernels && kernels->can_run() && (type == ov::element::bf16 || type == ov::element::f32) &&
                            kernels->takes(type == ov::element::bf16, int(size)),
                        get_type_name(), ": '", m_kernels, "' can't run here, or not on ", type, " in rows of ", size);
        return *kernels;
    }

    template <class Task> static void run(void (*function)(const Task&, size_t, size_t), const Task& task, size_t rows) {
        ov::parallel_for((rows + kRows - 1) / kRows, [&](size_t part) {
            function(task, part * kRows, std::min(rows, (part + 1) * kRows));
        });
    }

    static constexpr size_t kRows = 64;  // that a thread takes at a time
    float m_eps = 0;
    bool m_rounds = false;
    std::string m_kernels;
};

// Inputs: x and what is added to it, float32 or bf16 [1, tokens, size], and perhaps the scales of the latter
// [1, tokens, 1]. Outputs: the layer norm of their sum, the sum, and perhaps the scales of the norm.
class AddedNorm : public RowOperation {
public:
    OPENVINO_OP("AddedNorm", "ettin", RowOperation);
    using RowOperation::RowOperation;

    void validate_and_infer_types() override {
        const auto type = get_input_element_type(0);
        const auto shape = get_input_partial_shape(0);
        OPENVINO_ASSERT((get_input_size() == 2 || get_input_size() == 3) && type == get_input_element_type(1) &&
                            shape.compatible(get_input_partial_shape(1)),
                        "AddedNorm takes x, as much to add to it, and perhaps scales");
        kernels(type, shape[shape.size() - 1].get_length());
        set_output_type(1, type, shape);
        set_result(shape, 2);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return as_this(std::make_shared<AddedNorm>(inputs));
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto shape = inputs[0].get_shape();
        OPENVINO_ASSERT(shape == inputs[1].get_shape(), "AddedNorm adds ", inputs[1].get_shape(), " to ", shape);
        const auto type = inputs[0].get_element_type();
        const size_t size = shape.back(), rows = inputs[0].get_size() / size;
        const void* scales = scales_in(inputs, 2, rows, "AddedNorm");
        for (int at = 0; at < 2; ++at) outputs[at].set_shape(shape);
        const ettin::AddedNorm norm{inputs[0].data(), inputs[1].data(), scales, outputs[1].data(), outputs[0].data(),
                                    scales_of(outputs, shape), int(size), m_eps};
        run(kernels(type, size).normalise, norm, rows);
        return true;
    }
};

// Inputs: up and gate, float32 or bf16 [1, tokens, size], and perhaps the scales of both [1, tokens, 1]; or one with up
// and gate side by side [1, tokens, 2 · size]. Outputs: gelu(up) · gate, and perhaps its scales.
class GatedGelu : public RowOperation {
public:
    OPENVINO_OP("GatedGelu", "ettin", RowOperation);
    using RowOperation::RowOperation;

    void validate_and_infer_types() override {
        auto shape = get_input_partial_shape(0);
        auto& size = shape[shape.size() - 1];
        if (get_input_size() == 1)
            size = size.get_length() / 2;
        else
            OPENVINO_ASSERT((get_input_size() == 2 || get_input_size() == 3) &&
                                get_input_element_type(0) == get_input_element_type(1) &&
                                shape.compatible(get_input_partial_shape(1)),
                            "GatedGelu takes up, as much of gate, and perhaps scales");
        kernels(get_input_element_type(0), size.get_length());
        set_result(shape, 1);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return as_this(std::make_shared<GatedGelu>(inputs));
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        auto shape = inputs[0].get_shape();
        const bool is_joint = inputs.size() == 1;
        OPENVINO_ASSERT(is_joint || shape == inputs[1].get_shape(), "GatedGelu takes halves of one shape");
        const auto type = inputs[0].get_element_type();
        const size_t stride = shape.back(), size = is_joint ? stride / 2 : stride, rows = inputs[0].get_size() / stride;
        const void* scales = scales_in(inputs, 2, rows, "GatedGelu");
        shape.back() = size;
        outputs[0].set_shape(shape);
        const auto* up = static_cast<const uint8_t*>(inputs[0].data());
        const void* gate = is_joint ? up + size * type.size() : inputs[1].data();
        const ettin::GatedGelu gelu{up, gate, scales, outputs[0].data(), scales_of(outputs, shape), int(size), stride};
        run(kernels(type, size).gate, gelu, rows);
        return true;
    }
};

// Inputs: queries [1, pairs, heads · head_dim], keys [1, tokens, heads · head_dim], float32 or bf16,
// x [1, tokens, size], as they are or int8, cu_seqlens, and perhaps the scales of keys and of x [1, tokens, 1]. Output:
// [1, pairs, heads · size], see `ettin::FirstAttention`.
class FirstAttention : public RowOperation {
public:
    OPENVINO_OP("FirstAttention", "ettin", RowOperation);
    using RowOperation::RowOperation;

    void validate_and_infer_types() override {
        const auto type = get_input_element_type(0), of_x = get_input_element_type(2);
        OPENVINO_ASSERT((get_input_size() == 4 || get_input_size() == 5) && type == get_input_element_type(1) &&
                            (of_x == type || of_x == ov::element::i8),
                        "FirstAttention takes queries, keys, x, cu_seqlens and perhaps scales");
        auto shape = get_input_partial_shape(0);
        const auto size = get_input_partial_shape(2)[2].get_length(), width = shape[2].get_length();
        OPENVINO_ASSERT(m_heads > 0 && (width == 32 * m_heads || width == 64 * m_heads),
                        "FirstAttention knows heads of 32 and 64");
        kernels(type, size);
        shape[2] = m_heads * size;
        set_output_type(0, type, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<FirstAttention>(inputs);
        clone->m_heads = m_heads;
        clone->m_window = m_window;
        clone->m_theta = m_theta;
        return as_this(clone);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("heads", m_heads);
        visitor.on_attribute("window", m_window);
        visitor.on_attribute("theta", m_theta);
        return RowOperation::visit_attributes(visitor);
    }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto of_q = inputs[0].get_shape(), of_k = inputs[1].get_shape(), of_x = inputs[2].get_shape();
        OPENVINO_ASSERT(of_k.size() == 3 && of_x.size() == 3 && of_k[0] == 1 && of_x[0] == 1 && of_k[1] == of_x[1],
                        "FirstAttention: keys are ", of_k, ", x is ", of_x);
        const auto bounds = bounds_of(inputs[3], of_k[1], "FirstAttention");
        const size_t pairs = bounds.size() - 1, size = of_x[2];
        OPENVINO_ASSERT((of_q == ov::Shape{1, pairs, of_k[2]}), "FirstAttention: queries are ", of_q, ", keys ", of_k);
        const void* scales = scales_in(inputs, 4, of_x[1], "FirstAttention");
        const int heads = int(m_heads), head_dim = int(of_q[2] / heads);
        outputs[0].set_shape({1, pairs, heads * size});
        const auto rope = rope_table(m_theta, head_dim, int(ettin::longest_sequence(bounds.data(), pairs)));
        const ettin::FirstAttention task{inputs[0].data(), inputs[1].data(), inputs[2].data(), scales, outputs[0].data(),
                                         inputs[2].get_element_type() == ov::element::i8, rope.get(), heads, head_dim,
                                         int(m_window), int(size)};
        const auto& chosen = kernels(inputs[0].get_element_type(), size);
        ov::parallel_for(pairs * heads,
                         [&](size_t part) { ettin::attend_first_part(chosen, task, bounds.data(), part); });
        return true;
    }

private:
    int64_t m_heads = 1, m_window = -1;
    float m_theta = 0;
};

}  // namespace

// Changes with the operations and with the functions that Python calls: a checkout may be newer than its library.
extern "C" __attribute__((visibility("default"))) int ettin_interface() { return 3; }

// The release that this was compiled for: year · 100 + number.
extern "C" __attribute__((visibility("default"))) int ettin_openvino_release() {
    return OPENVINO_VERSION_MAJOR * 100 + OPENVINO_VERSION_MINOR;
}

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<RaggedAttention>>(), std::make_shared<ov::OpExtension<AddedNorm>>(),
     std::make_shared<ov::OpExtension<GatedGelu>>(), std::make_shared<ov::OpExtension<FirstAttention>>()}));
