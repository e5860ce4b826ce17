// The kernels as a program that answers the requests of `kernel_emulated.py`, one after the other.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" bool ettin_can_run(const char* name);
extern "C" bool ettin_attend(const char* name, bool is_bf16, const void* q, const void* k, const void* v,
                             const int64_t* rows, const void* scales, void* out, const int64_t* bounds,
                             int64_t pairs, int heads, int head_dim, int window, float theta, bool first_only, float step);
extern "C" bool ettin_rows_can_run(const char* name);
extern "C" bool ettin_normalise(const char* name, const void* x, const void* added, const void* added_scales, void* sum,
                                void* normed, void* normed_scales, int64_t rows, int size, float eps);
extern "C" bool ettin_gate(const char* name, const void* joint, const void* scales, void* out, void* out_scales,
                           int64_t rows, int size);
extern "C" bool ettin_attend_first(const char* name, const void* q, const void* k, const void* x, bool is_int8,
                                   const void* scales, void* out, const int64_t* bounds, int64_t pairs, int heads, int head_dim,
                                   int window, float theta, int size);

struct Request {
    char name[16], function[16];
    int64_t is_bf16, rows, size, head_dim, window, first_only;  // rows: or pairs; size: of a row, or heads
    int64_t bytes[7];  // of q (or x, or up and gate), k (or what is added), v, where pairs begin, rows, scales, the result
    float theta, step;  // theta: or eps
};

int main() {
    Request r;
    while (std::fread(&r, sizeof r, 1, stdin) == 1) {
        std::vector<uint8_t> memory[7];  // each of its own, so that the sanitizers see what is between
        for (int at = 0; at < 7; ++at) memory[at].resize(r.bytes[at] ? r.bytes[at] : 1);
        for (int at = 0; at < 6; ++at)
            if (std::fread(memory[at].data(), 1, r.bytes[at], stdin) != size_t(r.bytes[at])) return 1;
        const auto& [q, k, v, bounds, rows, given, _] = memory;
        const void* scales = r.bytes[5] ? given.data() : nullptr;
        // The result, then the scales of its rows if it is int8, then the sum.
        auto* out = memory[6].data();
        void* of_out = r.first_only ? out + r.rows * r.size : nullptr;
        bool done = false;
        if (r.function[0] == 'c')
            done = ettin_can_run(r.name);
        else if (r.function[0] == 'r')
            done = ettin_rows_can_run(r.name);
        else if (r.function[0] == 'n')  // first_only: whether the result is int8, also of the next
            done = ettin_normalise(r.name, q.data(), k.data(), scales, out + r.bytes[6] - r.bytes[0], out, of_out, r.rows,
                                   int(r.size), r.theta);
        else if (r.function[0] == 'g')
            done = ettin_gate(r.name, q.data(), scales, out, of_out, r.rows, int(r.size));
        else if (r.function[0] == 'f')  // v is x, first_only whether that is int8, and step the size of its rows
            done = ettin_attend_first(r.name, q.data(), k.data(), v.data(), r.first_only, scales, out,
                                      reinterpret_cast<const int64_t*>(bounds.data()), r.rows, int(r.size),
                                      int(r.head_dim), int(r.window), r.theta, int(r.step));
        else
            done = ettin_attend(r.name, r.is_bf16, q.data(), k.data(), v.data(),
                                r.bytes[4] ? reinterpret_cast<const int64_t*>(rows.data()) : nullptr, scales, out,
                                reinterpret_cast<const int64_t*>(bounds.data()), r.rows, int(r.size), int(r.head_dim),
                                int(r.window), r.theta, r.first_only, r.step);
        std::fputc(done, stdout);
        std::fwrite(out, 1, r.bytes[6], stdout);
        std::fflush(stdout);
    }
}
